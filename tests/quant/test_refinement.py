# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Sweeps and refits against slow references that try every level, and solve every group's least squares, by itself."""

from __future__ import annotations

import pytest
import torch

from peft_ext.quant.error_feedback import quantize_calibrated
from peft_ext.quant.refinement import output_change, refit_grid, sweep_codes
from peft_ext.quant.uniform import Grid, dequantize, quantize


FORMATS = [
    (2, 8, False, "int"),
    (3, -1, False, "int"),
    (3, 8, True, "int"),
    (2, 8, False, "float"),
    (4, -1, False, "float"),
]


@pytest.fixture
def layer():
    """A weight and the Hessian of correlated inputs of unequal energy."""
    mixing = torch.randn(80, 80, dtype=torch.float64) * torch.logspace(-1, 1, 80, dtype=torch.float64)
    x = torch.randn(400, 80, dtype=torch.float64) @ mixing
    return torch.randn(6, 80, dtype=torch.float64), x.t() @ x / 400


def start(weight, bits, group_size, sym, zero):
    codes, scale, zero_point = quantize(weight, bits, group_size, sym, zero=zero)
    return codes, Grid(scale, zero_point.to(scale.dtype))


def change(weight, hessian, codes, grid):
    error = weight - dequantize(codes, *grid)
    return torch.einsum("oi,ij,oj->o", error, hessian, error)


def slow_sweep(weight, hessian, codes, grid, bits):
    """Every code of every column in turn: each level is tried, and the whole row's change is computed anew."""
    codes = codes.clone()
    for column in range(weight.shape[1]):
        changes = []
        for level in range(2**bits):
            codes_with = codes.clone()
            codes_with[:, column] = level
            changes.append(change(weight, hessian, codes_with, grid))
        codes[:, column] = torch.stack(changes).argmin(0).to(torch.uint8)
    return codes


@pytest.mark.parametrize("bits, group_size, sym, zero", FORMATS)
def test_a_sweep_takes_the_best_level_of_each_code(layer, bits, group_size, sym, zero):
    codes, grid = start(layer[0], bits, group_size, sym, zero)
    expected = slow_sweep(*layer, codes, grid, bits)
    assert torch.equal(sweep_codes(*layer, codes, grid, bits, zero), expected)
    assert not torch.equal(codes, expected)


def slow_refit(weight, hessian, codes, grid, bits, sym, zero):
    """Row by row, group after group, by least squares on the factored Hessian, for each zero point that may be taken."""
    root, grid = torch.linalg.cholesky(hessian), Grid(grid.scale.clone(), grid.zero_point.clone())
    size = weight.shape[1] // grid.scale.shape[1]
    for row in range(len(weight)):
        for group in range(grid.scale.shape[1]):
            span = slice(group * size, (group + 1) * size)
            own = float(grid.zero_point[row, group])
            value = dequantize(codes, *grid)[row]
            value[span] = 0
            target = ((weight[row] - value) @ root)[:, None]
            basis = torch.zeros(2, weight.shape[1], dtype=weight.dtype)
            basis[0, span], basis[1, span] = codes[row, span].to(weight.dtype), 1
            options = {own}
            if zero == "int" and not sym:
                options |= {min(max(own + step, 0), 2**bits - 1) for step in (-1, 1)}
            elif zero == "float":
                both = torch.linalg.lstsq((basis @ root).t(), target).solution[:, 0]
                options.add(float(-both[1] / both[0]))
            fitted = []
            for option in options:
                one = (basis[:1] - option * basis[1:]) @ root
                found = torch.linalg.lstsq(one.t(), target).solution[0, 0]
                left = float((target[:, 0] - found * one[0]).square().sum())
                if found > 0:
                    fitted.append((left, float(found), option))
            if fitted:  # else every scale that is best is negative, and the group stays as it is
                _, grid.scale[row, group], grid.zero_point[row, group] = min(fitted)
    return grid


@pytest.mark.parametrize("bits, group_size, sym, zero", FORMATS)
def test_a_refit_is_least_squares_on_the_output(layer, bits, group_size, sym, zero):
    codes, grid = start(layer[0], bits, group_size, sym, zero)
    found = refit_grid(*layer, codes, grid, bits, sym, zero)
    expected = slow_refit(*layer, codes, grid, bits, sym, zero)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.zero_point, expected.zero_point, rtol=1e-5, atol=1e-5)
    assert (found.scale > 0).all() and not torch.allclose(found.scale, grid.scale)  # it has moved


@pytest.mark.parametrize("bits, group_size, sym, zero", FORMATS)
def test_no_step_makes_the_change_larger(layer, bits, group_size, sym, zero):
    codes, grid = start(layer[0], bits, group_size, sym, zero)
    changes = [output_change(*layer, codes, grid)]
    for _ in range(3):
        codes = sweep_codes(*layer, codes, grid, bits, zero)
        changes.append(output_change(*layer, codes, grid))
        grid = refit_grid(*layer, codes, grid, bits, sym, zero)
        changes.append(output_change(*layer, codes, grid))
    torch.testing.assert_close(changes[-1], change(*layer, codes, grid))
    assert all((after <= before * (1 + 1e-9)).all() for before, after in zip(changes, changes[1:]))
    assert changes[-1].sum() < 0.9 * changes[0].sum()


@pytest.mark.parametrize("bits, group_size, sym, zero", FORMATS)
def test_calibration_ends_closer_with_sweeps_than_by_error_feedback_alone(layer, bits, group_size, sym, zero):
    weight, hessian = layer
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    found = [
        quantize_calibrated(weight, hessian, bits, group_size, sym, damping=1e-9, zero=zero, sweeps=sweeps)
        for sweeps in (0, 1, 3, 3)
    ]
    changes = [float(change(weight, hessian, one.codes, Grid(*one[1:])).sum()) for one in found]
    assert changes[2] < min(changes[:2])
    assert all(torch.equal(one, other) for one, other in zip(found[2], found[3]))
    assert int(found[2].codes.max()) < 2**bits
    if sym:
        assert (found[2].zero_point == 2 ** (bits - 1)).all()


def test_inputs_that_never_fire_and_rows_of_zeros_keep_finite_weights(layer):
    weight, hessian = layer
    hessian[:, 5] = hessian[5] = 0
    weight[2] = 0
    for zero in ("int", "float"):
        codes, grid = start(weight, 2, 8, False, zero)
        swept = sweep_codes(weight, hessian, codes, grid, 2, zero)
        assert torch.equal(swept[:, 5], codes[:, 5])
        assert torch.isfinite(dequantize(swept, *refit_grid(weight, hessian, swept, grid, 2, False, zero))).all()
        found = quantize_calibrated(weight, hessian, 2, 8, zero=zero)
        assert torch.isfinite(dequantize(*found)).all() and (found.scale > 0).all()
