# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""K-quants: GGUF's blocks of 256 weights in groups of 16 or 32, whose scales (and minimums) are integers times a float16 of
the block.

Source: `ggml-common.h` and `ggml-quants.c` of llama.cpp. Reading gives the product, which float32 holds exactly. Writing looks
for the two factors again, and finds them for scales that came from such a file and weren't tuned since; a layer with other
scales isn't written so (it would lose half a percent of them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional

import numpy as np

from peft_ext.checkpoint.gguf_bytes import gathered, halves, spread
from peft_ext.quant.packed_module import PackedModule


SUPER_BLOCK = 256
# A minimum is a zero point times a scale, each of which was rounded to float32.
_ROUNDED = 2.0**-21


def q2_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes `[n, 256]`, scales and minimums `[n, 16]` of Q2_K's blocks, uint8 `[n, bytes]`."""
    scales = blocks[:, :16]
    scale = halves(blocks, 80) * (scales & 15).astype(np.float32)
    minimum = -halves(blocks, 82) * (scales >> 4).astype(np.float32)
    return spread(blocks[:, 16:80], 32, 2), scale, minimum


def q3_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes `[n, 256]` and scales `[n, 16]` of Q3_K's blocks, uint8 `[n, bytes]`; 4 stands for zero."""
    low, high = spread(blocks[:, 96:104], 8, 4), spread(blocks[:, 104:108], 4, 2)
    scales = (low | high << 4).astype(np.float32) - 32
    codes = spread(blocks[:, 32:96], 32, 2) | spread(blocks[:, :32], 32, 1) << 2
    return codes, halves(blocks, 108) * scales


def _scales_of_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minimums `[n, 8]` of Q4_K and Q5_K: six bits each, the last four of either split over two places."""
    first, second, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, low & 15 | first >> 6 << 4], axis=-1)
    minimums = np.concatenate([second & 63, low >> 4 | second >> 6 << 4], axis=-1)
    return halves(blocks, 0) * scales.astype(np.float32), -halves(blocks, 2) * minimums.astype(np.float32)


def q4_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes `[n, 256]`, scales and minimums `[n, 8]` of Q4_K's blocks, uint8 `[n, bytes]`."""
    return spread(blocks[:, 16:], 32, 4), *_scales_of_k(blocks)


def q5_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes `[n, 256]`, scales and minimums `[n, 8]` of Q5_K's blocks, uint8 `[n, bytes]`."""
    return spread(blocks[:, 48:], 32, 4) | spread(blocks[:, 16:48], 32, 1) << 4, *_scales_of_k(blocks)


def q6_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes `[n, 256]` and scales `[n, 16]` of Q6_K's blocks, uint8 `[n, bytes]`; 32 stands for zero."""
    codes = spread(blocks[:, :128], 64, 4) | spread(blocks[:, 128:192], 32, 2) << 4
    return codes, halves(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)


class _KType(NamedTuple):
    """How codes and scales are written.

    Args:
        bits, group_size: Of the codes.
        zero_point: The code that stands for zero; None: a minimum for each group.
        low, high: What the second level's integers may be.
        join: Codes uint8 `[n, 256]`, scales and minimums int `[n, groups]` (None: it has none), float16 of both `[n, 1]` as
            uint8 `[n, 2]`, to blocks uint8 `[n, bytes]`.
    """

    bits: int
    group_size: int
    zero_point: Optional[int]
    low: int
    high: int
    join: Callable[..., list[np.ndarray]]


def _join_q2_k(codes: np.ndarray, d: np.ndarray, scales: np.ndarray, dmin: np.ndarray, mins: np.ndarray) -> list:
    return [scales | mins << 4, gathered(codes, 32, 2), d, dmin]


def _join_q3_k(codes: np.ndarray, d: np.ndarray, scales: np.ndarray, *_: np.ndarray) -> list:
    high, low = gathered(codes >> 2, 32, 1), gathered(codes & 3, 32, 2)
    return [high, low, gathered(scales & 15, 8, 4), gathered(scales >> 4, 4, 2), d]


def _scales_to_k(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """The inverse of [`_scales_of_k`]'s integers: uint8 `[n, 12]`."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = mins[:, :4] | mins[:, 4:] >> 4 << 6
    return np.concatenate([first, second, scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4], axis=-1)


def _join_q4_k(codes: np.ndarray, d: np.ndarray, scales: np.ndarray, dmin: np.ndarray, mins: np.ndarray) -> list:
    return [d, dmin, _scales_to_k(scales, mins), gathered(codes, 32, 4)]


def _join_q5_k(codes: np.ndarray, d: np.ndarray, scales: np.ndarray, dmin: np.ndarray, mins: np.ndarray) -> list:
    return [d, dmin, _scales_to_k(scales, mins), gathered(codes >> 4, 32, 1), gathered(codes & 15, 32, 4)]


def _join_q6_k(codes: np.ndarray, d: np.ndarray, scales: np.ndarray, *_: np.ndarray) -> list:
    return [gathered(codes & 15, 64, 4), gathered(codes >> 4, 32, 2), scales, d]


_TYPES = {
    "Q2_K": _KType(2, 16, None, 0, 15, _join_q2_k),
    "Q3_K": _KType(3, 16, 4, -32, 31, _join_q3_k),
    "Q4_K": _KType(4, 32, None, 0, 63, _join_q4_k),
    "Q5_K": _KType(5, 32, None, 0, 63, _join_q5_k),
    "Q6_K": _KType(6, 16, 32, -128, 127, _join_q6_k),
}


def k_type(layer: PackedModule) -> Optional[str]:
    """The K-quant that holds a layer's codes, scales and zero points bit for bit; None where there is none."""
    for name, kind in _TYPES.items():
        if _has_format(layer, kind) and _levels(layer, kind) is not None:
            return name
    return None


def to_k_blocks(layer: PackedModule, name: str, rows: np.ndarray) -> np.ndarray:
    """A layer's weight in K-quants of the type that [`k_type`] has found: uint8 `[out, bytes of a row]`.

    Args:
        rows: The order in which the rows are stored.
    """
    kind = _TYPES[name]
    levels = _levels(layer, kind)
    assert levels is not None
    codes = layer.codes().cpu().numpy().reshape(-1, SUPER_BLOCK)
    parts = kind.join(codes, *levels)
    blocks = np.concatenate([part.view(np.uint8) for part in parts], axis=-1)
    return blocks.reshape(layer.out_features, -1)[rows]


def _has_format(layer: PackedModule, kind: _KType) -> bool:
    zero_point = layer.zero_point
    if zero_point is None or layer.bits != kind.bits or layer.in_features % SUPER_BLOCK:
        return False
    if layer.in_features != kind.group_size * layer.scale.shape[1]:
        return False
    floats = zero_point.is_floating_point()
    return floats if kind.zero_point is None else not floats and bool((zero_point == kind.zero_point).all())


def _levels(layer: PackedModule, kind: _KType) -> Optional[tuple[np.ndarray, ...]]:
    """The float16 of every block as bytes and the integers of its groups, of scales and then of minimums; None if there
    are no such."""
    groups = SUPER_BLOCK // kind.group_size
    scale = layer.scale.detach().float().cpu().numpy().reshape(-1, groups)
    if kind.zero_point is not None:
        found = _factors(scale, kind)
        return None if found is None else _stored(*found, kind)
    assert layer.zero_point is not None
    zero_point = layer.zero_point.detach().float().cpu().numpy().reshape(-1, groups)
    codes = layer.codes().cpu().numpy().reshape(-1, groups, kind.group_size)
    constant = ~codes.any(-1) & (scale == 1)  # as a group of scale 0 is read
    found = _factors(np.where(constant, 0, scale), kind)
    if found is None:
        return None
    minimum = scale.astype(np.float64) * zero_point
    second = _factors(minimum.astype(np.float32), kind, _ROUNDED)
    if second is None:
        return None
    again = second[0].astype(np.float32) * second[1].astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        same = again / scale == zero_point
    return (*_stored(*found, kind), *_stored(*second, kind)) if same.all() else None


def _stored(factor: np.ndarray, integers: np.ndarray, kind: _KType) -> tuple[np.ndarray, np.ndarray]:
    """As bytes: a factor `[n, 2]`; integers `[n, groups]`, of Q3_K from zero on."""
    shifted = integers + 32 if kind.bits == 3 else integers
    return factor.astype("<f2").view(np.uint8), (shifted & 255).astype(np.uint8)


def _factors(products: np.ndarray, kind: _KType, tolerance: float = 0.0) -> Optional[tuple[np.ndarray, np.ndarray]]:
    """A float16 `[n, 1]` and integers `[n, groups]` whose products these are; None where a block has none.

    Args:
        products: float32 `[n, groups]`.
        tolerance: How far a product may be off, relative to the block's largest.
    """
    products = products.astype(np.float64)
    at = np.abs(products).argmax(-1)[:, None]
    largest = np.take_along_axis(products, at, -1)
    factor, integers = np.zeros_like(largest), np.zeros(products.shape, np.int64)
    left = np.flatnonzero(largest[:, 0])
    # quantisers give the largest the largest integer, so that the first tries find nearly all
    tries = sorted((whole for whole in range(kind.low, kind.high + 1) if whole), key=lambda whole: -abs(whole))
    for whole in tries:
        if not len(left):
            break
        some, most = products[left], largest[left]
        with np.errstate(over="ignore", under="ignore"):
            one = (most / whole).astype(np.float16).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            counts = np.rint(some / one)
            fits = np.isfinite(counts) & (counts >= kind.low) & (counts <= kind.high)
            fits &= np.abs(counts * one - some) <= tolerance * np.abs(most)
        found = fits.all(-1)
        factor[left[found]], integers[left[found]] = one[found], counts[found].astype(np.int64)
        left = left[~found]
    return None if len(left) else (factor, integers)
