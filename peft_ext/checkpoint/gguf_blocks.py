# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Packed layers as GGUF's quantised blocks, and back: 32 codes of one row or more with a float16 scale, the codes as they are.

Source: `ggml-common.h` and `ggml-quants.c` of llama.cpp; `gguf.quants` reads what is written here, and tests hold what is
read here against it. A block's weight is `d * (code - offset)` (Q2_0, Q4_0, Q5_0, Q8_0), `d * code + m` (Q4_1, Q5_1) or
plus or minus `d` (Q1_0). What ours
has to give up is the precision of its scale, at most 2^-11 of it, and in Q4_1 and Q5_1 that of `m = -d * zero_point`. Float
zero points that came from a float16 `m` give that very `m` again. Q2_0 has the levels -1, 0, 1 and 2; ours of 2 symmetric bits,
-2 to 1, are the same under a negative `d`.

Reading gives nothing up: scales become float32, two-level ones (K-quants) their product, which float32 holds exactly, and a
minimum becomes the float zero point `-m / d`. Ternary and binary blocks become 2-bit codes, of which they use three or two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional

import numpy as np
import torch

from peft_ext.checkpoint.gguf_bytes import gathered, halves, spread
from peft_ext.checkpoint.gguf_k_quants import SUPER_BLOCK, k_type, q2_k, q3_k, q4_k, q5_k, q6_k, to_k_blocks
from peft_ext.quant.packed_module import PackedModule
from peft_ext.quant.uniform import Quantized


BLOCK_SIZE = 32
# Rows are read some at a time: bits are taken apart in several bytes for a code.
_WEIGHTS_AT_ONCE = 1 << 20


class BlockType(NamedTuple):
    """How GGUF stores a block: width of a code, the code that stands for zero (None: the block has a minimum), and how many
    codes share a scale."""

    bits: int
    offset: Optional[int]
    weights: int = BLOCK_SIZE


# By name in gguf.GGMLQuantizationType, smallest first.
BLOCK_TYPES = {
    "Q1_0": BlockType(1, 0, 128),
    "Q2_0": BlockType(2, 1, 64),
    "Q4_0": BlockType(4, 8),
    "Q4_1": BlockType(4, None),
    "Q5_0": BlockType(5, 16),
    "Q5_1": BlockType(5, None),
    "Q8_0": BlockType(8, 128),
}


# llama.cpp reads them since 2026 only (Q1_0 since spring, Q2_0 since July, build b9916).
LOW_BIT_TYPES = ("Q1_0", "Q2_0")


def block_type(layer: PackedModule, low_bit_types: bool = False) -> Optional[str]:
    """The smallest block type that holds a layer's codes exactly; None where there is none, see [`why_no_blocks`].

    A type without a minimum takes every zero point that leaves the differences `code - zero_point` in its range: all of
    2 and 3 bits fit Q4_0, so that asymmetric ones lose nothing but the precision of their scales.

    Args:
        low_bit_types: Whether Q1_0 and Q2_0 count, which older llama.cpps don't read.
    """
    if (exact := k_type(layer)) is not None:
        return exact
    names = (name for name in BLOCK_TYPES if low_bit_types or name not in LOW_BIT_TYPES)
    return next((name for name in names if _fits(layer, name)), None)


def _fits(layer: PackedModule, name: str) -> bool:
    """Whether a block type holds a layer's codes exactly."""
    bits, offset, weights = BLOCK_TYPES[name]
    zero_point = layer.zero_point
    if _group(layer) % weights:
        return False
    if zero_point is None:
        return name == "Q1_0" and layer.bits == 1
    if zero_point.is_floating_point():
        return offset is None and layer.bits <= bits
    if offset is None:
        return layer.bits <= bits
    if name == "Q1_0":
        return _is_two_levels(layer, zero_point)
    if name == "Q2_0":
        return layer.bits == 2 and bool(((zero_point == 1) | (zero_point == 2)).all())
    return -offset <= -int(zero_point.max()) and 2**layer.bits - 1 - int(zero_point.min()) < 2**bits - offset


def _is_two_levels(layer: PackedModule, zero_point: torch.Tensor) -> bool:
    """Whether 2-bit codes are but one below and one above zero, as those that were read from Q1_0 are."""
    if layer.bits != 2 or not bool((zero_point == 2).all()):
        return False
    return bool((layer.codes() & 1).all())


