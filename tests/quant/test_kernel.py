# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The CPU kernel against the float64 product of the same weight; on every path that this processor runs."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ext.quant import functional, kernel
from peft_ext.quant.functional import PackedWeight, mixed_packed_linear, packed_linear
from peft_ext.quant.kernel import CAPABILITIES, CAPABILITY_VARIABLE, KERNEL_VARIABLE
from peft_ext.quant.packing import pack


needs_kernel = pytest.mark.skipif(not kernel.available(), reason="the CPU kernel isn't built: no C++ compiler")
FAST, EXACT = 1e-2, 1e-5


@pytest.fixture(params=CAPABILITIES)
def path(request):
    """One path of the kernel."""
    with kernel.using(**{CAPABILITY_VARIABLE: request.param}):
        if CAPABILITIES.index(request.param) > kernel.capability():
            pytest.skip(f"this processor has no {request.param}")
        yield request.param


@pytest.fixture(params=["auto", "exact"])
def tolerance(request):
    with kernel.using(**{KERNEL_VARIABLE: request.param}):
        yield FAST if request.param == "auto" else EXACT


@pytest.fixture
def only_the_kernel(monkeypatch):
    """Fails where torch's operations would step in."""

    def boom(*args):
        raise AssertionError("not the kernel")

    monkeypatch.setattr(functional, "code_blocks", boom)


FORMS = ["uniform", "float", "chosen", "binary"]


