# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Counts what is alive on the meta device, operation by operation."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


WEIGHTS, STATES, GRADIENTS, ACTIVATIONS = "weights", "states", "gradients", "activations"


class AllocationTracker(TorchDispatchMode):
    """Bytes of all storages that are alive, by what they are for; whatever an operation makes is an activation at first.

    It sees what PyTorch allocates in forward, backward and optimiser alike, since meta tensors live and die as real
    ones do. It doesn't see what a kernel needs inside, nor what an allocator keeps beyond what it was asked for.

    Attributes:
        live: Bytes that are alive, by group.
        peaks: The most bytes of activations that were alive beside every amount of gradients. The two are divided
            differently among devices, so which moment is the worst depends on the number of devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peaks: dict[int, int] = {}
        self._groups: dict[int, str] = {}
        self._storages: dict[int, weakref.ref] = {}
        self._any: set[int] = set()  # answers to "is there any"

    def assign(self, tensors: Iterable[torch.Tensor], group: str) -> None:
        """Count the storages of `tensors`, which may be known already, to a group."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key in self._groups:
                self.live[self._groups[key]] -= size
            else:
                self._storages[key] = weakref.ref(storage, functools.partial(self._forget, key, size))
            self._groups[key] = group
            self.live[group] += size
        gradients, activations = self.live[GRADIENTS], self.live[ACTIVATIONS]
        self.peaks[gradients] = max(self.peaks.get(gradients, 0), activations)

    def take_peaks(self) -> dict[int, int]:
        """The peaks so far; starts to collect them anew."""
        peaks, self.peaks = self.peaks, {}
        return peaks

    def _forget(self, key: int, size: int, _: weakref.ref) -> None:
        del self._storages[key]
        self._any.discard(key)
        self.live[self._groups.pop(key)] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            # a model asks about its data: whether all tokens belong to one text, whether any is padding
            return id(args[0].untyped_storage()) not in self._any
        result = func(*args, **(kwargs or {}))
        made = (tensor for tensor in tree_iter(result) if isinstance(tensor, torch.Tensor) and tensor.is_meta)
        self.assign([tensor for tensor in made if id(tensor.untyped_storage()) not in self._groups], ACTIVATIONS)
        if func.overloadpacket is torch.ops.aten.any:
            self._any.add(id(result.untyped_storage()))
        return result


class FusedAttention(TorchFunctionMode):
    """Attention on the meta device as devices compute it, without the matrix of scores, which the meta device's own
    fallback makes.

    Attention with dropout, or with a mask that is trained, is left alone: a CPU has no fused kernel for them either.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    same_size = query.shape[-1] == key.shape[-1] == value.shape[-1]
    trained_mask = attn_mask is not None and attn_mask.requires_grad
    if dropout_p or trained_mask or not same_size or query.dim() != 4:
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return F.scaled_dot_product_attention(query, key, value, **options, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
