# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PackedLinear is an nn.Linear with a frozen weight of few bits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from peft_ext.quant.binary import quantize_binary
from peft_ext.quant.formats import Uniform
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.packed_module import PackedParameter
from peft_ext.quant.uniform import quantize


OUT, IN = 40, 24


@pytest.fixture
def layer():
    return make()


def make_double(group_size, binary):
    """In float64, for gradcheck."""
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    quantized = quantize_binary(weight, 3, group_size) if binary else quantize(weight, 3, group_size)
    return PackedLinear.from_quantized(quantized, 3, torch.randn(OUT, dtype=torch.float64))


def make(bits=3, group_size=-1, sym=False):
    quantized = quantize(torch.randn(OUT, IN), bits, group_size, sym)
    return PackedLinear.from_quantized(quantized, bits, torch.randn(OUT), sym=sym)


def test_is_the_linear_layer_of_its_weight(layer):
    linear = nn.Linear(IN, OUT)
    linear.weight.data, linear.bias.data = layer.dequantize(), layer.bias.data
    x = torch.randn(2, 5, IN)
    torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer(x, scale=2 * layer.scale), 2 * (linear(x) - linear.bias) + linear.bias)


@pytest.mark.parametrize(("bits", "group_size", "sym"), [(2, -1, True), (3, 8, False), (4, 24, False), (8, 12, True)])
def test_tells_its_format(bits, group_size, sym):
    layer = make(bits, group_size, sym)
    assert (layer.bits, layer.sym, layer.group_size) == (bits, sym, -1 if group_size == IN else group_size)
    assert f"bits={bits}" in repr(layer)


def test_nothing_is_trainable_and_codes_take_their_bits():
    quantized = quantize(torch.randn(64, 64), 3)
    layer = PackedLinear.from_quantized(quantized, 3, None)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert (
        layer.planes.nbytes == layer.planes.numel() == 64 * 64 * 3 // 8
    )  # DeepSpeed and accelerate size memory by it
    assert layer.planes.logical_numel == 64 * 64
    assert torch.equal(layer.codes(), quantized.codes)


def test_state_dict_round_trip(layer):
    other = make()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, IN)
    assert torch.equal(other(x), layer(x))
    other.load_state_dict(make().state_dict(), assign=True)
    assert isinstance(other.planes, PackedParameter) and other.planes.logical_numel == OUT * IN


def test_copies_and_pickles(layer):
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.planes, layer.planes) and other.planes is not layer.planes
        assert isinstance(other.planes, PackedParameter) and other.planes.logical_numel == OUT * IN


def test_dtype_moves_leave_the_codes(layer):
    planes, fingerprint = layer.planes.clone(), layer.fingerprint()
    scale = layer.scale.clone()
    layer.to(torch.bfloat16)
    assert layer.compute_dtype == layer.bias.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32 and torch.equal(
        layer.scale, scale
    )  # tests/scale_tuning/test_precision.py
    assert layer.planes.dtype == layer.zero_point.dtype == torch.uint8
    assert torch.equal(layer.planes, planes) and layer.fingerprint() == fingerprint
    assert layer(torch.randn(2, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_moves_to_the_meta_device(layer):
    layer.to("meta")
    assert isinstance(layer.planes, PackedParameter)
    assert layer(torch.empty(2, IN, device="meta")).shape == (2, OUT)
    with pytest.raises(ValueError, match="meta device"):
        layer.fingerprint()


def test_autocast(layer):
    x = torch.randn(2, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


SHAPES = {
    "2-D": lambda: torch.randn(5, IN, dtype=torch.float64),
    "3-D": lambda: torch.randn(2, 3, IN, dtype=torch.float64),
    "not contiguous": lambda: torch.randn(IN, 3, 2, dtype=torch.float64).permute(2, 1, 0),
    "strided": lambda: torch.randn(4, 2 * IN, dtype=torch.float64)[::2, ::2],
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("binary", [False, True], ids=["uniform", "binary"])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_gradcheck_with_bias(group_size, binary, shape, checkpointing):
    layer = make_double(group_size, binary)
    x, scale = SHAPES[shape]().detach().requires_grad_(), layer.scale.detach().clone().requires_grad_()

    def forward(x, scale):
        if checkpointing:
            return torch.utils.checkpoint.checkpoint(layer, x, scale, use_reentrant=False)
        return layer(x, scale)

    assert torch.autograd.gradcheck(forward, (x, scale))


@pytest.mark.parametrize("binary", [False, True], ids=["uniform", "binary"])
@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN)])
def test_the_gradient_of_an_empty_batch_is_zero(shape, group_size, binary):
    layer = make_double(group_size, binary)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    scale = layer.scale.detach().clone().requires_grad_()
    y = layer(x, scale)
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()
    assert x.grad.shape == x.shape and torch.equal(scale.grad, torch.zeros_like(scale))


@pytest.mark.parametrize("binary", [False, True], ids=["uniform", "binary"])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_gradients_under_autocast(group_size, binary):
    """Near the float64 ones, and in the tensors' own dtypes."""
    layer = make_double(group_size, binary)
    x, scale = torch.randn(6, IN, dtype=torch.float64, requires_grad=True), layer.scale.detach().clone()
    scale.requires_grad_()
    layer(x, scale).square().sum().backward()
    expected = x.grad.clone(), scale.grad.clone()
    layer.float()
    x_float, scale_float = (tensor.detach().float().requires_grad_() for tensor in (x, scale))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x_float, scale_float).float().square().sum().backward()
    for found, wanted in zip((x_float.grad, scale_float.grad), expected):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())


