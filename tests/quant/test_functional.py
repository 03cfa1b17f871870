# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Products with packed weights and their gradients against a dequantised weight and plain autograd."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peft_ext.quant import functional, kernel
from peft_ext.quant.binary import dequantize_binary, quantize_binary
from peft_ext.quant.functional import PackedWeight, mixed_packed_linear, packed_linear
from peft_ext.quant.packing import pack
from peft_ext.quant.uniform import dequantize, quantize


OUT, IN = 40, 24
MODES = [
    pytest.param(-1, False, id="per-channel"),
    pytest.param(-1, True, id="keep-product"),
    pytest.param(8, False, id="groups"),
]


def packed_weight(form, bits, group_size=-1, dtype=torch.float64):
    """A packed weight, its scale (alphas) and the codes' values."""
    weight = torch.randn(OUT, IN, dtype=dtype)
    if form == "binary":
        codes, scale = quantize_binary(weight, bits, group_size)
        return PackedWeight(pack(codes, bits), None, OUT, IN), scale, codes
    codes, scale, zero_point = quantize(weight, bits, group_size, zero="float" if form == "float" else "int")
    return PackedWeight(pack(codes, bits), zero_point, OUT, IN), scale, codes


FORMS = [
    *(("uniform", bits) for bits in (2, 3, 4, 8)),
    *(("float", bits) for bits in (2, 4)),
    *(("binary", bits) for bits in (1, 3, 4)),
]


@pytest.fixture(params=FORMS, ids=lambda form: f"{form[0]}-{form[1]}bit")
def make(request):
    """[`packed_weight`] of a number format, for a group size."""
    return functools.partial(packed_weight, *request.param)


@pytest.fixture(params=[2, 3, 4, 8], ids=lambda bits: f"{bits}bit")
def make_uniform(request):
    """The same with uniform codes only."""
    return functools.partial(packed_weight, "uniform", request.param)


def reference(x, packed, scale, codes):
    """y = x W^T with the weight made in full."""
    if packed.zero_point is None:
        return x @ dequantize_binary(codes, scale).t()
    return x @ dequantize(codes, scale, packed.zero_point).t()


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (IN,), (0, IN), (2, 0, IN)], ids=str)
@pytest.mark.parametrize(("group_size", "keep_product"), MODES)
def test_product(make, group_size, keep_product, shape):
    packed, scale, codes = make(group_size)
    x = torch.randn(shape, dtype=torch.float64)
    y = packed_linear(x, packed, scale, keep_product=keep_product)
    torch.testing.assert_close(y, reference(x, packed, scale, codes))


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN)], ids=str)
@pytest.mark.parametrize(("group_size", "keep_product"), MODES)
def test_gradcheck(make, group_size, keep_product, shape):
    packed, scale, _ = make(group_size)
    scale[3] = 0  # a scale of zero has a gradient too
    inputs = (torch.randn(shape, dtype=torch.float64, requires_grad=True), scale.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, s: packed_linear(x, packed, s, keep_product=keep_product), inputs)


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (0, IN)], ids=str)
@pytest.mark.parametrize(("group_size", "keep_product"), MODES)
def test_gradcheck_of_zero_points(group_size, keep_product, shape):
    packed, scale, _ = packed_weight("float", 3, group_size)
    inputs = (torch.randn(shape, dtype=torch.float64), scale, packed.zero_point)
    for wanted in ((0, 1, 2), (1, 2), (2,)):
        leaves = [tensor.clone().requires_grad_(place in wanted) for place, tensor in enumerate(inputs)]
        assert torch.autograd.gradcheck(
            lambda x, s, z: packed_linear(x, packed._replace(zero_point=z), s, keep_product=keep_product), leaves
        )


@pytest.mark.parametrize("group_size", [-1, 128])
def test_half_precision_keeps_the_precision_of_zero_points(group_size):
    """Rounded to bfloat16, a zero point would move all of a group's weights the same way."""
    wide = 16 * IN  # what rounds each weight by itself cancels
    codes, scale, zero_point = quantize(torch.rand(OUT, wide) - torch.rand(OUT, 1), 4, group_size, zero="float")
    packed, x = PackedWeight(pack(codes, 4), zero_point, OUT, wide), torch.eye(wide, dtype=torch.bfloat16)
    y = packed_linear(x, packed, scale.clone().requires_grad_()).detach().float().t()

    def bias_of_groups(zero_points):
        """How far the groups' means are off, in steps."""
        off = (y - dequantize(codes, scale, zero_points)).view(OUT, scale.shape[1], -1).mean(-1)
        return (off / scale).square().mean().sqrt()

    assert bias_of_groups(zero_point) < 0.7 * bias_of_groups(zero_point.bfloat16().float())


