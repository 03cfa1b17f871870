# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Packed layers as GGUF's quantised blocks: 32 codes of one row with a float16 scale, the codes as they are.

Source: `ggml-common.h` and `ggml-quants.c` of llama.cpp; `gguf.quants` reads what is written here. A block's weight is
`d * (code - offset)` (Q4_0, Q5_0, Q8_0) or `d * code + m` (Q4_1, Q5_1). What ours has to give up is the precision of
its scale, at most 2^-11 of it, and in Q4_1 and Q5_1 that of `m = -d * zero_point`. Float zero points that came from a
float16 `m` give that very `m` again.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, cast

import numpy as np
import torch

from peft_ext.quant.linear import PackedLinear


BLOCK_SIZE = 32


class BlockType(NamedTuple):
    """How GGUF stores a block: width of a code, and the code that stands for zero (None: the block has a minimum)."""

    bits: int
    offset: Optional[int]


# By name in gguf.GGMLQuantizationType, smallest first.
BLOCK_TYPES = {
    "Q4_0": BlockType(4, 8),
    "Q4_1": BlockType(4, None),
    "Q5_0": BlockType(5, 16),
    "Q5_1": BlockType(5, None),
    "Q8_0": BlockType(8, 128),
}


def block_type(layer: PackedLinear) -> Optional[str]:
    """The smallest block type that holds a layer's codes exactly; None where there is none, see [`why_no_blocks`].

    A type without a minimum takes every zero point that leaves the differences `code - zero_point` in its range: all of
    2 and 3 bits fit Q4_0, so that asymmetric ones lose nothing but the precision of their scales.
    """
    if layer.zero_point is None or _group(layer) % BLOCK_SIZE:
        return None
    if layer.zero_point.is_floating_point():
        fitting = (name for name, (bits, offset) in BLOCK_TYPES.items() if offset is None and layer.bits <= bits)
        return next(fitting, None)
    low, high = -int(layer.zero_point.max()), 2**layer.bits - 1 - int(layer.zero_point.min())
    for name, (bits, offset) in BLOCK_TYPES.items():
        if layer.bits <= bits if offset is None else -offset <= low and high < 2**bits - offset:
            return name
    return None


def why_no_blocks(layer: PackedLinear) -> str:
    """Why [`block_type`] found none."""
    if layer.zero_point is None:
        return "binary codings have levels that GGUF's blocks don't have"
    if _group(layer) % BLOCK_SIZE:
        return f"groups of {_group(layer)} aren't multiples of GGUF's blocks of {BLOCK_SIZE}"
    if layer.zero_point.is_floating_point():
        return f"codes of {layer.bits} bits with a minimum don't fit any of GGUF's blocks"
    return f"asymmetric codes of {layer.bits} bits don't fit any of GGUF's blocks"


def to_blocks(layer: PackedLinear, name: str, rows: Optional[torch.Tensor] = None) -> np.ndarray:
    """A layer's weight in blocks of type `name`: uint8 `[out, bytes of a row]`.

    Args:
        rows: The order in which the rows are stored; as they are by default.

    Raises:
        ValueError: If a scale is outside of float16's range.
    """
    bits, offset = BLOCK_TYPES[name]
    rows = torch.arange(layer.out_features) if rows is None else rows
    codes, scale = layer.codes().cpu()[rows].numpy(), layer.scale.detach().float().cpu()[rows].numpy()
    zero_point = cast(torch.Tensor, layer.zero_point).detach().cpu()[rows].numpy()
    blocks = codes.reshape(layer.out_features, -1, BLOCK_SIZE)
    repeats = blocks.shape[1] // scale.shape[1]
    with np.errstate(over="ignore"):
        d = scale.astype(np.float16).repeat(repeats, axis=1)
        zero_point = zero_point.repeat(repeats, axis=1)
        # of the rounded scale, so that zero stays zero; float zero points stand for a minimum, also where a scale is so small
        # that it becomes zero
        of_scale = scale.repeat(repeats, axis=1) if zero_point.dtype.kind == "f" else d.astype(np.float32)
        m_exact = -of_scale * zero_point
        m = m_exact.astype(np.float16)
    if not np.isfinite(d).all() or (offset is None and not np.isfinite(m).all()):
        raise ValueError(
            f"the scales reach {np.abs(scale).max():.3g} and their products with zero points {np.abs(m_exact).max():.3g}, beyond "
            "float16, in which GGUF's blocks keep them."
        )
    if offset is None:
        return _joined(d, m, *_packed(blocks, bits))
    centred = blocks.astype(np.int16) - zero_point[..., None]
    if bits == 8:
        return _joined(d, centred.astype(np.int8))
    return _joined(d, *_packed((centred + offset).astype(np.uint8), bits))


def _packed(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    """Codes `[..., 32]` below 32 as the blocks hold them: the fifth bits of all, then nibbles `i` and `16 + i`."""
    nibbles = codes & 15
    low = nibbles[..., : BLOCK_SIZE // 2] | nibbles[..., BLOCK_SIZE // 2 :] << 4
    return [low] if bits == 4 else [np.packbits(codes >> 4, axis=-1, bitorder="little"), low]


def _joined(*parts: np.ndarray) -> np.ndarray:
    """Fields `[out, blocks]` and `[out, blocks, n]` side by side in every block, little-endian; the bytes of each row."""
    as_bytes = [
        np.ascontiguousarray(part if part.ndim == 3 else part[..., None].astype("<f2")).view(np.uint8)
        for part in parts
    ]
    return np.concatenate(as_bytes, axis=-1).reshape(len(parts[0]), -1)


def _group(layer: PackedLinear) -> int:
    return layer.in_features // layer.scale.shape[1]