def make(out_features, in_features, bits, groups=1, form="uniform", adapters=1, seed=0):
    """A packed weight, its scales `[adapters, ...]`, and the float64 weights `[adapters, out, in]`.

    form: integers with whole zero points, float ones, float ones for each adapter; or a binary coding.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    shape = (adapters, out_features, groups) + ((bits,) if form == "binary" else ())
    scale = torch.rand(shape, generator=generator) + 0.1
    per_input = in_features // groups
    spread = scale.double().repeat_interleave(per_input, 2)
    if form == "binary":
        zero_point = None
        signs = torch.stack([((codes >> p) & 1).double() * 2 - 1 for p in range(bits)], -1)
        dense = (spread * signs).sum(-1)
    else:
        middle = 2 ** (bits - 1)
        zero_point = torch.randint(
            max(0, middle - 2),
            min(2**bits, middle + 2),
            (out_features, groups),
            generator=generator,
            dtype=torch.uint8,
        )
        if form != "uniform":
            of_each = (adapters, out_features, groups) if form == "chosen" else (out_features, groups)
            zero_point = zero_point + 4 * torch.randn(of_each, generator=generator)
        dense = spread * (codes.double() - zero_point.double().repeat_interleave(per_input, -1))
    return PackedWeight(pack(codes, bits), zero_point, out_features, in_features), scale, dense


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@needs_kernel
@pytest.mark.parametrize("form", ["uniform", "float", "binary"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("groups", [1, 5], ids=["channel", "groups"])
def test_product(path, tolerance, only_the_kernel, bits, form, groups):
    weight, scale, dense = make(70, 320, bits, groups, form)
    bias = torch.randn(70)
    for rows in (1, 2, 3, 7):
        x = torch.randn(rows, 320)
        with torch.no_grad():
            found = packed_linear(x, weight, scale[0], bias)
        assert error(found, x.double() @ dense[0].t() + bias) < tolerance


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    out_features=st.integers(1, 100),
    in_bytes=st.integers(1, 20),
    cut=st.integers(0, 7),
    groups=st.sampled_from([1, 2, 3]),
    bits=st.integers(1, 8),
    form=st.sampled_from(["uniform", "float", "binary"]),
    rows=st.integers(1, 40),
    capability=st.sampled_from(CAPABILITIES),
)
def test_any_size(out_features, in_bytes, cut, groups, bits, form, rows, capability):
    in_features = 8 * in_bytes * groups - (cut if groups == 1 else 0)
    weight, scale, dense = make(out_features, in_features, bits, groups, form, seed=rows)
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(1))
    chosen = kernel.using(**{CAPABILITY_VARIABLE: capability, KERNEL_VARIABLE: "exact"})
    with chosen, pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(kernel, "MAX_ROWS", (99, 99, 99))
        patch.setattr(functional, "code_blocks", None)
        found = packed_linear(x, weight, scale[0])
    expected = x.double() @ dense[0].t()
    # a sum may cancel, so the error is measured against what is added up
    bound = EXACT * (x.double().abs() @ dense[0].abs().t()).norm()
    assert (found.double() - expected).norm() <= bound


@needs_kernel
@pytest.mark.parametrize("groups", [1, 4], ids=["channel", "groups"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_with_scales_of_their_own(path, tolerance, only_the_kernel, form, groups, monkeypatch):
    monkeypatch.setattr(kernel, "MAX_ROWS", (14, 14, 14))
    weight, scales, dense = make(48, 128, 3, groups, form, adapters=5)
    x, bias = torch.randn(7, 2, 128), torch.randn(48)
    choice = torch.tensor([4, 0, 0, 2, 1, 3, 4])
    found = mixed_packed_linear(x, weight, scales, choice, bias)
    expected = torch.stack([sample.double() @ dense[i].t() + bias for sample, i in zip(x, choice)])
    assert error(found, expected) < tolerance


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_in_and_out(path, only_the_kernel, dtype):
    weight, scale, dense = make(64, 256, 4)
    x, bias = torch.randn(3, 256).to(dtype), torch.randn(64).to(dtype)
    with torch.no_grad():
        found = packed_linear(x, weight, scale[0].to(dtype), bias)
    exact = x.double() @ (dense[0] / scale[0].double() * scale[0].to(dtype).double()).t() + bias.double()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0.01, atol=0.02 * exact.abs().max().item())


@needs_kernel
def test_every_float16_number_comes_through(path, only_the_kernel):
    """The conversions are our own: subnormal numbers, infinity and rounding to even included."""
    weight = PackedWeight(pack(torch.tensor([[1]], dtype=torch.uint8), 1), torch.zeros(1, 1, dtype=torch.uint8), 1, 1)
    scale = torch.ones(1, 1)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, 17, dtype=torch.int16).view(dtype)[:, None]
        x = x[torch.isfinite(x[:, 0]) & (x[:, 0].abs() > 1e-30)]
        with torch.no_grad():
            found = torch.cat([packed_linear(part, weight, scale) for part in x.split(4)])
        torch.testing.assert_close(found, x, rtol=0, atol=0)


@needs_kernel
def test_any_strides_and_shapes(path, only_the_kernel):
    weight, scale, dense = make(40, 64, 4)
    wide = torch.randn(6, 128)
    for x in (wide[:, :64], wide[:, ::2], wide[:3, 64:].t().contiguous().t(), torch.randn(2, 2, 64), torch.randn(64)):
        with torch.no_grad():
            assert error(packed_linear(x, weight, scale[0]), x.double() @ dense[0].t()) < EXACT
    with torch.no_grad():
        assert packed_linear(torch.randn(0, 3, 64), weight, scale[0]).shape == (0, 3, 40)


@needs_kernel
def test_any_strides_of_the_weight(path, only_the_kernel):
    (planes, zero_point, *size), scale, dense = make(40, 64, 4, groups=4)
    weight = PackedWeight(
        planes.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), zero_point.t().contiguous().t(), *size
    )
    bias, x = torch.randn(40, 2)[:, 1], torch.randn(3, 64)
    with torch.no_grad():
        found = packed_linear(x, weight, scale[0].t().contiguous().t(), bias)
    assert error(found, x.double() @ dense[0].t() + bias) < EXACT


@needs_kernel
def test_large_inputs_among_small_ones_dont_drown_them(path):
    """Language models have inputs a hundred times larger than the rest, which a weight may leave out of the result."""
    weight, scale, dense = make(64, 512, 4)
    x = torch.randn(1, 512)
    x[:, [5, 130, 300]] *= 100
    with torch.no_grad(), kernel.using(**{KERNEL_VARIABLE: "auto"}):
        found = packed_linear(x, weight, scale[0])
        outliers = torch.zeros(1, 512)
        outliers[:, [5, 130, 300]] = x[:, [5, 130, 300]]
        rest = found - packed_linear(outliers, weight, scale[0])
    expected = (x - outliers).double() @ dense[0].t()
    assert error(rest, expected) < 2 * FAST


@needs_kernel
def test_not_a_number_stays_one(path, tolerance):
    weight, scale, _ = make(40, 128, 4)
    x = torch.randn(2, 128)
    x[1, 100] = float("nan")
    with torch.no_grad():
        found = packed_linear(x, weight, scale[0])
    assert torch.isfinite(found[0]).all() and torch.isnan(found[1]).all()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_float_zero_points_of_any_dtype_and_view(path, only_the_kernel, dtype):
    weight, scale, dense = make(40, 64, 4, 2, "float")
    zero_point = weight.zero_point.to(dtype)
    dense = dense + scale[0].double().repeat_interleave(32, 1) * (
        weight.zero_point.double() - zero_point.double()
    ).repeat_interleave(32, 1)
    x = torch.randn(3, 64)
    for view in (zero_point, zero_point.t().contiguous().t(), torch._neg_view(-zero_point)):
        with torch.no_grad():
            found = packed_linear(x, weight._replace(zero_point=view), scale[0])
        assert error(found, x.double() @ dense[0].t()) < FAST


@needs_kernel
def test_threads_dont_change_the_result(path, tolerance):
    weight, scale, _ = make(2000, 1024, 3)  # smaller ones aren't shared among threads
    x = torch.randn(2, 1024)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with torch.no_grad():
                results.append(packed_linear(x, weight, scale[0]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_kernel
@pytest.mark.parametrize("form", ["uniform", "float"])
def test_operator_is_well_formed(form):
    weight, scale, _ = make(40, 64, 4, 2, form)
    inputs = (torch.randn(3, 64), weight.planes, scale[0], weight.zero_point, torch.randn(40), None, 40, True)
    torch.library.opcheck(torch.ops.peft_ext.packed_linear.default, inputs)


@needs_kernel
@pytest.mark.parametrize("wrong", ["dtype", "groups"])
def test_operator_refuses_what_the_kernel_does_not_take(wrong):
    """What doesn't fit each other: test_kernel_misfits.py."""
    weight, scales, _ = make(40, 64, 4, 2, adapters=2)
    x, choice = torch.randn(3, 64), torch.tensor([0, 1, 1])
    inputs = {"x": x, "planes": weight.planes, "scale": scales, "zero_point": weight.zero_point}
    inputs.update(bias=torch.randn(40), choice=choice)
    torch.ops.peft_ext.packed_linear(**inputs, out_features=40, exact=True)
    changes = {
        "dtype": {"x": x.double()},
        "groups": {"scale": torch.rand(2, 40, 16), "zero_point": torch.ones(40, 16, dtype=torch.uint8)},
    }[wrong]
    with pytest.raises(ValueError, match="takes float32, bfloat16 and float16, and groups of whole bytes"):
        torch.ops.peft_ext.packed_linear(**{**inputs, **changes}, out_features=40, exact=True)


