# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Weights that lie on a lattice are found and come out as they are; others are not taken for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_ext.checkpoint.gguf_blocks import READ_TYPES, from_blocks
from peft_ext.quant.lattice import find_lattice
from peft_ext.quant.uniform import dequantize
from tests.checkpoint.gguf_files import random_blocks


HALVES = (torch.bfloat16, torch.float16)


def released(
    bits: int, size: int, dtype: torch.dtype, stored: torch.dtype = torch.float16, rows: int = 16, columns: int = 256
) -> torch.Tensor:
    """A weight as quantisation-aware training leaves it: symmetric integers times a scale of `stored`'s precision."""
    generator = torch.Generator().manual_seed(bits * size)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator)
    scale = (0.01 * (0.5 + torch.rand(rows, columns // size, 1, generator=generator))).to(stored).float()
    return (codes.view(rows, -1, size) * scale).view(rows, columns).to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits, size", [(2, 256), (3, 64), (4, 32), (4, 256), (5, 32)])
def test_releases_in_half_precision_come_out_bit_for_bit(bits, size, dtype):
    for weight in (released(bits, size, dtype), released(bits, size, dtype).float()):
        found = find_lattice(weight)
        assert (found.bits, found.sym, found.quantized.scale.shape) == (bits, True, (16, 256 // size))
        assert torch.equal(dequantize(*found.quantized).to(dtype), weight.to(dtype))


@pytest.mark.parametrize("name", [name for name in READ_TYPES if name not in ("Q1_0", "TQ1_0", "Q2_0")])
def test_dequantised_ggufs(name):
    kind = READ_TYPES[name]
    weight = dequantize(*from_blocks(random_blocks(np.random.default_rng(1), (6, 512), name), name))
    found = find_lattice(weight)
    assert (found.bits, found.sym) == (kind.bits, kind.zero_point is not None)
    assert found.quantized.scale.shape == (6, 512 // kind.group_size)
    again = dequantize(*found.quantized)
    largest = weight.view(6, -1, kind.group_size).abs().amax(-1, keepdim=True)
    assert ((again - weight).view(6, -1, kind.group_size).abs() <= 2.0**-22 * largest).all()
    if kind.zero_point is not None:
        assert torch.equal(again, weight)


def test_the_format_that_is_asked_for():
    weight = released(3, 64, torch.bfloat16)
    assert find_lattice(weight, bits=2) is None
    assert find_lattice(weight, group_size=128) is None
    assert find_lattice(weight, group_size=-1) is None
    wider = find_lattice(weight, bits=4, group_size=32, sym=False, zero="int")
    assert wider.bits == 4 and not wider.sym and wider.quantized.zero_point.dtype == torch.uint8
    assert torch.equal(dequantize(*wider.quantized).to(torch.bfloat16), weight)
    floats = find_lattice(weight.float(), zero="float", group_size=64)
    assert floats is None or floats.quantized.zero_point.is_floating_point()


def test_codes_that_use_a_part_of_their_range():
    """Min-max would cut the range into 15 steps, which it hasn't."""
    weight = torch.tensor([[0.25, 1.25, 3.25, 4.25] * 8]) * 0.01
    found = find_lattice(weight, zero="float")
    assert found.bits == 3 and torch.equal(found.quantized.codes[0, :4], torch.tensor([0, 1, 3, 4], dtype=torch.uint8))


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
def test_random_weights_lie_on_none(dtype):
    torch.manual_seed(0)
    assert find_lattice((0.02 * torch.randn(32, 256)).to(dtype)) is None
    weight = released(4, 32, torch.float32)
    weight[7, 100] += 0.001  # a single one
    assert find_lattice(weight, bits=4) is None and find_lattice(weight) is None


def test_rows_of_zeros_and_bad_input():
    weight = released(4, 32, torch.bfloat16)
    weight[3] = 0
    weight[5, :32] = 0
    found = find_lattice(weight)
    assert torch.equal(dequantize(*found.quantized).to(torch.bfloat16), weight)
    assert find_lattice(torch.full((4, 32), torch.nan)) is None
    assert find_lattice(torch.zeros(0, 32)) is None
