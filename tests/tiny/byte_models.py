# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Tiny random models that read bytes, one for each kind of attention and position, and naive loops to compare with."""

from __future__ import annotations

import copy
import functools

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tests.tiny.tokenizers import tokenizer_for


VOCAB, HIDDEN, LAYERS, HEADS, LENGTH = 260, 32, 2, 4, 512
_COMMON = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "pad_token_id": None}
_LLAMA = {
    **_COMMON,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_key_value_heads": HEADS // 2,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.2,
}
_GPT2 = {"n_positions": LENGTH, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCAB}
_T5 = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 2 * HIDDEN, "num_layers": LAYERS, "num_heads": HEADS, "vocab_size": VOCAB}


def _neo() -> transformers.GPTNeoConfig:
    kinds = [[["global", "local"], 1]]
    common = {"vocab_size": VOCAB, "num_layers": LAYERS, "num_heads": HEADS, "hidden_size": HIDDEN}
    return transformers.GPTNeoConfig(
        **common, attention_types=kinds, window_size=16, max_position_embeddings=LENGTH, initializer_range=0.2
    )


CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(**_GPT2, initializer_range=0.2),
    "llama": lambda: transformers.LlamaConfig(**_LLAMA),
    "mistral": lambda: transformers.MistralConfig(**_LLAMA, sliding_window=24),
    # full and sliding layers in one model, capped logits
    "gemma2": lambda: transformers.Gemma2Config(**_LLAMA, head_dim=8, sliding_window=24, final_logit_softcapping=3.0),
    "opt": lambda: transformers.OPTConfig(
        **_COMMON,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=64,
        max_position_embeddings=LENGTH,
        init_std=0.2,
    ),
    # positions that can't be given: a causal mask in the layers, ALiBi
    "gpt_neo": _neo,
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, initializer_range=0.2
    ),
    "t5": lambda: transformers.T5Config(**_T5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=258),
    "bart": lambda: transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=2 * HIDDEN,
        decoder_ffn_dim=2 * HIDDEN,
        max_position_embeddings=LENGTH,
        init_std=0.3,
    ),
    "bert": lambda: transformers.BertConfig(
        **{**_COMMON, "pad_token_id": 0},
        hidden_size=HIDDEN,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
    ),
}
_EAGER = ("gemma2", "gpt_neo", "bloom")  # have nothing else, or cap attention's scores
CAUSAL = ("gpt2", "llama", "mistral", "gemma2", "opt", "gpt_neo", "bloom")


@functools.cache
def model(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """A model in float32 and evaluation mode, the same weights at every call; not to be changed."""
    config = CONFIGS[name]()
    kinds = {
        "t5": transformers.AutoModelForSeq2SeqLM,
        "bart": transformers.AutoModelForSeq2SeqLM,
        "bert": transformers.AutoModel,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = kinds.get(name, transformers.AutoModelForCausalLM).from_config(
            config, attn_implementation="eager" if name in _EAGER else attention
        )
    return built.eval()


def adapted(seed: int) -> PeftModel:
    """A Llama with a LoRA: always the same base and the same adapter's name; the seed makes its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(copy.deepcopy(model("llama")), config).eval()


@torch.no_grad()
def naive_log_prob(name: str, lm: torch.nn.Module, context: str, label: str) -> tuple[float, int]:
    """Log-probability of a label's tokens after a context, from one pass over the whole string; and their number."""
    words = tokenizer_for(name)
    if name == "t5":
        target = words(label.strip(), add_special_tokens=False, return_tensors="pt")["input_ids"]
        logits = lm(**words(context, return_tensors="pt"), labels=target).logits[0]
        picked = logits.log_softmax(-1).gather(1, target[0][:, None])
        return picked.sum().item(), len(target[0])
    before = words(context)["input_ids"]
    whole = words(context + label)["input_ids"]
    logits = lm(input_ids=torch.tensor([whole]), use_cache=False).logits[0]
    picked = logits[:-1].log_softmax(-1).gather(1, torch.tensor(whole[1:])[:, None])[len(before) - 1 :]
    return picked.sum().item(), len(picked)