def why_no_blocks(layer: PackedModule) -> str:
    """Why [`block_type`] found none."""
    if layer.zero_point is None:
        if layer.bits == 1 and _group(layer) % BLOCK_TYPES["Q1_0"].weights:
            return f"binary codings of 1 bit need groups of a multiple of 128, not {_group(layer)}"
        if layer.bits == 1:
            return "binary codings of 1 bit fit Q1_0 alone, which low_bit_types=True allows"
        return "binary codings have levels that GGUF's blocks don't have"
    if _group(layer) % BLOCK_SIZE:
        return f"groups of {_group(layer)} aren't multiples of GGUF's blocks of {BLOCK_SIZE}"
    if layer.zero_point.is_floating_point():
        return f"codes of {layer.bits} bits with a minimum don't fit any of GGUF's blocks"
    return f"asymmetric codes of {layer.bits} bits don't fit any of GGUF's blocks"


def to_blocks(layer: PackedModule, name: str, rows: Optional[torch.Tensor] = None) -> np.ndarray:
    """A layer's weight in blocks of type `name`: uint8 `[out, bytes of a row]`.

    Args:
        rows: The order in which the rows are stored; as they are by default.

    Raises:
        ValueError: If a scale is outside of float16's range.
    """
    rows = torch.arange(layer.out_features) if rows is None else rows
    if name not in BLOCK_TYPES:
        return to_k_blocks(layer, name, rows.numpy())
    bits, offset, weights = BLOCK_TYPES[name]
    codes, scale = layer.codes().cpu()[rows].numpy(), layer.scale.detach().float().cpu()[rows].numpy()
    blocks = codes.reshape(layer.out_features, -1, weights)
    repeats = blocks.shape[1] // scale.shape[1]
    if layer.zero_point is None:
        return _joined(_halves(scale[..., 0].repeat(repeats, axis=1)), np.packbits(blocks, axis=-1, bitorder="little"))
    zero_point = layer.zero_point.detach().cpu()[rows].numpy().repeat(repeats, axis=1)
    scale = scale.repeat(repeats, axis=1)
    if name == "Q1_0":
        return _joined(_halves(scale), np.packbits(blocks >> 1, axis=-1, bitorder="little"))
    if offset is None:
        # of the rounded scale, so that zero stays zero; float zero points stand for a minimum, also where a scale is so small
        # that it becomes zero
        d = _halves(scale)
        of_scale = scale if zero_point.dtype.kind == "f" else d.astype(np.float32)
        return _joined(
            d, _halves(-of_scale * zero_point, "products of scales and zero points"), *_packed(blocks, bits)
        )
    centred = blocks.astype(np.int16) - zero_point[..., None]
    if bits == 8:
        return _joined(_halves(scale), centred.astype(np.int8))
    if name == "Q2_0":
        sign = np.where(zero_point == 2, np.int16(-1), np.int16(1))
        low = gathered((centred * sign[..., None] + offset).astype(np.uint8).reshape(-1, weights), 1, bits)
        return _joined(_halves(scale * sign), low.reshape(*blocks.shape[:2], -1))
    return _joined(_halves(scale), *_packed((centred + offset).astype(np.uint8), bits))


def _halves(values: np.ndarray, what: str = "scales") -> np.ndarray:
    """Values in float16.

    Raises:
        ValueError: If one is beyond its range.
    """
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError(
            f"the {what} reach {np.abs(values).max():.3g}, beyond float16, in which GGUF's blocks keep them."
        )
    return halves


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


def _group(layer: PackedModule) -> int:
    return layer.in_features // layer.scale.shape[1]


class ReadType(NamedTuple):
    """How a block type is read.

    Args:
        bits: Width of a code.
        group_size: Weights that share a scale.
        zero_point: The code that stands for zero; None: each group has a minimum, and a float zero point.
        read: Blocks uint8 `[n, bytes]` to codes uint8 `[n, weights]`, scales float32 `[n, groups]` and, if there is no
            `zero_point`, minimums float32 `[n, groups]`.
        nbytes, weights: Of a block.
    """

    bits: int
    group_size: int
    zero_point: Optional[int]
    read: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    nbytes: int
    weights: int = BLOCK_SIZE