def test_fingerprint_is_of_codes_zero_points_and_format(layer):
    other = copy.deepcopy(layer)
    other.scale.data *= 2
    assert other.fingerprint() == layer.fingerprint()
    other.planes.data[0, 0, 0, 0] ^= 1
    assert other.fingerprint() != layer.fingerprint()
    other = copy.deepcopy(layer)
    other.zero_point.data[0] ^= 1
    assert other.fingerprint() != layer.fingerprint()
    assert 0 <= layer.fingerprint() < 2**63


def test_refuses_tensors_that_do_not_fit(layer):
    good = {"in_features": IN, "out_features": OUT}
    with pytest.raises(ValueError, match="planes"):
        PackedLinear(layer.planes[:1], layer.scale, layer.zero_point, None, **good)
    with pytest.raises(ValueError, match="scale"):
        PackedLinear(layer.planes, layer.scale[:-1], layer.zero_point, None, **good)
    with pytest.raises(ValueError, match="zero_point"):
        PackedLinear(layer.planes, layer.scale, layer.zero_point.long(), None, **good)
    with pytest.raises(ValueError, match="zero_point"):
        PackedLinear(layer.planes, layer.scale, layer.zero_point.float()[:-1], None, **good)
    with pytest.raises(ValueError, match="sym=True.*zero_point is float"):
        PackedLinear(layer.planes, layer.scale, layer.zero_point.float(), None, sym=True, **good)


def test_float_zero_points_are_kept_as_precise_as_scales():
    weight = torch.randn(OUT, IN) + 0.3
    layer = PackedLinear.from_quantized(quantize(weight, 4, 8, zero="float"), 4, None)
    assert layer.number_format == Uniform(4, 8, zero="float") and "zero='float'" in repr(layer)
    before = layer.zero_point.clone()
    for dtype in (torch.bfloat16, torch.float16):
        layer.to(dtype)
        assert torch.equal(layer.zero_point, before) and layer.weight.dtype == dtype
    assert not layer.zero_point.requires_grad
    whole = PackedLinear.from_quantized(quantize(weight, 4, 8), 4, None)
    assert whole.number_format == Uniform(4, 8) and whole.zero_point.dtype == torch.uint8
    made = PackedLinear.empty(Uniform(4, 8, zero="float"), weight.shape, torch.bfloat16, None)
    assert made.zero_point.dtype == torch.float32 and made.number_format == layer.number_format


def test_the_fingerprint_has_float_zero_points_in_it():
    quantized = quantize(torch.randn(OUT, IN), 4, 8, zero="float")
    moved = quantized._replace(zero_point=quantized.zero_point + 1e-3)
    one, other = (PackedLinear.from_quantized(each, 4, None).fingerprint() for each in (quantized, moved))
    assert one != other


def test_casts_reach_the_weight_that_the_layer_stands_for():
    """Scales are float32 all along, so they don't tell."""
    quantized = quantize(torch.randn(OUT, IN), 4)
    layer = PackedLinear.from_quantized(quantized, 4, None, compute_dtype=torch.bfloat16)
    assert layer.scale.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert layer.to(dtype).weight.dtype == dtype
    assert layer.to("cpu").weight.dtype == torch.float64 and layer.to("meta").compute_dtype == torch.float64


def test_a_parameter_that_was_rebuilt_without_its_number(layer):
    """As accelerate does when it brings an offloaded layer back."""
    rebuilt = type(layer.planes)(layer.planes.data, requires_grad=False)
    assert isinstance(rebuilt, PackedParameter) and not rebuilt.requires_grad
    layer.planes = rebuilt
    assert layer.to("cpu").planes.logical_numel == OUT * IN


def test_the_fingerprint_of_gathered_codes(layer):
    expected = layer.fingerprint()
    planes, zero_point = layer.planes.detach().clone(), layer.zero_point.detach().clone()
    layer.planes.data.zero_()  # as if this process held another part
    assert layer.fingerprint() != expected and layer.fingerprint(planes, zero_point) == expected
