# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Float linear layers by oneDNN, for benchmarks that compare results, not time: on AMD processors they take half as
long.

Never used where time is measured: there, the peers run as their users run them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional
from unittest import mock

import torch
from torch.autograd.function import once_differentiable

from peft_ext.quant import matmul


@contextmanager
def fast_linear() -> Iterator[None]:
    """Within the block, `torch.nn.functional.linear` of float32 CPU tensors is computed by oneDNN."""
    plain = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
        plain_dtype = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not plain_dtype or not x.numel():
            return plain(x, weight, bias)
        y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    with mock.patch.object(torch.nn.functional, "linear", linear):
        yield


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return matmul.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = matmul.linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = matmul.linear(grad.t(), x.t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight
