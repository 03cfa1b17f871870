# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A packed layer as an `nn.Linear` whose weight can be read, not written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_ext.quant.formats import Uniform
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.weight_view import WeightView
from tests.cases import assert_same


@pytest.fixture
def layer() -> PackedLinear:
    number_format = Uniform(bits=3)
    quantized = number_format.quantize(torch.randn(96, 32), number_format.default_method)
    return PackedLinear.from_quantized(quantized, 3, torch.randn(96))


def test_reading(layer):
    view, values = layer.weight, layer.dequantize()
    assert isinstance(layer, nn.Linear) and isinstance(view, WeightView) and not view.requires_grad
    assert view.shape == (96, 32) and view.dtype == torch.float32 and view.device == values.device
    assert torch.equal(view.data, values) and torch.equal(view.T[3], values.T[3])
    for result in (view.clone(), view + 0, view.detach().float() * 1, view.double().float()):
        assert torch.equal(result, values)
    assert type(view.clone()) is torch.Tensor and type(view.dequantize()) is torch.Tensor
    x = torch.randn(3, 32, requires_grad=True)
    nn.functional.linear(x, view).sum().backward()
    assert_same(x.grad, values.sum(0).expand(3, 32))
    assert repr(values) in repr(view)


def _write_by_assignment(layer):
    layer.weight = torch.zeros(96, 32)


def _write_to_data(layer):
    layer.weight.data = torch.zeros(96, 32)


def _add_in_place(layer):
    layer.weight.data += 1


def _write_out(layer):
    torch.add(layer.weight, 1, out=layer.weight)


def _write_into_a_view(layer):
    layer.weight.data.reshape(-1).scatter_add_(0, torch.tensor([1]), torch.ones(1))


def _write_into_a_transposed_view(layer):
    layer.weight.T[0, :3] = 1


def _reset(layer):
    layer.reset_parameters()


@pytest.mark.parametrize(
    "write",
    [
        _write_by_assignment,
        _write_to_data,
        _add_in_place,
        _write_out,
        _write_into_a_view,
        _write_into_a_transposed_view,
        _reset,
    ],
)
def test_writing_is_refused(layer, write):
    before = layer.dequantize()
    with pytest.raises(TypeError, match="never rounded again"):
        write(layer)
    assert torch.equal(layer.dequantize(), before)


def test_a_frozen_scale_keeps_no_output(layer):
    """So that a tuner may add to the output in place, and memory isn't spent on it."""
    x = torch.randn(5, 32, requires_grad=True)
    y = layer(x)
    y += 1
    y.sum().backward()
    assert_same(x.grad, layer.dequantize().sum(0).expand(5, 32))
