# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`nn.Linear` and transformers' `Conv1D` to packed layers and back."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_ext.quant.embedding import float_embeddings, packed_ends
from peft_ext.quant.experts import fuse_experts
from peft_ext.quant.formats import NumberFormat, check_number_format
from peft_ext.quant.linear import PackedLinear


# What can be packed.
LINEAR_LAYERS = (nn.Linear, Conv1D)


def weight_of(layer: Any) -> torch.Tensor:
    """The weight `[out, in]`, whichever way round the layer stores it."""
    return layer.weight.t() if isinstance(layer, Conv1D) else layer.weight


def check_layer(name: str, layer: Any, number_format: NumberFormat) -> None:
    """Refuse a format that doesn't fit a layer.

    Raises:
        ValueError: Names the layer, the argument and what fits.
    """
    try:
        check_number_format(number_format, weight_of(layer).shape[1])
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def quantize_layer(
    module: Any,
    number_format: NumberFormat,
    method: str,
    name: str,
    hessian: Optional[torch.Tensor] = None,
    shift: Optional[torch.Tensor] = None,
) -> PackedLinear:
    """The packed counterpart of an `nn.Linear` or `Conv1D`, on the meta device if that is where it is.

    Args:
        module: The layer; its bias is kept.
        number_format, method: What to quantise to, and by which initialisation.
        name: The layer's name, for messages.
        hessian, shift: `[in, in]`, for the calibrated initialisation; see `quantize_calibrated`.

    Raises:
        ValueError: If the weight can't be quantised so; names the layer.
    """
    conv1d, weight = isinstance(module, Conv1D), weight_of(module).detach()
    if weight.device.type == "meta":
        return PackedLinear.empty(number_format, weight.shape, weight.dtype, module.bias, conv1d)
    try:
        quantized = number_format.quantize(weight, method, hessian, shift)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    sym = getattr(number_format, "sym", False)
    return PackedLinear.from_quantized(
        quantized, number_format.bits, module.bias, sym=sym, conv1d=conv1d, compute_dtype=weight.dtype
    )


def to_float(layer: PackedLinear) -> nn.Module:
    """The plain `nn.Linear` or `Conv1D` with a packed layer's weight, in the dtype that it had before."""
    weight = layer.dequantize().to(layer.compute_dtype)
    if layer.conv1d:
        module: Any = Conv1D(0, 0)
        module.nf, module.nx = layer.out_features, layer.in_features
        module.weight = nn.Parameter(weight.t().contiguous())
        module.bias = nn.Parameter(weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.data)
        return module
    module = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    module.weight = nn.Parameter(weight)
    module.bias = None if layer.bias is None else nn.Parameter(layer.bias.data)
    return module


def dequantize_layers(model: nn.Module, dtype: Optional[torch.dtype] = None) -> nn.Module:
    """Replace a model's packed layers and embeddings by float ones, and experts that are all float then by fused ones, as they
    were.

    Args:
        dtype: Of the float weights; their own by default.
    """
    if isinstance(model, PreTrainedModel):
        float_embeddings(model, dtype)
    for name, layer in packed_layers(model).items():
        model.set_submodule(name, to_float(layer).to(dtype))
    fuse_experts(model)
    return model


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model, by name, but for a head that is packed with the embedding (see `packed_ends`)."""
    ends = packed_ends(model)
    return {
        name: module for name, module in model.named_modules() if isinstance(module, PackedLinear) and name not in ends
    }


def float_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that could be packed and aren't, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_LAYERS) and not isinstance(module, PackedLinear)
    }
