# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The dense matmul: every backend gives the product, for any strides; the switch is obeyed."""

import pytest
import torch

from peft_ext.quant.kernel import KERNEL_VARIABLE, using
from peft_ext.quant.matmul import linear


@pytest.fixture(params=["auto", "torch"])
def kernel(request):
    with using(**{KERNEL_VARIABLE: request.param}):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 8, 5), (7, 33, 64), (130, 72, 48), (0, 8, 5), (3, 8, 0)])
def test_product(kernel, rows, inputs, outputs, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    expected = torch.stack([(x * row).sum(-1) for row in weight], -1) if outputs else x.new_zeros(rows, 0)
    found = linear(x.to(dtype), weight.to(dtype))
    assert found.dtype == dtype and found.shape == (rows, outputs)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance * inputs**0.5, rtol=tolerance)


def test_any_strides(kernel):
    x, weight = torch.randn(24, 40), torch.randn(32, 40)
    expected = (x.double() @ weight.double().t()).float()
    wide = torch.randn(24, 80)
    wide[:, ::2] = x
    for left in (x, x.t().contiguous().t(), wide[:, ::2]):
        for right in (weight, weight.t().contiguous().t()):
            torch.testing.assert_close(linear(left, right), expected, atol=1e-4, rtol=1e-4)


def test_runs_on_meta(kernel):
    found = linear(torch.empty(4, 8, device="meta"), torch.empty(6, 8, device="meta"))
    assert found.shape == (4, 6) and found.device.type == "meta"


def test_the_switch_keeps_onednn_out(monkeypatch):
    def boom(*args):
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", boom, raising=False)
    with using(**{KERNEL_VARIABLE: "torch"}):
        linear(torch.randn(4, 8), torch.randn(6, 8))


def test_unknown_kernel_is_named():
    with (
        using(**{KERNEL_VARIABLE: "fastest"}),
        pytest.raises(ValueError, match="PEFT_EXT_KERNEL='fastest'.*auto.*torch"),
    ):
        linear(torch.randn(4, 8), torch.randn(6, 8))
