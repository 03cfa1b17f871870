# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Folders as `save_pretrained` writes them: what `--model` may name."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig

from tests.tiny.models import tiny
from tests.tiny.tokenizers import byte_tokenizer, chat_tokenizer, tiny_tokenizer


def save_tiny(name: str, folder) -> str:
    """Save a tiny transformers model, so that it has a path like a model of the hub; returns the path."""
    tiny(name).save_pretrained(folder)
    return str(folder)


def save_word_model(name: str, folder) -> str:
    """The same with the tokenizer of words."""
    tiny_tokenizer().save_pretrained(folder)
    return save_tiny(name, folder)


def save_tiny_model(folder: Path) -> Path:
    """A Llama of bytes, and its tokenizer; returns the folder."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(byte_tokenizer()),
        max_position_embeddings=256,
    )
    return _save(config, folder)


def save_chat_model(folder: Path) -> Path:
    """A Llama of bytes with SmolLM2's chat template; returns the folder."""
    tokenizer = chat_tokenizer()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    _save(config, folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_gpt2(folder: Path) -> Path:
    """A GPT-2 of bytes, and its tokenizer; returns the folder."""
    config = GPT2Config(
        vocab_size=260, n_positions=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return _save(config, folder)


def save_long_model(folder: Path, seed: int = 0, scores: bool = False) -> Path:
    """A Llama on bytes with room for 4,096 of them, and its tokenizer; with `scores`, one that gives a score."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_labels=1,
    )
    return _save(config, folder, seed, AutoModelForSequenceClassification if scores else AutoModelForCausalLM)


def _save(config, folder: Path, seed: int = 0, kind: type = AutoModelForCausalLM) -> Path:
    byte_tokenizer().save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind.from_config(config).save_pretrained(folder)
    return folder
