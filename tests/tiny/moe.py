# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Tiny mixtures of experts, one for each way in which transformers stores and routes them."""

from __future__ import annotations

import copy
import functools

import torch
import transformers
from torch import nn

from tests.tiny.tokenizers import VOCAB


EXPERTS, HIDDEN, INNER = 4, 32, 64
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEEPSEEK = {
    "moe_intermediate_size": INNER,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
# Class of the model, and what its config has beside or instead of the shape that all share.
_FAMILIES: dict[str, tuple[str, dict]] = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "shared_expert_intermediate_size": INNER},
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS}),
    "deepseek_v3": ("DeepseekV3", _DEEPSEEK),
    "phimoe": ("Phimoe", {"num_local_experts": EXPERTS, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": EXPERTS}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": EXPERTS, "head_dim": 8, "layer_types": ["full_attention"] * 2, "sliding_window": 8},
    ),
    "llama4": (
        "Llama4",
        {
            "num_local_experts": EXPERTS,
            "intermediate_size_mlp": INNER,
            "head_dim": 8,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 32,
            "moe_layers": [0, 1],
        },
    ),
}
MOE = tuple(_FAMILIES)


@functools.cache
def _template(name: str) -> nn.Module:
    torch.manual_seed(0)
    family, more = _FAMILIES[name]
    suffix = "TextConfig" if family == "Llama4" else "Config"
    config = getattr(transformers, f"{family}{suffix}")(**{**_SHAPE, **more})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # biases and routers that start at zero would hide mistakes
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model


def tiny_moe(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh model in eval mode."""
    return copy.deepcopy(_template(name)).to(dtype)


def moe_batch() -> dict[str, torch.Tensor]:
    """Token ids and a mask `[3, 12]`."""
    ids = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}
