# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Attention with an additive bias that learns, on a CPU: SDPA's fused forward, and a backward in pieces.

torch's fused CPU kernel has no gradient for its mask. Given a mask that needs one, SDPA takes matmul and softmax instead, and
keeps the weights of all heads. Here the forward is the fused one, which keeps nothing, and the backward works the weights
out again, a few texts at a time.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch.autograd.function import once_differentiable


# Weights of at most so many pairs of tokens (over heads and texts) exist at a time: 16 MB of float32.
PIECE = 2**22


def biased_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: Optional[float] = None
) -> torch.Tensor:
    """`softmax(query key^T scale + bias) value`, without dropout.

    Args:
        query: `[batch, heads, q, size]`.
        key, value: `[batch, heads, k, size]`.
        bias: `[batch or 1, 1 or heads, q, k]`, the queries' dtype; finite.
        scale: None: `size ** -0.5`.

    Returns:
        `[batch, heads, q, size]`.
    """
    return _Biased.apply(query, key, value, bias, query.shape[-1] ** -0.5 if scale is None else scale)


class _Biased(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
    ) -> torch.Tensor:
        # a mask that requires a gradient turns the fused kernel off, even here
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias.detach(), scale=scale)
        ctx.save_for_backward(query, key, value, bias, output)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        query, key, value, bias, output = ctx.saved_tensors
        (gradient,) = gradients
        needs = ctx.needs_input_grad
        gradients_of = [
            torch.zeros_like(each) if need else None for each, need in zip((query, key, value, bias), needs)
        ]
        of_query, of_key, of_value, of_bias = gradients_of
        size = max(1, PIECE // max(1, query.shape[1] * query.shape[2] * key.shape[2]))
        for start in range(0, query.shape[0], size):
            piece = slice(start, start + size)
            q, k, v, g, out = (_wide(each[piece]) for each in (query, key, value, gradient, output))
            q = q * ctx.scale
            one = slice(None) if bias.shape[0] == 1 else piece
            weights = torch.matmul(q, k.transpose(2, 3)).add_(_wide(bias[one])).softmax(-1)
            if of_value is not None:
                of_value[piece] = torch.matmul(weights.transpose(2, 3), g)
            # d softmax: weights (d weights - sum_k weights d weights), and that sum is gradient . output
            through = torch.matmul(g, v.transpose(2, 3)).sub_((g * out).sum(-1, keepdim=True)).mul_(weights)
            if of_bias is not None:
                of_bias[one] += through.sum_to_size(of_bias[one].shape)
            if of_query is not None:
                of_query[piece] = torch.matmul(through, k).mul_(ctx.scale)
            if of_key is not None:
                of_key[piece] = torch.matmul(through.transpose(2, 3), q)
        return of_query, of_key, of_value, of_bias, None


def _wide(values: torch.Tensor) -> torch.Tensor:
    """float32 at least, as SDPA accumulates."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
