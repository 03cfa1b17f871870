# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Packing is a bijection of the documented layout, and takes the bits that it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ext.quant.packing import SUPPORTED_BITS, TILE_ROWS, pack, planes_shape, unpack, unpack_signs


def slow_bit(planes: torch.Tensor, row: int, column: int, plane: int) -> int:
    """The layout as packing.py's docstring puts it, one bit at a time."""
    tile, inside = divmod(row, TILE_ROWS)
    position = 2 * inside if inside < 16 else 2 * (inside - 16) + 1
    byte = int(planes[tile, column // 8, plane, position])
    return byte >> (column % 8) & 1


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(SUPPORTED_BITS),
    rows=st.integers(1, 70),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_unpack_undoes_pack(bits, rows, columns, seed):
    codes = torch.randint(
        0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    planes = pack(codes, bits)
    assert planes.shape == planes_shape(rows, columns, bits)
    assert torch.equal(unpack(planes, rows, columns), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_layout_bit_by_bit(bits):
    codes = torch.randint(0, 2**bits, (37, 19), dtype=torch.uint8)
    planes = pack(codes, bits)
    for row in range(37):
        for column in range(19):
            value = sum(slow_bit(planes, row, column, plane) << plane for plane in range(bits))
            assert value == codes[row, column]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_takes_exactly_its_bits(bits):
    codes = torch.zeros(64, 576, dtype=torch.uint8)
    assert pack(codes, bits).nbytes * 8 == codes.numel() * bits


def test_padding_is_zero():
    planes = pack(torch.full((1, 1), 7, dtype=torch.uint8), 3)
    assert planes.sum() == 3  # one bit in each of three planes


def test_unpacks_on_the_meta_device():
    planes = torch.empty(planes_shape(40, 24, 3), dtype=torch.uint8, device="meta")
    assert unpack(planes, 40, 24).shape == (40, 24)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_refuses_widths(bits):
    with pytest.raises(ValueError, match=f"bits={bits}"):
        pack(torch.zeros(2, 2, dtype=torch.uint8), bits)


def test_refuses_other_dtypes_and_shapes():
    with pytest.raises(TypeError, match="int64"):
        pack(torch.zeros(2, 2, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match=r"\(2, 2, 2\)"):
        pack(torch.zeros(2, 2, 2, dtype=torch.uint8), 3)


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 20), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_signs_are_the_bits(bits, rows, inputs, seed):
    codes = torch.randint(0, 2**bits, (rows, inputs), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    signs = unpack_signs(pack(codes, bits), rows, inputs, torch.float32)
    assert signs.shape == (bits, rows, inputs)
    for plane in range(bits):
        assert torch.equal(signs[plane] > 0, (codes >> plane) & 1 == 1)
    assert torch.equal(signs.abs(), torch.ones_like(signs))


def test_a_large_weight_is_packed_in_parts_that_fit_together():
    codes = torch.randint(8, (2 * 32 * 1024 + 7, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    planes = pack(codes, 3)
    assert planes.shape == (2 * 1024 + 1, 5, 3, 32)
    assert torch.equal(unpack(planes, *codes.shape), codes)
