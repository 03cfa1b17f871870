# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Resonance, scope and their gradients against the equations, element by element."""

from __future__ import annotations

import math

import pytest
import torch

from generation_ext.granularity.masks import (
    EARLIER_FLOOR,
    MODES,
    STEEPEST,
    check_mode,
    granularity_bias,
    granularity_mask,
)


N = 9


def reference(zq, zk, distances, mode):
    """The paper's equations 6 and 8, one element at a time."""
    rows = []
    for i, a in enumerate(zq):
        row = []
        for j, b in enumerate(zk):
            c = (1 - a) * max(0.0, 1 - (a + b)) + a * min(1.0, 1 - a + b)
            if distances is None:
                row.append(c)
                continue
            s = max(0.0, min(1.0, (N - 2) ** (1 - a) + 2 - distances[i][j]))
            row.append({"R": c, "S": s, "R*S": c * s, "R+S": 0.5 * c + 0.5 * s}[mode])
        rows.append(row)
    return rows


def random_case(seed, dtype=torch.float64, q=4, k=6):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.rand(3, q, generator=generator, dtype=dtype)
    keys = torch.rand(3, k, generator=generator, dtype=dtype)
    distances = (torch.arange(k - q, k)[:, None] - torch.arange(k)).abs()
    return queries, keys, distances


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cross", [False, True])
def test_equals_the_equations(mode, cross):
    queries, keys, distances = random_case(1)
    distances = None if cross else distances
    found = granularity_mask(queries, keys, distances, mode, N)
    for row in range(3):
        expected = reference(queries[row].tolist(), keys[row].tolist(), None if cross else distances.tolist(), mode)
        torch.testing.assert_close(found[row], torch.tensor(expected, dtype=torch.float64))
    assert found.min() >= 0 and found.max() <= 1
    bias = granularity_bias(queries, keys, distances, mode, N)
    torch.testing.assert_close(bias, torch.where(found > 0, found.log(), torch.finfo(found.dtype).min))
    floored = granularity_bias(queries, keys, distances, mode, N, floor=EARLIER_FLOOR)
    torch.testing.assert_close(floored, found.clamp(min=EARLIER_FLOOR).log())


@pytest.mark.parametrize("mode", MODES)
def test_all_template_words_is_plain_attention(mode):
    zeros = torch.zeros(2, N)
    distances = (torch.arange(N)[:, None] - torch.arange(N)).abs()
    assert (granularity_bias(zeros, zeros, distances, mode, N) == 0).all()


def test_corners():
    distances = (torch.arange(N)[:, None] - torch.arange(N)).abs()
    for a in (0.0, 1.0):
        for b in (0.0, 1.0):
            alike = granularity_mask(torch.full((1, N), a), torch.full((1, N), b), None, "R", N)
            assert (alike == float(a == b)).all()
    band = granularity_mask(torch.ones(1, N), torch.ones(1, N), distances, "S", N)[0]
    assert (band == (distances <= 2).float()).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_gradients(mode, cross, seed):
    queries, keys, distances = random_case(seed)
    queries.requires_grad_(), keys.requires_grad_()
    distances = None if cross else distances

    def bias(queries, keys):
        return granularity_bias(queries, keys, distances, mode, N)

    assert torch.autograd.gradcheck(bias, (queries, keys), eps=1e-7, atol=1e-5)
    weights = torch.randn(3, 4, 6, dtype=torch.float64)
    ours = torch.autograd.grad((bias(queries, keys) * weights).sum(), (queries, keys), allow_unused=True)
    plain = granularity_mask(queries, keys, distances, mode, N).clamp(min=STEEPEST).log()
    theirs = torch.autograd.grad((plain * weights).sum(), (queries, keys), allow_unused=True)
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, torch.zeros_like(one) if two is None else two)


@pytest.mark.parametrize("mode", ["R", "R*S", "R+S"])
def test_plain_attention_has_a_way_out(mode):
    """At z = 0 everywhere, where a converted model starts, gradients flow."""
    queries, keys, distances = random_case(0)
    queries, keys = (torch.zeros_like(each).requires_grad_() for each in (queries, keys))
    granularity_bias(queries, keys, distances, mode, N).sum().backward()
    assert (queries.grad < 0).all() and (keys.grad < 0).all()


def test_a_leak_leads_out_of_a_saturated_scope():
    """By hand: N = 9, one query, window 7^(1 - z) + 2; keys inside ask to shrink it, keys outside to widen it."""
    keys = torch.zeros(1, 3)
    for z, distances, asks in ((0.0, [0.0, 3.0, 6.0], 1.0), (1.0, [5.0, 6.0, 9.0], -1.0)):
        for sign in (asks, -asks):
            queries = torch.full((1, 1), z, requires_grad=True)
            bias = granularity_bias(queries, keys, torch.tensor([distances]), "S", N, leak=0.5)
            (bias * sign).sum().backward()
            window = 7 ** (1 - z) + 2
            edge = [abs(window - d - (z == 0)) for d in distances]
            floor = 1.0 if z == 0 else STEEPEST
            expected = sum(0.5 / (1 + e) for e in edge) * sign * -math.log(7) * 7 ** (1 - z) / floor
            torch.testing.assert_close(queries.grad.item(), expected if sign == asks else 0.0, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("learns", [True, False])
def test_logarithms_are_finite(dtype, learns):
    ones = torch.ones(1, N, dtype=dtype, requires_grad=learns)
    zeros = torch.zeros(1, N, dtype=dtype)
    bias = granularity_bias(ones, zeros, None, "R", N)
    assert bias.dtype == dtype and (bias == torch.finfo(dtype).min).all()
    earlier = granularity_bias(ones, zeros, None, "R", N, floor=EARLIER_FLOOR)
    torch.testing.assert_close(earlier, torch.full_like(bias, math.log(EARLIER_FLOOR)), rtol=0.2, atol=0.1)


def test_compiles():
    queries, keys, distances = random_case(2, torch.float32)
    compiled = torch.compile(granularity_bias, backend="aot_eager", fullgraph=True)
    queries.requires_grad_()
    torch.testing.assert_close(
        compiled(queries, keys, distances, "R*S", N), granularity_bias(queries, keys, distances, "R*S", N)
    )
    queries = torch.ones(1, N, requires_grad=True)
    compiled(queries, torch.zeros(1, N), None, "R", N).exp().sum().backward()
    assert torch.isfinite(queries.grad).all(), "a key out of scope has a gradient of nan"


@pytest.mark.parametrize("mode, length, message", [("X", 9, "mode='X'"), ("R", 2, "max_length=2"), ("R", 9.5, "9.5")])
def test_bad_arguments(mode, length, message):
    with pytest.raises(ValueError, match=message):
        check_mode(mode, length)
