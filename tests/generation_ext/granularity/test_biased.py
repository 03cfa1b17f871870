# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Attention with a bias that learns is SDPA with that mask, forward and backward, whatever the pieces."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from generation_ext.granularity import biased
from generation_ext.granularity.attention import GranularityAttention, GranularityConfig
from generation_ext.granularity.biased import biased_attention


def case(shape, dtype=torch.float64, batch=3, heads=2, queries=4, keys=5, size=3):
    sizes = ((batch, heads, queries, size), (batch, heads, keys, size), (batch, heads, keys, size), shape)
    return [torch.randn(each, dtype=dtype).requires_grad_() for each in sizes]


@pytest.fixture(params=[1, 2**22], ids=["one text at a time", "all at once"])
def piece(request, monkeypatch):
    monkeypatch.setattr(biased, "PIECE", request.param)


@pytest.mark.parametrize("shape", [(3, 1, 4, 5), (1, 1, 4, 5), (3, 2, 4, 5)])
def test_gradients(shape, piece):
    inputs = case(shape)
    assert torch.autograd.gradcheck(biased_attention, inputs)
    theirs = scaled_dot_product_attention(*inputs[:3], attn_mask=inputs[3])
    torch.testing.assert_close(biased_attention(*inputs), theirs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_dtypes_and_rows_that_see_nothing(dtype, tolerance, piece):
    values = case((3, 1, 4, 5), dtype)
    with torch.no_grad():
        values[3][0, :, 1] = torch.finfo(dtype).min
        values[3][1, :, :, 3:] = torch.finfo(dtype).min
    weights = torch.randn(3, 2, 4, 3)
    found = []
    for attend, kind in ((biased_attention, dtype), (scaled_dot_product_attention, torch.float64)):
        inputs = [each.detach().to(kind).requires_grad_() for each in values]
        output = attend(*inputs)
        found.append([output, *torch.autograd.grad((output * weights.to(kind)).sum(), inputs)])
    for ours, exact in zip(*found):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


def test_the_bias_alone_may_learn():
    query, key, value, bias = case((3, 1, 4, 5))
    (whole,) = torch.autograd.grad(biased_attention(query, key, value, bias, 0.7).square().sum(), bias)
    frozen = [each.detach() for each in (query, key, value)]
    (alone,) = torch.autograd.grad(biased_attention(*frozen, bias, 0.7).square().sum(), bias)
    torch.testing.assert_close(alone, whole)


def test_nothing_of_all_heads_is_kept():
    """Training holds one bias for all heads, not the weights of each."""
    attention = GranularityAttention(32, 8, GranularityConfig(max_length=64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.shape) or each, lambda each: each):
        attention(torch.randn(2, 64, 32, requires_grad=True))
    assert torch.Size([2, 1, 64, 64]) in kept
    assert not any(each.numel() > 2 * 64 * 64 for each in kept)