@pytest.mark.parametrize(("group_size", "keep_product"), MODES)
def test_gradients_are_those_of_a_dequantised_weight(make, group_size, keep_product):
    packed, scale, codes = make(group_size, torch.float32)
    x, grad = torch.randn(4, 6, IN), torch.randn(4, 6, OUT)
    ours, theirs = [], []
    for function, result in ((packed_linear, ours), (reference, theirs)):
        leaf_x, leaf_scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
        extra = {"keep_product": keep_product} if function is packed_linear else {"codes": codes}
        function(leaf_x, packed, leaf_scale, **extra).backward(grad)
        result += [leaf_x.grad, leaf_scale.grad]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("group_size", "keep_product"), MODES)
def test_blocks_of_rows_give_the_same(make, group_size, keep_product, monkeypatch):
    packed, scale, _ = make(group_size)

    def run():
        x = torch.linspace(-1, 1, 3 * IN, dtype=torch.float64).view(3, IN).requires_grad_()
        s = scale.clone().requires_grad_()
        packed_linear(x, packed, s, keep_product=keep_product).square().sum().backward()
        return x.grad, s.grad

    whole = run()
    monkeypatch.setattr(functional, "BLOCK_SIZE", 1)
    torch.testing.assert_close(run(), whole)


@pytest.mark.parametrize(("group_size", "keep_product"), MODES)
def test_non_contiguous_input(make, group_size, keep_product):
    packed, scale, codes = make(group_size)
    x = torch.randn(IN, 7, dtype=torch.float64).t()
    y = packed_linear(x, packed, scale, keep_product=keep_product)
    torch.testing.assert_close(y, reference(x, packed, scale, codes))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_gradient_checkpointing(make, group_size, use_reentrant):
    packed, scale, _ = make(group_size)
    grads = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        x = torch.linspace(-1, 1, 3 * IN, dtype=torch.float64).view(3, IN).requires_grad_()
        s = scale.clone().requires_grad_()
        run(lambda x, s=s: packed_linear(x, packed, s).tanh(), x).sum().backward()
        grads.append((x.grad, s.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(make, group_size, dtype):
    packed, scale, codes = make(group_size, torch.float32)
    x = torch.randn(6, IN)
    leaf_x, leaf_scale = x.to(dtype).requires_grad_(), scale.clone().requires_grad_()
    y = packed_linear(leaf_x, packed, leaf_scale)
    y.sum().backward()
    assert y.dtype == leaf_x.grad.dtype == dtype
    assert leaf_scale.grad.dtype == torch.float32
    exact = reference(x, packed, scale, codes)
    assert (y.float() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("trained", [1, 2])
def test_the_gradient_of_the_first_alphas_alone(trained, group_size):
    packed, scale, codes = packed_weight("binary", 3, group_size)
    x, grads = torch.randn(5, IN, dtype=torch.float64), []
    for planes in (trained, None):
        leaf = scale.clone().requires_grad_()
        packed_linear(x, packed, leaf, trained_planes=planes).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0][..., :trained], grads[1][..., :trained])
    assert not grads[0][..., trained:].any() and grads[1][..., trained:].any()


def test_binary_coding_keeps_no_weight():
    packed, scale, _ = packed_weight("binary", 3)
    saved = []
    x = torch.randn(50, IN, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        packed_linear(x, packed, scale.requires_grad_())
    assert {tensor.numel() for tensor in saved if tensor.is_floating_point()} == {x.numel(), scale.numel()}


def test_float16_does_not_overflow():
    quantized = quantize(torch.full((OUT, IN), 0.01) * torch.rand(OUT, IN), 8)
    packed = PackedWeight(pack(quantized.codes, 8), quantized.zero_point, OUT, IN)
    x = torch.full((1, IN), 100.0, dtype=torch.float16)  # x (q - z)^T alone would pass 65504
    assert torch.isfinite(packed_linear(x, packed, quantized.scale)).all()


def test_saves_no_weight_and_shares_the_output(make_uniform):
    packed, scale, _ = make_uniform()
    saved = []
    x = torch.randn(50, IN, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = packed_linear(x, packed, scale.requires_grad_())
    floats = [tensor for tensor in saved if tensor.is_floating_point()]
    assert all(tensor.numel() in (50 * OUT, OUT) for tensor in floats)
    assert any(tensor.data_ptr() == y.data_ptr() for tensor in floats)


def test_in_place_change_of_the_output_is_noticed_and_keep_product_allows_it(make_uniform):
    packed, scale, codes = make_uniform()
    x = torch.randn(3, IN, dtype=torch.float64)
    y = packed_linear(x, packed, scale.clone().requires_grad_())
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    ours, theirs = scale.clone().requires_grad_(), scale.clone().requires_grad_()
    packed_linear(x, packed, ours, keep_product=True).mul_(2).sum().backward()
    (2 * reference(x, packed, theirs, codes)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_only_what_is_asked_for_gets_a_gradient(make):
    packed, scale, _ = make()
    x = torch.randn(3, IN, dtype=torch.float64)
    leaf = scale.clone().requires_grad_()
    packed_linear(x, packed, leaf).sum().backward()
    assert x.grad is None and leaf.grad is not None
    x.requires_grad_()
    packed_linear(x, packed, scale).sum().backward()
    assert x.grad is not None and scale.grad is None


@pytest.mark.parametrize("group_size", [-1, 8])
def test_compiles_without_a_break(make, group_size):
    packed, scale, _ = make(group_size)

    def loss(x, s):
        return packed_linear(x, packed, s).square().sum()

    torch.compiler.reset()  # else the formats together pass the limit of recompilations
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (loss, compiled):
        x = torch.linspace(-1, 1, 3 * IN, dtype=torch.float64).view(3, IN).requires_grad_()
        s = scale.clone().requires_grad_()
        value = function(x, s)
        value.backward()
        results.append((value.detach(), x.grad, s.grad))
    torch.testing.assert_close(*results)


def test_runs_on_the_meta_device():
    packed = PackedWeight(
        torch.empty(2, 3, 3, 32, dtype=torch.uint8, device="meta"),
        torch.empty(OUT, 1, dtype=torch.uint8, device="meta"),
        OUT,
        IN,
    )
    for dtype in (torch.float32, torch.bfloat16):
        y = packed_linear(
            torch.empty(2, 5, IN, device="meta", dtype=dtype), packed, torch.empty(OUT, 1, device="meta")
        )
        assert (y.shape, y.dtype, y.device.type) == ((2, 5, OUT), dtype, "meta")


@pytest.mark.parametrize("group_size", [-1, 8])
def test_mixed_batch_is_each_sample_with_its_own_scale(make, group_size):
    packed, scale, codes = make(group_size)
    scales = torch.stack([scale, scale * 1.5, scale * torch.rand_like(scale)])
    x, choice = torch.randn(5, 4, IN, dtype=torch.float64), torch.tensor([2, 0, 1, 1, 2])
    expected = torch.stack([reference(x[i], packed, scales[choice[i]], codes) for i in range(5)])
    torch.testing.assert_close(mixed_packed_linear(x, packed, scales, choice), expected)


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mixed_batch_with_zero_points_of_their_own(group_size, dtype):
    packed, scale, codes = packed_weight("float", 3, group_size, dtype)
    scales = torch.stack([scale, scale * 1.5, scale * torch.rand_like(scale)])
    zero_points = packed.zero_point + torch.randn(3, *scale.shape, dtype=dtype)
    x, choice = torch.randn(5, 4, IN, dtype=dtype), torch.tensor([2, 0, 1, 1, 2])
    expected = torch.stack(
        [
            reference(x[i], packed._replace(zero_point=zero_points[choice[i]]), scales[choice[i]], codes)
            for i in range(5)
        ]
    )
    with kernel.using(PEFT_EXT_KERNEL="torch"):
        found = mixed_packed_linear(x, packed._replace(zero_point=zero_points), scales, choice)
    torch.testing.assert_close(found, expected)


def test_mixed_batch_multiplies_by_the_codes_once(make_uniform, monkeypatch):
    packed, scale, _ = make_uniform()
    calls = []
    original = functional.unpack
    monkeypatch.setattr(functional, "unpack", lambda *args: calls.append(1) or original(*args))
    mixed_packed_linear(torch.randn(64, IN, dtype=torch.float64), packed, scale.expand(64, OUT, 1), torch.arange(64))
    assert len(calls) == 1


def test_refuses_integers_and_other_widths(make):
    packed, scale, _ = make()
    with pytest.raises(TypeError, match="int64"):
        packed_linear(torch.ones(2, IN, dtype=torch.int64), packed, scale)
    with pytest.raises(ValueError, match=rf"\(2, {IN + 1}\).*in_features={IN}"):
        packed_linear(torch.ones(2, IN + 1), packed, scale)
