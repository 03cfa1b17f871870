# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Products with packed weights, and their gradients, without a gradient of the weight's size.

Per channel, `u = x (q - z)^T` and `y = u * s`, so `dL/ds_o = sum_t g_to u_to`: nothing of size `[out, in]` is
computed, let alone kept. Group-wise gradients reduce `g^T x` against the codes, a block of rows at a time. The
backward
unpacks the codes again; a dequantised weight never outlives a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from peft_ext.quant.matmul import linear
from peft_ext.quant.packing import TILE_ROWS, unpack


# Weights unpacked at a time (16 MiB in float32): enough for a fast matmul, little beside a layer of a 7B model.
BLOCK_SIZE = 1 << 22
# Stands in for a scale of exactly zero, so that the product can be had back from the output, see _PerChannel.
_TINY = 1e-30


class PackedWeight(NamedTuple):
    """The frozen part of a packed weight.

    `planes`: uint8 `[tiles, input bytes, bits, 32]`, see `packing.py`. `zero_point`: uint8 `[out, groups]`.
    """

    planes: torch.Tensor
    zero_point: torch.Tensor
    out_features: int
    in_features: int


def packed_linear(
    x: torch.Tensor, weight: PackedWeight, scale: torch.Tensor, *, keep_product: bool = False
) -> torch.Tensor:
    """`x (scale * (codes - zero_point))^T`, differentiable in `x` and `scale`.

    Args:
        x: float `[..., in]`.
        weight: The packed codes and zero points.
        scale: float `[out, groups]`.
        keep_product: Per channel, keep `x (q - z)^T` for the backward instead of the output. Needs more memory; lets
            the model change the output in place.

    Returns:
        `[..., out]` in the dtype of `x`.

    Raises:
        TypeError: If `x` isn't float.
        ValueError: If the last dimension of `x` isn't the weight's number of inputs.
    """
    _check_input(x, weight.in_features)
    rows = x.reshape(-1, weight.in_features)
    if not _scales_output(x, scale):
        y = _GroupWise.apply(rows, scale, *weight)
    elif keep_product:
        y = (_Product.apply(rows, *weight) * scale[:, 0]).to(x.dtype)
    else:
        y = _PerChannel.apply(rows, scale, *weight)
    return y.view(*x.shape[:-1], weight.out_features)


@torch.no_grad()
def mixed_packed_linear(
    x: torch.Tensor, weight: PackedWeight, scales: torch.Tensor, choice: torch.Tensor
) -> torch.Tensor:
    """A batch whose samples use different scales on the same codes; for inference.

    Per channel, all samples share one product with the codes. Group-wise, the codes are unpacked once.

    Args:
        x: float `[batch, ..., in]`.
        weight: The packed codes and zero points.
        scales: float `[n, out, groups]`.
        choice: int64 `[batch]`, the scale that each sample uses.

    Returns:
        `[batch, ..., out]` in the dtype of `x`.
    """
    _check_input(x, weight.in_features)
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), weight.in_features)
    if _scales_output(x, scales[0]):
        product = _product(rows.reshape(-1, weight.in_features), weight)
        y = product.view(*rows.shape[:-1], -1).mul_(scales[choice, :, 0][:, None, :])
    else:
        y = _mixed_group_wise(rows, weight, scales, choice)
    return y.reshape(*x.shape[:-1], weight.out_features)


