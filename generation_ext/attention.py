# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What is asked of a language model's attention before several texts are put behind one prefix."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Optional

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


# What a forward pass calls its cache: since transformers 5.23, and before.
CACHE_NAMES = ("cache", "past_key_values")
FULL, SLIDING = "full_attention", "sliding_attention"
_TAKES_MASKS = ("sdpa", "eager")


def cache_name(parameters: Collection[str]) -> Optional[str]:
    """What a forward pass with these parameters calls its cache; None if it takes none."""
    return next((name for name in CACHE_NAMES if name in parameters), None)


def takes_masks(config: Any) -> bool:
    """Whether the attention function takes a 4D mask of ours; flash attention doesn't."""
    return attention_implementation(config) in _TAKES_MASKS


def attention_implementation(config: Any) -> str:
    """The name of the attention function; some old models have but one, and don't name it."""
    return getattr(config, "_attn_implementation", None) or "eager"


def windows_of(config: Any) -> tuple[dict[str, Optional[int]], list[str]]:
    """How far layers look back.

    Args:
        config: Of a causal model or a decoder, `get_text_config(decoder=True)`.

    Returns:
        Kind of layer (`FULL`, `SLIDING`) -> how many tokens it sees, itself included; None: all. And what else there is:
        layers whose past isn't keys and values of single tokens, each of their own. Where there are any, a prefix can't
        be shared.
    """
    kinds = _kinds(config)
    window = getattr(config, "sliding_window", None)
    others = sorted(set(kinds) - {FULL, SLIDING})
    if getattr(config, "kv_sharing_modes", None) is not None:
        others.append("keys shared between layers")
    if SLIDING in kinds and window is None:
        others.append("sliding attention without a sliding_window")
    return {kind: window if kind == SLIDING else None for kind in (FULL, SLIDING) if kind in kinds}, others


def _kinds(config: Any) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"]
    known = {DynamicLayer: FULL, DynamicSlidingWindowLayer: SLIDING}
    layers = DynamicCache(config=config).layers
    return [known.get(type(layer), type(layer).__name__) for layer in layers] or [FULL]