def from_blocks(data: np.ndarray, name: str) -> Quantized:
    """A weight out of its blocks, with the file's codes.

    Args:
        data: uint8 `[out, bytes of a row]`.
        name: The type, one of `READ_TYPES`.

    Returns:
        Codes uint8 `[out, in]`, scales float32 and zero points uint8 or float32 `[out, groups]`. A group of scale 0 that has a
        minimum is constant, whatever its codes: they become 0, the scale 1 and the zero point minus the minimum.

    Raises:
        ValueError: If a block holds what its type can't.
    """
    kind = READ_TYPES[name]
    rows, blocks = len(data), data.shape[1] // kind.nbytes
    columns, groups = blocks * kind.weights, blocks * kind.weights // kind.group_size
    codes = np.empty((rows, columns), np.uint8)
    scale = np.empty((rows, groups), np.float32)
    zero_point = np.empty((rows, groups), np.uint8 if kind.zero_point is not None else np.float32)
    step = max(1, _WEIGHTS_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        found = kind.read(np.ascontiguousarray(data[part]).reshape(-1, kind.nbytes))
        codes[part], scale[part] = found[0].reshape(-1, columns), found[1].reshape(-1, groups)
        if name == "TQ2_0" and codes[part].size and codes[part].max() >= 2**kind.bits:
            raise ValueError("a block of TQ2_0 has a fourth level, which no ternary weight has; the file is damaged.")
        if kind.zero_point is not None:
            zero_point[part] = kind.zero_point
            if name == "Q2_0":
                _turn_negative(codes[part], scale[part], zero_point[part])
            continue
        minimum = found[2].reshape(-1, groups)
        constant = scale[part] == 0
        scale[part][constant] = 1
        zero_point[part] = -minimum / scale[part]
        if constant.any():
            codes[part].reshape(-1, groups, kind.group_size)[constant] = 0
    return Quantized(*(torch.from_numpy(each) for each in (codes, scale, zero_point)))


def _fifth(blocks: np.ndarray, start: int) -> np.ndarray:
    """The upper bits of 32 codes, in the place that they have in a code."""
    return np.unpackbits(np.ascontiguousarray(blocks[:, start : start + 4]), axis=-1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return spread(blocks[:, 2:], 16, 4), halves(blocks, 0)


def _q4_1(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return spread(blocks[:, 4:], 16, 4), halves(blocks, 0), halves(blocks, 2)


def _q5_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return spread(blocks[:, 6:], 16, 4) | _fifth(blocks, 2), halves(blocks, 0)


def _q5_1(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return spread(blocks[:, 8:], 16, 4) | _fifth(blocks, 4), halves(blocks, 0), halves(blocks, 2)


def _q8_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return blocks[:, 2:] ^ np.uint8(128), halves(blocks, 0)  # two's complement plus 128


def _q1_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    bits = np.unpackbits(np.ascontiguousarray(blocks[:, 2:]), axis=-1, bitorder="little")
    return bits * np.uint8(2) + np.uint8(1), halves(blocks, 0)  # -d and d, without the 0 between them


def _q2_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return spread(blocks[:, 2:], 1, 2), halves(blocks, 0)


def _turn_negative(codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> None:
    """The levels -1 to 2 of a negative scale as -2 to 1 of a positive one, in place: what `to_blocks` was given."""
    negative = scale < 0
    grouped = codes.reshape(*scale.shape, -1)
    grouped[negative] = 3 - grouped[negative]
    zero_point[negative] = 2
    np.abs(scale, out=scale)


def _tq1_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    powers = np.array([1, 3, 9, 27, 81], np.uint8)
    # five digits of base three to a byte, four in the last bytes; multiplying wraps, which leaves the fraction behind a digit
    parts = [(blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)]
    digits = [(part[:, None] * powers[:count, None]).reshape(len(part), -1) for part, count in parts]
    codes = (np.concatenate(digits, axis=-1).astype(np.uint16) * 3 >> 8).astype(np.uint8)
    return codes + np.uint8(1), halves(blocks, 52)


def _tq2_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return spread(blocks[:, :64], 32, 2) + np.uint8(1), halves(blocks, 64)


# By name in gguf.GGMLQuantizationType: what has integers with a scale (and a minimum) for each group. The IQ types and the
# four-bit floats have levels of their own instead.
READ_TYPES = {
    "Q1_0": ReadType(2, 128, 2, _q1_0, 18, 128),
    "Q2_0": ReadType(2, 64, 1, _q2_0, 18, 64),
    "TQ1_0": ReadType(2, SUPER_BLOCK, 2, _tq1_0, 54, SUPER_BLOCK),
    "TQ2_0": ReadType(2, SUPER_BLOCK, 2, _tq2_0, 66, SUPER_BLOCK),
    "Q2_K": ReadType(2, 16, None, q2_k, 84, SUPER_BLOCK),
    "Q3_K": ReadType(3, 16, 4, q3_k, 110, SUPER_BLOCK),
    "Q4_0": ReadType(4, BLOCK_SIZE, 8, _q4_0, 18),
    "Q4_1": ReadType(4, BLOCK_SIZE, None, _q4_1, 20),
    "Q4_K": ReadType(4, BLOCK_SIZE, None, q4_k, 144, SUPER_BLOCK),
    "Q5_0": ReadType(5, BLOCK_SIZE, 16, _q5_0, 22),
    "Q5_1": ReadType(5, BLOCK_SIZE, None, _q5_1, 24),
    "Q5_K": ReadType(5, BLOCK_SIZE, None, q5_k, 176, SUPER_BLOCK),
    "Q6_K": ReadType(6, 16, 32, q6_k, 210, SUPER_BLOCK),
    "Q8_0": ReadType(8, BLOCK_SIZE, 128, _q8_0, 34),
}
