# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Products with packed weights, and their gradients, without a gradient of the weight's size.

Per channel, `u = x (q - z)^T` and `y = u * s`, so `dL/ds_o = sum_t g_to u_to`: nothing of size `[out, in]` is
computed, let alone kept. Gradients of group-wise scales and of a binary coding's alphas reduce `g^T x` against the
codes, a block of rows at a time. The backward unpacks the codes again; a dequantised weight never outlives a block.

Float zero points may be trained, too: `dL/dz_o = -s_o sum_t g_to X_t`, with `X_t` the sum of a row's inputs (of a group).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple, Optional, Union

import torch
from torch.autograd.function import once_differentiable

from peft_ext.quant import kernel
from peft_ext.quant.matmul import linear
from peft_ext.quant.packing import TILE_ROWS, unpack, unpack_signs


# Weights unpacked at a time (16 MiB in float32): enough for a fast matmul, little beside a layer of a 7B model.
BLOCK_SIZE = 1 << 22
# Stands in for a scale of exactly zero, so that the product can be had back from the output, see _PerChannel.
_TINY = 1e-30


class PackedWeight(NamedTuple):
    """The frozen part of a packed weight, uniform or in binary coding.

    Args:
        planes: uint8 `[tiles, input bytes, bits, 32]`, see `packing.py`.
        zero_point: uint8 or float `[out, groups]`; None for binary coding.
        out_features, in_features: Size of the weight.
    """

    planes: torch.Tensor
    zero_point: Optional[torch.Tensor]
    out_features: int
    in_features: int


def packed_linear(
    x: torch.Tensor,
    weight: Union[PackedWeight, tuple[torch.Tensor, Optional[torch.Tensor], int, int]],
    scale: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    *,
    keep_product: bool = False,
    trained_planes: Optional[int] = None,
) -> torch.Tensor:
    """`x (scale * (codes - zero_point))^T + bias`, or `x (sum_p alpha_p B_p)^T + bias`.

    Differentiable in `x`, `scale`, `bias`, and float zero points. Without gradients, few rows on a CPU go to the kernel,
    whose activations are rounded to 8 bits; see `kernel.py`.

    Args:
        x: float `[..., in]`.
        weight: The packed codes and zero points.
        scale: float `[out, groups]`; of a binary coding the alphas `[out, groups, bits]`.
        bias: float `[out]` or None.
        keep_product: Per channel, keep `x (q - z)^T` for the backward instead of the output. Needs more memory; lets
            the model change the output in place. Without effect on group-wise scales and binary coding.
        trained_planes: Compute the gradient of the first alphas only (the others' is zero); all by default. Without
            effect on uniform codes.

    Returns:
        `[..., out]` in the dtype of `x`.

    Raises:
        TypeError: If `x` isn't float.
        ValueError: If the last dimension of `x` isn't the weight's number of inputs, or something else doesn't fit the weight.
    """
    planes, zero_point, out_features, in_features = weight
    bits, groups = kernel.check(x, planes, scale, zero_point, bias, out_features, in_features)
    found = kernel.packed_linear(x, planes, scale, zero_point, bias, (out_features, in_features, bits, groups))
    if found is not None:
        return found
    return unpacked_linear(x, PackedWeight(*weight), scale, bias, keep_product, trained_planes)


def unpacked_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    scale: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    keep_product: bool = False,
    trained_planes: Optional[int] = None,
) -> torch.Tensor:
    """[`packed_linear`] by torch's own operations, which unpack the codes, whatever the kernel could do."""
    rows = x.reshape(math.prod(x.shape[:-1]), weight.in_features)
    if not _scales_output(x, weight, scale):
        y = _Blockwise.apply(rows, scale, trained_planes, *weight)
    elif keep_product:
        y = (_Product.apply(rows, *weight) * scale[:, 0]).to(x.dtype)
    else:
        y = _PerChannel.apply(rows, scale, *weight)
    return _add_bias(y.view(*x.shape[:-1], weight.out_features), bias)


@torch.no_grad()
def mixed_packed_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    scales: torch.Tensor,
    choice: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """A batch whose samples use different scales on the same codes; for inference.

    Per channel, all samples share one product with the codes. Otherwise the codes are unpacked once.

    Args:
        x: float `[batch, ..., in]`.
        weight: The packed codes and zero points; float ones may be `[n, out, groups]`, one for each of the scales.
        scales: float `[n, out, groups]`, or alphas `[n, out, groups, bits]`.
        choice: int64 `[batch]`, the scale that each sample uses.
        bias: float `[out]` or None.

    Returns:
        `[batch, ..., out]` in the dtype of `x`.

    Raises:
        TypeError: If `x` isn't float.
        ValueError: If something doesn't fit the weight, or `choice` isn't an index of a scale for each sample.
    """
    samples = x.shape[0] if x.dim() > 1 else 0
    planes, zero_point, out_features, in_features = weight
    size = kernel.check(x, planes, scales, zero_point, bias, out_features, in_features, choice, samples)
    of_row = choice if x.dim() == 2 else choice.repeat_interleave(math.prod(x.shape[1:-1]))
    found = kernel.packed_linear(x, planes, scales, zero_point, bias, (out_features, in_features, *size), of_row)
    return mixed_unpacked_linear(x, weight, scales, choice, bias) if found is None else found


def mixed_unpacked_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    scales: torch.Tensor,
    choice: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """[`mixed_packed_linear`] by torch's own operations."""
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), weight.in_features)
    if weight.zero_point is not None and weight.zero_point.dim() == 3:
        y = _mixed_zero_points(rows, weight, scales, choice)
    elif _scales_output(x, weight, scales[0]):
        product = _product(rows.flatten(0, 1), weight)
        # unlike an index in brackets, it refuses negative ones on every device
        y = product.view(*rows.shape[:-1], -1).mul_(scales[..., 0].index_select(0, choice)[:, None, :])
    else:
        y = _mixed_group_wise(rows, weight, scales, choice)
    return _add_bias(y.reshape(*x.shape[:-1], weight.out_features), bias)


def code_blocks(weight: PackedWeight, groups: int, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Unpack a block of rows at a time.

    Yields:
        `(start, stop, block)` with rows `start` to `stop`; `block` is `codes - zero_point` `[rows, groups, in /
        groups]`, or the signs `[bits, rows, groups, in / groups]` of a binary coding. In `dtype`, and with float zero
        points in float32 at least: half precision would move all weights of a group by as much as it rounds the zero point.
    """
    planes_at_once = 1 if weight.zero_point is not None else weight.planes.shape[2]
    tiles = max(1, BLOCK_SIZE // (TILE_ROWS * max(1, weight.in_features) * planes_at_once))
    for tile in range(0, weight.planes.shape[0], tiles):
        start, stop = tile * TILE_ROWS, min((tile + tiles) * TILE_ROWS, weight.out_features)
        planes = weight.planes[tile : tile + tiles]
        if weight.zero_point is None:
            signs = unpack_signs(planes, stop - start, weight.in_features, dtype)
            yield start, stop, signs.reshape(planes_at_once, stop - start, groups, weight.in_features // groups)
        else:
            codes = unpack(planes, stop - start, weight.in_features)
            codes = codes.reshape(stop - start, groups, weight.in_features // groups)
            # a uint8 tensor minus a float one: conversion and difference in one pass
            yield (
                start,
                stop,
                codes - weight.zero_point[start:stop].detach().to(_block_dtype(weight, dtype))[..., None],
            )


def _block_dtype(weight: PackedWeight, dtype: torch.dtype) -> torch.dtype:
    zero_point = weight.zero_point
    if zero_point is None or not zero_point.is_floating_point():
        return dtype
    return torch.promote_types(torch.promote_types(dtype, zero_point.dtype), torch.float32)


def _dense(
    block: torch.Tensor, scale: torch.Tensor, in_place: bool = False, dtype: Optional[torch.dtype] = None
) -> torch.Tensor:
    """The float weight `[rows, in]` of a block of codes or signs, in `dtype` (the block's by default).

    scale: `[rows, groups(, bits)]`.
    """
    if block.dim() == 3:
        weight = block.mul_(scale[..., None]) if in_place else (block * scale[..., None]).to(block.dtype)
    else:
        weight = (block[0] * scale[..., 0, None]).to(block.dtype)
        for plane in range(1, len(block)):
            weight.addcmul_(block[plane], scale[..., plane, None].to(block.dtype))
    return weight.flatten(1).to(dtype or block.dtype)


def _gradient_of_scale(grad_weight: torch.Tensor, block: torch.Tensor, trained_planes: Optional[int]) -> torch.Tensor:
    """What `_dense` makes of a weight's gradient `[rows, in]`: `[rows, groups]`, or `[rows, groups, trained planes]`."""
    groups = grad_weight.view(block.shape[-3:])
    if block.dim() == 3:
        return (groups * block).sum(-1, dtype=_sum_dtype(groups))
    planes = block if trained_planes is None else block[:trained_planes]
    return torch.stack([(groups * plane).sum(-1, dtype=_sum_dtype(groups)) for plane in planes], -1)


class _PerChannel(torch.autograd.Function):
    """`y = (x (q - z)^T) * s`; x: [rows, in], s: [out, 1].

    Kept for the backward are `y`, which the next layer mostly keeps anyway, and `s`: neither `x` nor a weight. The
    product comes back as `y / s`; a scale of exactly zero takes part as 1e-30, so that its gradient survives. Where zero
    points are trained, the sum of each row's inputs is kept as well.
    """

    @staticmethod
    def forward(ctx, x, scale, planes, zero_point, out_features, in_features):
        weight = PackedWeight(planes, zero_point, out_features, in_features)
        scale = scale[:, 0]
        scale = torch.where(scale == 0, torch.full_like(scale, _TINY), scale)
        y = _product(x, weight).mul_(scale)
        # a frozen scale has no use for the output: PEFT's other tuners train beside it, and some add to it in place
        kept = y if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, scale, planes, zero_point, _sum_of_inputs(ctx.needs_input_grad[3], x))
        ctx.size = (out_features, in_features)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, scale, planes, zero_point, inputs = ctx.saved_tensors
        grad_x = grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:
            grad_scale = ((grad * y).sum(0, dtype=_sum_dtype(grad)) / scale).to(scale.dtype)[:, None]
        if inputs is not None:
            grad_zero_point = (_gradient_of_zero_point(grad, inputs) * scale[:, None]).to(zero_point.dtype)
        if ctx.needs_input_grad[0]:
            scaled = (grad * scale).to(grad.dtype)
            grad_x = _product_backward(scaled, PackedWeight(planes, zero_point, *ctx.size))
        return grad_x, grad_scale, None, grad_zero_point, None, None


class _Product(torch.autograd.Function):
    """`x (q - z)^T`, differentiable in `x` `[rows, in]` and float `z`."""

    @staticmethod
    def forward(ctx, x, planes, zero_point, out_features, in_features):
        ctx.save_for_backward(planes, zero_point, _sum_of_inputs(ctx.needs_input_grad[2], x))
        ctx.size = (out_features, in_features)
        return _product(x, PackedWeight(planes, zero_point, out_features, in_features))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        planes, zero_point, inputs = ctx.saved_tensors
        grad_x = grad_zero_point = None
        if inputs is not None:
            grad_zero_point = _gradient_of_zero_point(grad, inputs).to(zero_point.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = _product_backward(grad, PackedWeight(planes, zero_point, *ctx.size))
        return grad_x, None, grad_zero_point, None, None


class _Blockwise(torch.autograd.Function):
    """`y = x W^T` with `W` of group-wise scales or a binary coding, a block of rows at a time; x: [rows, in].

    Keeps `x` for the backward.
    """

    @staticmethod
    def forward(ctx, x, scale, trained_planes, planes, zero_point, out_features, in_features):
        weight = PackedWeight(planes, zero_point, out_features, in_features)
        ctx.save_for_backward(x, scale, planes, zero_point)
        ctx.size, ctx.trained_planes = (out_features, in_features), trained_planes
        y = x.new_empty(x.shape[0], out_features)
        for start, stop, block in code_blocks(weight, scale.shape[1], x.dtype):
            y[:, start:stop] = linear(x, _dense(block, scale[start:stop], in_place=True, dtype=x.dtype))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, scale, planes, zero_point = ctx.saved_tensors
        weight = PackedWeight(planes, zero_point, *ctx.size)
        grad_x = grad_zero_point = None
        if ctx.needs_input_grad[4]:
            groups = scale.shape[1]
            inputs = x.reshape(len(x), groups, x.shape[1] // groups).sum(-1, dtype=_sum_dtype(x))
            grad_zero_point = (_gradient_of_zero_point(grad, inputs) * scale).to(zero_point.dtype)
        grad_scale = torch.zeros_like(scale) if ctx.needs_input_grad[1] else None
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            return None, None, None, None, grad_zero_point, None, None
        for start, stop, block in code_blocks(weight, scale.shape[1], x.dtype):
            grad_rows = grad[:, start:stop]
            if grad_scale is not None:
                found = _gradient_of_scale(linear(grad_rows.t(), x.t()), block, ctx.trained_planes)
                rows = grad_scale[start:stop]
                (rows if rows.dim() == 2 else rows[..., : found.shape[-1]]).copy_(found)
            if ctx.needs_input_grad[0]:
                dense = _dense(block, scale[start:stop], in_place=True, dtype=x.dtype)
                part = linear(grad_rows, dense.t())
                grad_x = part if grad_x is None else grad_x.add_(part)
        return grad_x, grad_scale, None, None, grad_zero_point, None, None


def _sum_of_inputs(wanted: bool, x: torch.Tensor) -> Optional[torch.Tensor]:
    """`[rows, 1]`, of `x` `[rows, in]`; None unless it is wanted."""
    return x.sum(-1, keepdim=True, dtype=_sum_dtype(x)) if wanted else None


def _gradient_of_zero_point(grad: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """`[out, groups]` for a scale of 1. grad: `[rows, out]`; inputs: sums over the groups `[rows, groups]`."""
    return -(grad.t().to(inputs.dtype) @ inputs)


def _product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """`x (q - z)^T`: [rows, in] -> [rows, out]."""
    y = x.new_empty(x.shape[0], weight.out_features)
    for start, stop, block in code_blocks(weight, 1, x.dtype):
        product = linear(x, block.view(stop - start, weight.in_features).to(x.dtype))
        if stop - start == weight.out_features:
            return product
        y[:, start:stop] = product
    return y


def _product_backward(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """`grad (q - z)`: [rows, out] -> [rows, in]."""
    parts = (
        linear(grad[:, start:stop], block.view(stop - start, weight.in_features).to(grad.dtype).t())
        for start, stop, block in code_blocks(weight, 1, grad.dtype)
    )
    return functools.reduce(torch.Tensor.add_, parts)


def _mixed_group_wise(
    rows: torch.Tensor, weight: PackedWeight, scales: torch.Tensor, choice: torch.Tensor
) -> torch.Tensor:
    """rows: [batch, n, in] -> [batch, n, out], each sample with its own group-wise scale."""
    y = rows.new_empty(*rows.shape[:-1], weight.out_features)
    indices = choice.unique().tolist()
    kernel.check_range(indices, len(scales))
    for start, stop, block in code_blocks(weight, scales.shape[2], rows.dtype):
        for index in indices:
            samples = choice == index
            own = rows[samples]
            product = linear(own.flatten(0, 1), _dense(block, scales[index, start:stop], dtype=rows.dtype))
            y[samples, :, start:stop] = product.view(*own.shape[:2], stop - start)
    return y


def _mixed_zero_points(
    rows: torch.Tensor, weight: PackedWeight, scales: torch.Tensor, choice: torch.Tensor
) -> torch.Tensor:
    """rows: [batch, n, in] -> [batch, n, out], each sample with its own scale and zero point."""
    assert weight.zero_point is not None
    y = rows.new_empty(*rows.shape[:-1], weight.out_features)
    indices = choice.unique().tolist()
    kernel.check_range(indices, len(scales))
    for index in indices:
        samples, own = choice == index, weight._replace(zero_point=weight.zero_point[index])
        y[samples] = unpacked_linear(rows[samples], own, scales[index])
    return y


def _scales_output(x: torch.Tensor, weight: PackedWeight, scale: torch.Tensor) -> bool:
    """Whether the scale is applied to the product: one scale per channel, uniform codes.

    Not in float16, whose range the bare product with integers may leave.
    """
    return weight.zero_point is not None and scale.shape[-1] == 1 and x.dtype != torch.float16


def _add_bias(y: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