def centred_blocks(weight: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield `(start, stop, codes - zero_point)` for blocks of rows, the codes as `[stop - start, groups, in /
    groups]`."""
    tiles = max(1, BLOCK_SIZE // (TILE_ROWS * weight.in_features))
    groups = weight.zero_point.shape[1]
    for tile in range(0, weight.planes.shape[0], tiles):
        start, stop = tile * TILE_ROWS, min((tile + tiles) * TILE_ROWS, weight.out_features)
        codes = unpack(weight.planes[tile : tile + tiles], stop - start, weight.in_features)
        zero_point = weight.zero_point[start:stop].to(dtype)[..., None]
        # a uint8 tensor minus a float one: conversion and difference in one pass
        yield start, stop, codes.reshape(stop - start, groups, -1) - zero_point


class _PerChannel(torch.autograd.Function):
    """`y = (x (q - z)^T) * s`; x: [rows, in], s: [out, 1].

    Kept for the backward are `y`, which the next layer mostly keeps anyway, and `s`: neither `x` nor a weight. The
    product
    comes back as `y / s`; a scale of exactly zero takes part as 1e-30, so that its gradient survives.
    """

    @staticmethod
    def forward(ctx, x, scale, planes, zero_point, out_features, in_features):
        weight = PackedWeight(planes, zero_point, out_features, in_features)
        scale = scale[:, 0]
        scale = torch.where(scale == 0, torch.full_like(scale, _TINY), scale)
        y = _product(x, weight).mul_(scale)
        ctx.save_for_backward(y, scale, planes, zero_point)
        ctx.size = (out_features, in_features)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, scale, planes, zero_point = ctx.saved_tensors
        grad_x = grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = ((grad * y).sum(0, dtype=_sum_dtype(grad)) / scale).to(scale.dtype)[:, None]
        if ctx.needs_input_grad[0]:
            scaled = (grad * scale).to(grad.dtype)
            grad_x = _product_backward(scaled, PackedWeight(planes, zero_point, *ctx.size))
        return grad_x, grad_scale, None, None, None, None


class _Product(torch.autograd.Function):
    """`x (q - z)^T`, differentiable in `x` `[rows, in]`."""

    @staticmethod
    def forward(ctx, x, planes, zero_point, out_features, in_features):
        ctx.save_for_backward(planes, zero_point)
        ctx.size = (out_features, in_features)
        return _product(x, PackedWeight(planes, zero_point, out_features, in_features))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _product_backward(grad, PackedWeight(*ctx.saved_tensors, *ctx.size)), None, None, None, None


class _GroupWise(torch.autograd.Function):
    """`y = x (s * (q - z))^T` with a scale per group; x: [rows, in], s: [out, groups]. Keeps `x` for the backward."""

    @staticmethod
    def forward(ctx, x, scale, planes, zero_point, out_features, in_features):
        weight = PackedWeight(planes, zero_point, out_features, in_features)
        ctx.save_for_backward(x, scale, planes, zero_point)
        ctx.size = (out_features, in_features)
        y = x.new_empty(x.shape[0], out_features)
        for start, stop, block in centred_blocks(weight, x.dtype):
            block.mul_(scale[start:stop, :, None])
            y[:, start:stop] = linear(x, block.view(stop - start, in_features))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, scale, planes, zero_point = ctx.saved_tensors
        weight = PackedWeight(planes, zero_point, *ctx.size)
        grad_x = None
        grad_scale = torch.empty_like(scale) if ctx.needs_input_grad[1] else None
        for start, stop, block in centred_blocks(weight, x.dtype):
            grad_rows = grad[:, start:stop]
            if grad_scale is not None:
                grad_weight = linear(grad_rows.t(), x.t()).view(block.shape)
                grad_scale[start:stop] = grad_weight.mul_(block).sum(-1, dtype=_sum_dtype(grad))
            if ctx.needs_input_grad[0]:
                part = linear(grad_rows, block.mul_(scale[start:stop, :, None]).view(stop - start, -1).t())
                grad_x = part if grad_x is None else grad_x.add_(part)
        return grad_x, grad_scale, None, None, None, None


def _product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """`x (q - z)^T`: [rows, in] -> [rows, out]."""
    y = x.new_empty(x.shape[0], weight.out_features)
    for start, stop, block in centred_blocks(weight, x.dtype):
        product = linear(x, block.view(stop - start, -1))
        if stop - start == weight.out_features:
            return product
        y[:, start:stop] = product
    return y


def _product_backward(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """`grad (q - z)`: [rows, out] -> [rows, in]."""
    parts = (
        linear(grad[:, start:stop], block.view(stop - start, -1).t())
        for start, stop, block in centred_blocks(weight, grad.dtype)
    )
    return functools.reduce(torch.Tensor.add_, parts)


def _mixed_group_wise(
    rows: torch.Tensor, weight: PackedWeight, scales: torch.Tensor, choice: torch.Tensor
) -> torch.Tensor:
    """rows: [batch, n, in] -> [batch, n, out], each sample with its own group-wise scale."""
    y = rows.new_empty(*rows.shape[:-1], weight.out_features)
    for start, stop, block in centred_blocks(weight, rows.dtype):
        for index in choice.unique().tolist():
            samples = choice == index
            own = rows[samples]
            scaled = (block * scales[index, start:stop, :, None]).to(rows.dtype).view(stop - start, -1)
            y[samples, :, start:stop] = linear(own.flatten(0, 1), scaled).view(*own.shape[:2], stop - start)
    return y


def _scales_output(x: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether the scale is applied to the product. Not in float16, whose range the bare product with integers may
    leave."""
    return scale.shape[-1] == 1 and x.dtype != torch.float16


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_input(x: torch.Tensor, in_features: int) -> None:
    if not x.is_floating_point():
        raise TypeError(f"the input has dtype {x.dtype}; a packed linear layer takes float inputs (x.float()).")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"the input has shape {tuple(x.shape)}, but this layer takes in_features={in_features} as the last "
            f"dimension."
        )
