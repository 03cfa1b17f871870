# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Tiny models in a hub cache, under the ids of the real ones: documents name real ids, and their blocks run without a hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from tests.tiny.tokenizers import byte_tokenizer


_REVISION = "0" * 40
_CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _language_model(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = _CHAT
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _encoder(kind: type) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<pad>", "cls_token": "<cls>", "sep_token": "<sep>"})
        tokenizer.save_pretrained(folder)
        config = BertConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            id2label={0: "negative", 1: "positive"},
        )
        kind.from_config(config).save_pretrained(folder)

    return save


MODELS: dict[str, Callable[[Path], None]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _language_model,
    "HuggingFaceTB/SmolLM2-360M": _language_model,
    "HuggingFaceTB/SmolLM2-360M-Instruct": _language_model,
    "sentence-transformers/all-MiniLM-L6-v2": _encoder(AutoModel),
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": _encoder(AutoModelForSequenceClassification),
}


def fill_cache(cache: Path) -> None:
    """Write all `MODELS` into the folder that `HF_HUB_CACHE` names."""
    for name, save in MODELS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(_REVISION)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save(folder / "snapshots" / _REVISION)
