# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Grids and rounding against slow, obvious references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ext.quant.uniform import SHRINK_FACTORS, UNIFORM_BITS, check_format, dequantize, quantize


def slow_minmax(weight: torch.Tensor, bits: int, group_size: int, sym: bool) -> torch.Tensor:
    """Round-to-nearest, one group at a time; returns the dequantised weight."""
    out_features, in_features = weight.shape
    size = in_features if group_size == -1 else group_size
    result = torch.empty_like(weight)
    for row in range(out_features):
        for start in range(0, in_features, size):
            group = weight[row, start : start + size]
            low, high = min(group.min().item(), 0.0), max(group.max().item(), 0.0)
            top = 2**bits - 1
            scale = (2 * max(-low, high) if sym else high - low) / top or 1.0
            zero_point = 2 ** (bits - 1) if sym else min(max(round(-low / scale), 0), top)
            for column, value in enumerate(group.tolist()):
                code = min(max(round(value / scale) + zero_point, 0), top)
                result[row, start + column] = scale * (code - zero_point)
    return result


def error(weight: torch.Tensor, quantized) -> torch.Tensor:
    return (dequantize(*quantized) - weight).square().sum()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8, 24])
@pytest.mark.parametrize("bits", UNIFORM_BITS)
def test_minmax_is_rounding_to_nearest(bits, group_size, sym):
    weight = torch.randn(7, 24, dtype=torch.float64)
    quantized = quantize(weight, bits, group_size, sym)
    assert int(quantized.codes.max()) < 2**bits
    assert quantized.scale.shape == quantized.zero_point.shape == (7, 1 if group_size in (-1, 24) else 3)
    torch.testing.assert_close(dequantize(*quantized), slow_minmax(weight, bits, group_size, sym))


def q4_1_like():
    """A weight as Q4_1 holds it: codes of 0 to 15, with float16 scales and minimums for 32 of them."""
    codes = torch.randint(0, 16, (24, 4, 32))
    codes[..., 0], codes[..., 1] = 0, 15  # llama.cpp's scale is the range over 15
    scale, minimum = (torch.rand(24, 4) * 0.01 + 1e-3).half(), (-torch.rand(24, 4) * 0.1).half()
    weight = codes * scale.float()[..., None] + minimum.float()[..., None]
    return weight.view(24, -1), codes.view(24, -1)


