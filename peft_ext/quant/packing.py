# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Codes to bit-planes and back: b-bit integers take b bits, in the order in which the CPU kernel reads them.

Bit `p` of every code forms plane `p`. One byte holds the same bit of 8 neighbouring inputs of one output row (bit `i`
of the byte is input `8 j + i`); 32 rows make a tile, and a tile's bytes are ordered `[input byte, plane, row]`, so
that a kernel streams through them with aligned 32-byte loads. Inside a tile, byte `2 i` belongs to row `i` and byte
`2 i + 1` to row `16 + i`: even and odd bytes then widen to 16 bits without a shuffle.
"""

from __future__ import annotations

import functools
import math

import torch


TILE_ROWS = 32
_CODES_AT_ONCE = 1 << 20
SUPPORTED_BITS = (1, 2, 3, 4, 5, 6, 7, 8)


def planes_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int, int, int]:
    """Shape of the packed planes of an `[out_features, in_features]` weight: `[tiles, input bytes, bits, 32]`."""
    return math.ceil(out_features / TILE_ROWS), math.ceil(in_features / 8), bits, TILE_ROWS


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes into bit-planes.

    Args:
        codes: uint8 `[out_features, in_features]`, every value below `2**bits`.
        bits: Width of a code, 1 to 8.

    Returns:
        uint8 `[ceil(out_features / 32), ceil(in_features / 8), bits, 32]`; what pads rows and inputs is zero.

    Raises:
        ValueError: If `bits` or the shape of `codes` is out of range.
        TypeError: If `codes` is not uint8.
    """
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"bits={bits} can't be packed; choose one of {SUPPORTED_BITS}.")
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes have dtype {codes.dtype}; pass uint8 codes.")
    if codes.dim() != 2:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; pass a matrix [out_features, in_features].")
    out_features, in_features = codes.shape
    rows = max(1, _CODES_AT_ONCE // (TILE_ROWS * max(1, in_features))) * TILE_ROWS
    if out_features > rows:  # a large weight in parts: each plane is as large as the codes
        return torch.cat([pack(part, bits) for part in codes.split(rows)])
    tiles, input_bytes, _, _ = planes_shape(out_features, in_features, bits)
    padding = (0, input_bytes * 8 - in_features, 0, tiles * TILE_ROWS - out_features)
    codes = torch.nn.functional.pad(codes, padding).view(tiles, 2, TILE_ROWS // 2, input_bytes, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [
        # the sum is at most 255, so uint8 holds it
        (((codes >> plane) & 1) << shifts).sum(-1, dtype=torch.uint8)
        for plane in range(bits)
    ]
    # [bits, tiles, half, row, byte] -> [tiles, byte, bits, row, half]
    return torch.stack(planes).permute(1, 4, 0, 3, 2).reshape(tiles, input_bytes, bits, TILE_ROWS).contiguous()


def unpack(planes: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """Undo [`pack`].

    Args:
        planes: uint8 `[tiles, input bytes, bits, 32]`.
        out_features: Rows of the weight, at most `32 * tiles`.
        in_features: Inputs of the weight, at most `8 * input bytes`.

    Returns:
        uint8 codes `[out_features, in_features]` (a view of a padded matrix where the sizes aren't multiples of 32
        and 8).
    """
    tiles, input_bytes, bits, _ = planes.shape
    # [bits, tiles, half, row, byte]: the last three in the order of the weight's rows and inputs
    ordered = planes.view(tiles, input_bytes, bits, TILE_ROWS // 2, 2).permute(2, 0, 4, 3, 1)
    codes = _gather(ordered, 0)
    for first in range(2, bits, 2):
        codes.add_(_gather(ordered, first))
    return codes.view(torch.uint8).view(tiles * TILE_ROWS, input_bytes * 8)[:out_features, :in_features]


def unpack_rows(planes: torch.Tensor, rows: torch.Tensor, in_features: int) -> torch.Tensor:
    """Some rows of what [`unpack`] gives, without unpacking the others.

    Args:
        planes, in_features: As in [`unpack`].
        rows: int64 `[n]`, each a row of the weight.

    Returns:
        uint8 codes `[n, in_features]`.
    """
    input_bytes, bits = planes.shape[1:3]
    inside = rows % TILE_ROWS
    place = inside % (TILE_ROWS // 2) * 2 + inside // (TILE_ROWS // 2)
    ordered = planes[rows // TILE_ROWS, :, :, place].permute(2, 0, 1)  # [bits, n, input bytes]
    codes = _gather(ordered, 0)
    for first in range(2, bits, 2):
        codes = codes + _gather(ordered, first)
    return codes.view(torch.uint8).view(len(rows), input_bytes * 8)[:, :in_features]


def unpack_signs(planes: torch.Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The planes as signs `[bits, out_features, in_features]`: +1 where a bit is set, else -1.

    Args:
        planes, out_features, in_features: As in [`unpack`].
        dtype: Float type of the signs.
    """
    tiles, input_bytes, bits, _ = planes.shape
    ordered = planes.view(tiles, input_bytes, bits, TILE_ROWS // 2, 2).permute(2, 0, 4, 3, 1)
    table = _sign_table if torch.compiler.is_compiling() else _cached_sign_table
    signs = table(dtype, planes.device).index_select(0, ordered.reshape(-1).to(torch.int32))
    return signs.view(bits, tiles * TILE_ROWS, input_bytes * 8)[:, :out_features, :in_features]


def _sign_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The signs of the eight bits of every byte, `[256, 8]`."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return bits.to(dtype) * 2 - 1


def _gather(ordered: torch.Tensor, first: int) -> torch.Tensor:
    """What plane `first` (and the next one, where there is one) adds to the codes; 8 codes to an int64."""
    pair = first + 1 < ordered.shape[0]
    index = ordered[first].to(torch.int32)
    if pair:
        index = index | (ordered[first + 1].to(torch.int32) << 8)
    # a compiler makes its own constant of the table; what it traces must not land in the cache
    table = _spread_table if torch.compiler.is_compiling() else _cached_spread_table
    return table(first, pair, ordered.device).index_select(0, index.reshape(-1))


def _spread_table(first: int, pair: bool, device: torch.device) -> torch.Tensor:
    """Eight codes' bits `first` (and `first + 1`) for every value of one plane byte (two), as int64 = 8 bytes.

    A gather of 8 codes at a time is several times faster than shifting bits one by one, and needs only ops that every
    device has.
    """
    byte = torch.arange(256, device=device)
    bits = ((byte[:, None] >> torch.arange(8, device=device)) & 1).to(torch.uint8)
    single = (bits << first).contiguous().view(torch.int64).reshape(256)
    if not pair:
        return single
    upper = (bits << (first + 1)).contiguous().view(torch.int64).reshape(256)
    return (upper[:, None] + single[None, :]).reshape(-1)


_cached_spread_table = functools.lru_cache(maxsize=64)(_spread_table)
_cached_sign_table = functools.lru_cache(maxsize=16)(_sign_table)
