# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Granularities of past tokens beside their keys, in whatever cache generate uses; beams reorder both."""

from __future__ import annotations

from functools import cache
from typing import Any, Optional

import torch
from transformers.cache_utils import EncoderDecoderCache


def past_granularities(cache: Any, module: Any, z: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Keep new tokens' granularities; returns those of all tokens, and how many are past.

    Args:
        cache: The cache of the call, or None.
        module: The attention, for its `layer_idx`.
        z: Of the new tokens, `[batch, tokens]`.

    Returns:
        `[batch, keys]`, and the number of past tokens.

    Raises:
        ValueError: If the cache is a sliding window of fixed size, whose slots move.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        return z, 0
    layer = module.layer_idx
    if not isinstance(cache, _Granularities):
        kind: Any = type(cache)
        cache.__class__ = _with_granularities(kind)
        cache.granularities = {}
    past = cache.get_seq_length(layer)
    slots = _slots(cache, layer)
    stored: Optional[torch.Tensor] = cache.granularities.get(layer)
    if slots is None:
        stored = z if stored is None or not past else torch.cat([stored, z], 1)
    else:
        if stored is None:
            stored = z.new_zeros(z.shape[0], slots)
        stored = stored.index_copy(1, past + torch.arange(z.shape[1], device=z.device), z)
    cache.granularities[layer] = stored
    return stored, past.clone() if isinstance(past, torch.Tensor) else past


class _Granularities:
    """What a cache does with its keys, done to the granularities beside them."""

    granularities: dict[int, torch.Tensor]

    def _map(self, function: Any) -> None:
        self.granularities = {layer: function(z) for layer, z in self.granularities.items()}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._map(lambda z: z.index_select(0, beam_idx.to(z.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._map(lambda z: z.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._map(lambda z: z[indices])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        length = self.get_seq_length()  # type: ignore[attr-defined]
        self._map(lambda z: z[:, :length])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.granularities = {}


@cache
def _with_granularities(kind: Any) -> type:
    return type(f"Granularity{kind.__name__}", (_Granularities, kind), {})


def _slots(cache: Any, layer: int) -> Optional[int]:
    """How many tokens a layer of fixed size has room for; None for one that grows."""
    if layer >= len(cache.layers) or not getattr(cache.layers[layer], "is_compileable", False):
        return None
    keys = cache.layers[layer]
    if getattr(keys, "is_sliding", False):
        raise ValueError(
            "a static cache with a sliding window isn't possible with granularities; use cache_implementation='dynamic'."
        )
    return keys.max_cache_len if hasattr(keys, "max_cache_len") else keys.get_max_length()