@needs_kernel
def test_compile_and_export_keep_the_operator():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            (self.planes, self.zero_point, *self.size), scale, _ = make(40, 64, 4)
            self.scale = scale[0]

        def forward(self, x):
            return packed_linear(x, PackedWeight(self.planes, self.zero_point, *self.size), self.scale)

    layer, x = Layer(), torch.randn(3, 64)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        exported = torch.export.export(layer, (x,))
    assert any(node.target is torch.ops.peft_ext.packed_linear.default for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), expected)


@needs_kernel
def test_gradients_and_doubles_stay_with_torch(monkeypatch):
    weight, scale, dense = make(40, 64, 4)
    monkeypatch.setattr(kernel, "_run", None)
    packed_linear(torch.randn(2, 64), weight, scale[0])
    with torch.no_grad():
        x = torch.randn(2, 64, dtype=torch.float64)
        torch.testing.assert_close(packed_linear(x, weight, scale[0].double()), x @ dense[0].t())
        with kernel.using(**{KERNEL_VARIABLE: "torch"}):
            packed_linear(torch.randn(2, 64), weight, scale[0])
        with kernel.using(**{KERNEL_VARIABLE: "auto"}), pytest.raises(TypeError):  # it would have been the kernel's
            packed_linear(torch.randn(2, 64), weight, scale[0])


@pytest.mark.parametrize("trouble", ["missing", "version"])
def test_works_without_the_kernel_and_says_so_once(monkeypatch, trouble):
    monkeypatch.setitem(
        sys.modules, "peft_ext.quant._kernel", None if trouble == "missing" else SimpleNamespace(VERSION=0)
    )
    monkeypatch.delattr("peft_ext.quant._kernel", raising=False)
    if trouble == "version":
        monkeypatch.setattr("peft_ext.quant._kernel", sys.modules["peft_ext.quant._kernel"], raising=False)
    kernel._module.cache_clear()
    kernel._level.cache_clear()
    try:
        weight, scale, dense = make(40, 64, 4)
        x = torch.randn(2, 64)
        with torch.no_grad():
            with pytest.warns(UserWarning, match="CPU kernel.*[Rr]einstall"):
                found = packed_linear(x, weight, scale[0])
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                packed_linear(x, weight, scale[0])
            with pytest.raises(RuntimeError, match="exported.*reinstall"):
                torch.ops.peft_ext.packed_linear(x, weight.planes, scale[0], weight.zero_point, None, None, 40, True)
        assert error(found, x.double() @ dense[0].t()) < EXACT
    finally:
        kernel._module.cache_clear()
        kernel._level.cache_clear()


def test_unknown_settings_are_named():
    weight, scale, _ = make(40, 64, 4)
    for variable, value in ((KERNEL_VARIABLE, "fastest"), (CAPABILITY_VARIABLE, "sse9")):
        with kernel.using(**{variable: value}), torch.no_grad():
            with pytest.raises(ValueError, match=f"{variable}='{value}'.*choose one of"):
                kernel.kernel() if variable == KERNEL_VARIABLE else kernel.capability()
