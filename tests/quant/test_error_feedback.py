# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Error feedback against GPTQ's textbook form, and what it is for: less error of the layer's output."""

from __future__ import annotations

import pytest
import torch

from peft_ext.quant import error_feedback as feedback
from peft_ext.quant.binary import BINARY_METHODS, dequantize_binary, levels_of, quantize_binary
from peft_ext.quant.error_feedback import (
    binary_rounding,
    error_feedback,
    follow_shift,
    quantize_binary_calibrated,
    quantize_calibrated,
    refit_alphas,
    uniform_rounding,
)
from peft_ext.quant.uniform import Grid, dequantize, quantize, search_grid


@pytest.fixture
def layer():
    """A weight and the Hessian of correlated inputs of unequal energy."""
    mixing = torch.randn(32, 32, dtype=torch.float64) * torch.logspace(-1, 1, 32, dtype=torch.float64)
    x = torch.randn(400, 32, dtype=torch.float64) @ mixing
    return torch.randn(12, 32, dtype=torch.float64), x.t() @ x / 400


def output_error(weight, hessian, quantized):
    gap = dequantize(*quantized) - weight
    return ((gap @ hessian) * gap).sum()


def textbook(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, bits: int, damping: float) -> torch.Tensor:
    """Optimal brain quantisation, column by column: the inverse Hessian of the columns left is computed anew each
    time."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    hessian = hessian + torch.eye(len(order), dtype=hessian.dtype) * damping * hessian.diagonal().mean()
    weight, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8)
    size = weight.shape[1] // grid.scale.shape[1]
    for position, column in enumerate(order):
        left = order[position:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        scale, zero_point = grid.scale[:, column // size], grid.zero_point[:, column // size]
        code = ((weight[:, column] / scale).round() + zero_point).clamp(0, 2**bits - 1)
        codes[:, column] = code.to(torch.uint8)
        gap = (weight[:, column] - (code - zero_point) * scale) / inverse[0, 0]
        weight[:, left] -= gap[:, None] * inverse[0][None, :]
    return codes


@pytest.mark.parametrize("block_size", [1, 5, 64])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_is_gptq(layer, group_size, block_size):
    weight, hessian = layer
    grid = search_grid(weight, 3, group_size, False)
    codes = error_feedback(weight, hessian, uniform_rounding(grid, 3, 32), 0.01, block_size)
    assert torch.equal(codes, textbook(weight, hessian, grid, 3, 0.01))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_falls(layer, bits, sym):
    weight, hessian = layer
    rounded = [quantize(weight, bits, -1, sym, method) for method in ("minmax", "mse")]
    calibrated = quantize_calibrated(weight, hessian, bits, -1, sym)
    assert output_error(weight, hessian, calibrated) < 0.7 * min(
        output_error(weight, hessian, quantized) for quantized in rounded
    )


@pytest.mark.parametrize("group_size", [-1, 8])
def test_output_error_falls_with_float_zero_points(layer, group_size):
    weight, hessian = layer
    weight = weight + torch.randn(12, 1, dtype=torch.float64)  # ranges beside zero, too
    rounded = quantize(weight, 3, group_size, zero="float")
    calibrated = quantize_calibrated(weight, hessian, 3, group_size, zero="float")
    assert output_error(weight, hessian, calibrated) < 0.7 * output_error(weight, hessian, rounded)
    assert calibrated.zero_point.is_floating_point() and calibrated.zero_point.frac().any()
    whole = quantize_calibrated(weight, hessian, 3, group_size)
    assert output_error(weight, hessian, calibrated) < output_error(weight, hessian, whole)


def test_deterministic(layer):
    first, second = (quantize_calibrated(*layer, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_inputs_that_never_fire(layer):
    weight, hessian = layer
    hessian[:, 5] = hessian[5] = 0
    quantized = quantize_calibrated(weight, hessian, 4)
    assert torch.isfinite(dequantize(*quantized)).all()
    nothing = quantize_calibrated(weight, torch.zeros_like(hessian), 4)
    assert output_error(weight, torch.eye(32, dtype=torch.float64), nothing) < weight.square().sum() * 0.05


def test_fewer_samples_than_inputs(layer):
    weight, _ = layer
    x = torch.randn(3, 32, dtype=torch.float64)
    assert torch.isfinite(dequantize(*quantize_calibrated(weight, x.t() @ x, 3))).all()


def test_refuses_bad_hessians(layer):
    weight, hessian = layer
    with pytest.raises(ValueError, match=r"\(31, 31\)"):
        quantize_calibrated(weight, hessian[:31, :31], 3)
    hessian[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_calibrated(weight, hessian, 3)


def textbook_binary(weight: torch.Tensor, hessian: torch.Tensor, alpha: torch.Tensor, damping: float) -> torch.Tensor:
    """[`textbook`] with the nearest of every row's own levels, by comparing with all of them."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    hessian = hessian + torch.eye(len(order), dtype=hessian.dtype) * damping * hessian.diagonal().mean()
    weight, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8)
    size, levels = weight.shape[1] // alpha.shape[1], levels_of(alpha)
    for position, column in enumerate(order):
        left = order[position:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        own = levels[:, column // size]
        codes[:, column] = (own - weight[:, column, None]).abs().argmin(-1).to(torch.uint8)
        value = own.gather(-1, codes[:, column, None].long())[:, 0]
        weight[:, left] -= ((weight[:, column] - value) / inverse[0, 0])[:, None] * inverse[0][None, :]
    return codes


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_binary_feedback_is_gptq_onto_the_levels(layer, bits, group_size):
    weight, hessian = layer
    alpha = quantize_binary(weight, bits, group_size).alpha
    codes = error_feedback(weight, hessian, binary_rounding(alpha, 32), 0.01)
    assert torch.equal(codes, textbook_binary(weight, hessian, alpha, 0.01))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_calibrated_binary_codes_change_the_output_least(layer, bits):
    weight, hessian = layer

    def gap(coded):
        error = dequantize_binary(*coded) - weight
        return ((error @ hessian) * error).sum()

    found = quantize_binary_calibrated(weight, hessian, bits)
    assert gap(found) < 0.7 * min(gap(quantize_binary(weight, bits, -1, name)) for name in BINARY_METHODS)
    again = quantize_binary_calibrated(weight, hessian, bits)
    assert torch.equal(found.codes, again.codes) and torch.equal(found.alpha, again.alpha)
    nan = torch.full_like(hessian, float("nan"))
    with pytest.raises(ValueError, match="calibration inputs have NaN"):
        quantize_binary_calibrated(weight, nan, bits)


def best_alphas(weight, hessian, codes, alpha, damping):
    """Row by row, group after group: least squares on the factored Hessian with the other groups as they are."""
    damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype) * damping * hessian.diagonal().mean()
    root = torch.linalg.cholesky(damped)  # error^T H error = |error root|^2
    alpha, (_, groups, bits) = alpha.clone(), alpha.shape
    size = weight.shape[1] // groups
    for index, (row, code) in enumerate(zip(weight, codes)):
        basis = torch.zeros(groups, bits, len(row), dtype=weight.dtype)
        for group in range(groups):
            for plane in range(bits):
                inside = slice(group * size, (group + 1) * size)
                basis[group, plane, inside] = ((code[inside] >> plane) & 1).to(weight.dtype) * 2 - 1
        for group in range(groups):
            others = sum(alpha[index, g] @ basis[g] for g in range(groups) if g != group)
            target = ((row - others) @ root)[:, None]
            alpha[index, group] = torch.linalg.lstsq((basis[group] @ root).t(), target).solution[:, 0]
    return alpha.abs().sort(-1, descending=True).values


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_refitted_alphas_are_least_squares_on_the_output(layer, group_size, bits):
    weight, hessian = layer
    codes, alpha = quantize_binary(weight, bits, group_size)
    expected = best_alphas(weight, hessian, codes, alpha, 0.01)
    torch.testing.assert_close(refit_alphas(weight, hessian, codes, alpha, 0.01), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("bits", [2, 3])
def test_refits_bring_the_output_closer(layer, bits, group_size, monkeypatch):
    weight, hessian = layer
    gaps = []
    for refits in (0, 2):
        monkeypatch.setattr(feedback, "_REFITS", refits)
        error = dequantize_binary(*quantize_binary_calibrated(weight, hessian, bits, group_size)) - weight
        gaps.append(((error @ hessian) * error).sum())
    assert gaps[1] < gaps[0]


@pytest.fixture
def shifted():
    """A weight, the inputs that it would get in the float model, and those that do arrive."""
    x_float = torch.randn(400, 32, dtype=torch.float64) @ torch.randn(32, 32, dtype=torch.float64)
    arrived = x_float @ (torch.eye(32) + 0.1 * torch.randn(32, 32)).double() + 0.1 * torch.randn_like(x_float)
    return torch.randn(12, 32, dtype=torch.float64), x_float, arrived


def test_following_a_shift_all_the_way_is_least_squares(shifted):
    weight, x_float, x = shifted
    found = follow_shift(weight, x.t() @ x, (x_float - x).t() @ x, share=1.0, damping=0.0)
    expected = torch.linalg.lstsq(x, x_float @ weight.t()).solution.t()
    torch.testing.assert_close(found, expected)


def test_a_shift_is_made_up_for(shifted):
    weight, x_float, x = shifted
    hessian, shift = x.t() @ x, (x_float - x).t() @ x

    def gap(quantized):
        return (x @ dequantize(*quantized).t() - x_float @ weight.t()).square().sum()

    assert gap(quantize_calibrated(weight, hessian, 4, shift=shift)) < 0.7 * gap(
        quantize_calibrated(weight, hessian, 4)
    )


def test_without_a_shift_nothing_is_followed(layer):
    weight, hessian = layer
    plain = quantize_calibrated(weight, hessian, 3)
    for one, other in zip(plain, quantize_calibrated(weight, hessian, 3, shift=torch.zeros_like(hessian))):
        assert torch.equal(one, other)


def test_a_shift_with_nan_is_refused(layer):
    weight, hessian = layer
    with pytest.raises(ValueError, match="calibration inputs have NaN"):
        quantize_calibrated(weight, hessian, 3, shift=torch.full_like(hessian, float("nan")))