def test_float_zero_points_represent_a_q4_1_weight():
    """Integers don't. What is left is the rounding of float32, in the weight itself, the division, the difference and the
    product: four times half a unit in the last place of the largest number that takes part."""
    weight, codes = q4_1_like()
    whole, exact = (quantize(weight, 4, 32, zero=zero) for zero in ("int", "float"))
    assert torch.equal(exact.codes.long(), codes)
    assert exact.zero_point.dtype == torch.float32 and whole.zero_point.dtype == torch.uint8
    largest = weight.view(24, 4, 32).abs().amax(-1).repeat_interleave(32, 1)
    assert ((dequantize(*exact) - weight).abs() <= 4 * 2**-24 * largest).all()
    assert (dequantize(*whole) - weight).abs().max() > 0.2 * whole.scale.max()


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("bits", UNIFORM_BITS)
def test_a_constant_group_is_exact_with_float_zero_points(bits, method):
    constants = torch.tensor([0.37, -2.5, 0.0, 1e-30, -1e-42, 3e4])
    weight = constants[:, None].expand(6, 16).contiguous()
    quantized = quantize(weight, bits, 8, method=method, zero="float")
    assert torch.equal(dequantize(*quantized), weight)
    assert not quantized.codes.any() and (quantized.scale == 1).all()


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("bits", UNIFORM_BITS)
def test_float_zero_points_cost_at_most_half_a_step(bits, group_size):
    weight = torch.randn(16, 64, dtype=torch.float64) + torch.randn(16, 1, dtype=torch.float64)
    quantized = quantize(weight, bits, group_size, zero="float")
    step = quantized.scale.repeat_interleave(64 // quantized.scale.shape[1], 1)
    assert ((dequantize(*quantized) - weight).abs() <= 0.5 * step * (1 + 1e-9)).all()
    assert error(weight, quantize(weight, bits, group_size, method="mse", zero="float")) <= error(weight, quantized)


def test_float_zero_points_and_symmetry_exclude_each_other():
    with pytest.raises(ValueError, match="sym=True.*zero='float'"):
        quantize(torch.randn(2, 8), 4, sym=True, zero="float")
    with pytest.raises(ValueError, match="zero='bfloat16' is unknown; choose one of"):
        quantize(torch.randn(2, 8), 4, zero="bfloat16")


@pytest.mark.parametrize("sym", [False, True])
def test_rounding_error_is_at_most_half_a_step(sym):
    weight = torch.randn(16, 64)
    quantized = quantize(weight, 4, 32, sym)
    gap = (dequantize(*quantized) - weight).abs().view(16, 2, 32)
    # the zero point is rounded too, so the far end of an asymmetric range may be off by a whole step
    assert (gap <= quantized.scale[..., None] * 1.001).all()
    assert (gap <= quantized.scale[..., None] * 0.501).float().mean() > 0.9


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_is_the_best_of_its_range_factors(bits):
    weight = torch.randn(5, 48, dtype=torch.float64)
    searched = quantize(weight, bits, method="mse")
    for row in range(5):
        low, high = weight[row].min().item(), weight[row].max().item()
        errors = []
        for factor in SHRINK_FACTORS:
            scale = (high - low) * factor / (2**bits - 1)
            zero_point = min(max(round(-low * factor / scale), 0), 2**bits - 1)
            codes = ((weight[row] / scale).round() + zero_point).clamp(0, 2**bits - 1)
            errors.append(((codes - zero_point) * scale - weight[row]).square().sum().item())
        found = (dequantize(*searched)[row] - weight[row]).square().sum().item()
        assert found == pytest.approx(min(errors), rel=1e-9)


def test_more_bits_and_smaller_groups_are_closer():
    weight = torch.randn(32, 128)
    by_bits = [error(weight, quantize(weight, bits)) for bits in (2, 3, 4, 8)]
    by_group = [error(weight, quantize(weight, 3, size)) for size in (-1, 64, 32)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_group == sorted(by_group, reverse=True)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), bits=st.sampled_from(UNIFORM_BITS), sym=st.booleans())
def test_rounding_again_changes_nothing(seed, bits, sym):
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first = quantize(weight, bits, 16, sym)
    again = (dequantize(*first).view(4, 2, 16) / first.scale[..., None]).round() + first.zero_point[..., None]
    assert torch.equal(again.view(4, 32).to(torch.uint8), first.codes)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_deterministic_whatever_the_threads(method):
    weight = torch.randn(96, 64)
    first = quantize(weight, 3, 32, method=method)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    second = quantize(weight.t().contiguous().t(), 3, 32, method=method)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_rows_of_zeros_and_constants_survive():
    weight = torch.stack([torch.zeros(8), torch.full((8,), 2.0), torch.full((8,), -3.0)])
    for method in ("minmax", "mse"):
        torch.testing.assert_close(dequantize(*quantize(weight, 2, method=method)), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_get_float32_scales(dtype):
    quantized = quantize(torch.randn(4, 8).to(dtype), 4)
    assert quantized.scale.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_nan_and_infinity(value):
    weight = torch.randn(4, 8)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight, 4)


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 16, True, 4.5, None])
def test_refuses_widths(bits):
    with pytest.raises(ValueError, match="bits="):
        check_format(bits, -1)


@pytest.mark.parametrize("group_size", [0, -2, 1.5, "64"])
def test_refuses_group_sizes(group_size):
    with pytest.raises(ValueError, match="group_size="):
        check_format(4, group_size)


def test_names_group_sizes_that_divide():
    with pytest.raises(ValueError, match=r"group_size=128 does not divide in_features=576.*\[32, 64, 96, 192\]"):
        check_format(4, 128, 576)


def test_refuses_unknown_methods():
    with pytest.raises(ValueError, match="'gptq'"):
        quantize(torch.randn(2, 4), 4, method="gptq")
