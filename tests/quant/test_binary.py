# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Binary coding against slow and obvious references: greedy by loops, the best alphas and codes by exhaustion."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ext.quant.binary import (
    dequantize_binary,
    levels_of,
    nearest_codes,
    quantize_binary,
)


def signs_of(codes: torch.Tensor, plane: int) -> torch.Tensor:
    return ((codes >> plane) & 1).double() * 2 - 1


def squared_error(weight, coded, input_weight=None):
    squared = (dequantize_binary(coded.codes, coded.alpha) - weight).double().square()
    return (squared if input_weight is None else squared * input_weight).sum()


def greedy_by_loops(row: torch.Tensor, bits: int) -> tuple[list[float], list[list[int]]]:
    left, alphas, planes = row.tolist(), [], []
    for _ in range(bits):
        plane = [1 if value >= 0 else -1 for value in left]
        alphas.append(sum(abs(value) for value in left) / len(left))
        left = [value - alphas[-1] * sign for value, sign in zip(left, plane)]
        planes.append(plane)
    return alphas, planes


def best_by_exhaustion(row: torch.Tensor, bits: int) -> float:
    """Least squared error over all choices of sign planes, with least-squares alphas for each."""
    vectors = itertools.product((-1.0, 1.0), repeat=len(row))
    basis = torch.tensor(list(itertools.combinations(vectors, bits)), dtype=row.dtype).mT
    fitted = basis @ torch.linalg.lstsq(basis, row[None, :, None].expand(len(basis), -1, 1), driver="gelsd").solution
    return (fitted[..., 0] - row).square().sum(-1).min().item()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_greedy(bits, group_size):
    weight = torch.randn(5, 24, dtype=torch.float64)
    coded = quantize_binary(weight, bits, group_size, "greedy")
    for row, alphas, codes in zip(
        weight.view(-1, 24 if group_size == -1 else 8),
        coded.alpha.view(-1, bits),
        coded.codes.view(-1, 24 if group_size == -1 else 8),
    ):
        expected_alphas, expected_planes = greedy_by_loops(row, bits)
        torch.testing.assert_close(alphas, torch.tensor(expected_alphas, dtype=torch.float64))
        for plane in range(bits):
            assert signs_of(codes, plane).tolist() == expected_planes[plane]


@pytest.mark.parametrize("bits, rows", [(1, 6), (2, 6), (3, 2)])
def test_alternating_comes_close_to_the_best_there_is(bits, rows):
    weight = torch.randn(rows, 6, dtype=torch.float64)
    coded = quantize_binary(weight, bits)
    found = (dequantize_binary(*coded) - weight).square().sum(1)
    best = torch.tensor([best_by_exhaustion(row, bits) for row in weight], dtype=torch.float64)
    assert (found >= best - 1e-9).all()
    assert found.mean() <= 1.6 * best.mean() + 1e-9
    if bits == 1:
        torch.testing.assert_close(found, best)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_the_error_never_rises(group_size, weighted):
    weight = torch.randn(32, 64) * torch.rand(32, 64).exp()
    input_weight = torch.rand(64) * 4 if weighted else None
    by_bits = []
    for bits in (1, 2, 3, 4):
        errors = [
            squared_error(
                weight, quantize_binary(weight, bits, group_size, "alternating", rounds, input_weight), input_weight
            )
            for rounds in range(6)
        ]
        assert all(after <= before for before, after in zip(errors, errors[1:]))
        assert bits == 1 or errors[-1] < errors[0]
        by_bits.append(errors[-1])
    assert all(more < less for less, more in zip(by_bits, by_bits[1:]))


def test_at_the_end_codes_are_nearest_and_alphas_are_best():
    weight = torch.randn(8, 40, dtype=torch.float64)
    codes, alpha = quantize_binary(weight, 3, rounds=200)
    assert torch.equal(nearest_codes(weight[:, None], alpha)[:, 0], codes)
    for row in range(8):
        basis = torch.stack([signs_of(codes[row], plane) for plane in range(3)], -1)
        best = torch.linalg.lstsq(basis, weight[row, :, None]).solution[:, 0]
        torch.testing.assert_close(alpha[row, 0], best, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3, 8]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_codes_stand_for_their_values(bits, rows, groups, size, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, groups * size), generator=generator).to(torch.uint8)
    alpha = torch.randn(rows, groups, bits, generator=generator, dtype=torch.float64)
    expected = torch.zeros(rows, groups * size, dtype=torch.float64)
    for row, column, plane in itertools.product(range(rows), range(groups * size), range(bits)):
        sign = 1 if int(codes[row, column]) >> plane & 1 else -1
        expected[row, column] += sign * alpha[row, column // size, plane]
    torch.testing.assert_close(dequantize_binary(codes, alpha), expected)
    # every level is its own nearest one
    values = levels_of(alpha).gather(-1, codes.view(rows, groups, size).long())
    nearest = nearest_codes(values, alpha)
    torch.testing.assert_close(levels_of(alpha).gather(-1, nearest.long()), values)


@pytest.mark.parametrize("weight", [torch.zeros(3, 8), torch.ones(3, 8), torch.tensor([[0.0] * 7 + [1e30]] * 3)])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rows_with_little_in_them(weight, bits):
    coded = quantize_binary(weight, bits)
    assert torch.isfinite(coded.alpha).all()
    if weight.unique().numel() == 1:
        torch.testing.assert_close(dequantize_binary(*coded), weight, rtol=1e-3, atol=1e-6)


def test_same_input_same_codes():
    weight = torch.randn(40, 64)
    for one, other in zip(quantize_binary(weight, 3, 16), quantize_binary(weight.clone(), 3, 16)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", [0, 5, 9, True, 2.5])
def test_bits(bits):
    with pytest.raises(ValueError, match=f"bits={bits}.*1, 2, 3, 4, 8"):
        quantize_binary(torch.randn(4, 8), bits)


def test_bad_arguments():
    with pytest.raises(ValueError, match="method='best'.*greedy"):
        quantize_binary(torch.randn(4, 8), 2, method="best")
    with pytest.raises(ValueError, match="group_size=3 does not divide in_features=8"):
        quantize_binary(torch.randn(4, 8), 2, 3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_binary(torch.full((4, 8), float("nan")), 2)
