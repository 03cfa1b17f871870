# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How a model's layers become packed under a [`PeqaConfig`]: which ones, by which start, and what can't be."""

from __future__ import annotations

import warnings
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import skip_init_on_device
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext.checkpoint import pack_quantized
from peft_ext.peqa.config import PeqaConfig
from peft_ext.quant.calibrated import quantize_calibrated
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.uniform import Quantized, check_format, quantize


def bits_of(config: PeqaConfig, name: str) -> int:
    """Width of the layer called `name`: its entry in `bits_pattern`, or `bits`."""
    pattern = config.bits_pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), config.bits)


def is_packed(module: nn.Module) -> bool:
    """Whether a layer has codes already: ours, or those of a compressed-tensors checkpoint."""
    return isinstance(module, PackedLinear) or pack_quantized.is_compressed(module)


@skip_init_on_device
def pack_layer(
    module: Any,
    config: PeqaConfig,
    name: str,
    hessian: Optional[torch.Tensor] = None,
    shift: Optional[torch.Tensor] = None,
) -> PackedLinear:
    """The packed counterpart of a layer. Codes that exist are taken over; a float weight is quantised.

    Args:
        module: `nn.Linear`, `Conv1D`, a compressed-tensors layer or a [`PackedLinear`].
        config: Format and start.
        name: The layer's name, for messages and `bits_pattern`.
        hessian, shift: `[in, in]`, for the calibrated start; see `quantize_calibrated`.
    """
    if isinstance(module, PackedLinear):
        return module
    if pack_quantized.is_compressed(module):
        return pack_quantized.take_over(module, name)
    conv1d, bits = isinstance(module, Conv1D), bits_of(config, name)
    weight = module.weight.detach()
    weight = weight.t() if conv1d else weight
    try:
        if weight.device.type == "meta":
            quantized = _empty_quantized(weight, config.group_size)
        elif hessian is not None:
            quantized = quantize_calibrated(weight, hessian, bits, config.group_size, config.sym, shift=shift)
        else:
            # a calibrated start that saw no input for this layer falls back on the best without data
            method = "minmax" if config.init_method == "calibrated" else config.init_method
            quantized = quantize(weight, bits, config.group_size, config.sym, method)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    return PackedLinear.from_quantized(
        quantized, bits, module.bias, sym=config.sym, conv1d=conv1d, compute_dtype=weight.dtype
    )


def free_weight(module: nn.Module, model: nn.Module) -> None:
    """Let go of the float weight of a layer that a packed one has replaced: PEFT, or a hook, holds the layer until the
    last one is packed.

    A layer that the model has under another name too keeps its weight, and so does a module that a weight is tied to.
    """
    if isinstance(module, (nn.Linear, Conv1D)) and not any(other is module for other in model.modules()):
        module.weight = None


def to_float(layer: PackedLinear) -> nn.Module:
    """The plain `nn.Linear` or `Conv1D` with a packed layer's weight, in the dtype that it had before."""
    weight = layer.weight
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


def check_target(module: Any, config: PeqaConfig, name: str) -> None:
    """Refuse, before anything is changed, a layer that can't be tuned under this config.

    Raises:
        ValueError: Names the layer, what it has and what to pass instead.
    """
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, PackedLinear):
        _check_format_of_base(config, name, module.in_features, module.bits, module.group_size, module.sym)
    elif pack_quantized.is_compressed(module):
        pack_quantized.check_taken_over(module, name)
        weights = module.quantization_scheme.weights
        group_size = weights.group_size if weights.strategy == "group" else -1
        _check_format_of_base(config, name, module.in_features, weights.num_bits, group_size, bool(weights.symmetric))
    elif isinstance(module, (nn.Linear, Conv1D)):
        _check_float_layer(module, config, name)
    else:
        raise ValueError(
            f"Target module {name!r} is a {type(module).__name__}, which is not supported. Currently, only "
            "`torch.nn.Linear` and `Conv1D` are; leave it out of `target_modules` or name it in `exclude_modules`."
        )


def _check_float_layer(module: Any, config: PeqaConfig, name: str) -> None:
    weight, conv1d = module.weight, isinstance(module, Conv1D)
    hook = getattr(module, "_hf_hook", None)
    if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook])):
        raise ValueError(
            f"layer {name!r} is offloaded, so its weight isn't there to be quantised; load the model without offload "
            "(device_map=None or a device that holds it). Packed, it takes a fraction of the memory."
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"layer {name!r} has a {weight.dtype} weight in a format that is unknown here; load the float model."
        )
    try:
        check_format(bits_of(config, name), config.group_size, weight.shape[0] if conv1d else weight.shape[1])
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    if weight.device.type != "meta" and not torch.isfinite(weight).all():
        raise ValueError(f"the weight of layer {name!r} has NaN or infinity; repair or reload the model.")
    if config.fan_in_fan_out and not conv1d:
        message = f"fan_in_fan_out is set to True but {name!r} is a `torch.nn.Linear`; it is read as False there."
        warnings.warn(message, stacklevel=2)


def _check_format_of_base(
    config: PeqaConfig, name: str, in_features: int, bits: int, group_size: int, sym: bool
) -> None:
    """The codes of a packed base are kept as they are, so the config must describe them."""

    def normal(size: int) -> int:
        return -1 if size == in_features else size  # a single group is the whole channel

    found = {"bits": bits, "group_size": normal(group_size), "sym": sym}
    asked = {"bits": bits_of(config, name), "group_size": normal(config.group_size), "sym": config.sym}
    if asked != found:
        differing = {key: value for key, value in found.items() if asked[key] != value}
        raise ValueError(
            f"layer {name!r} is quantised already with {differing}, but the config asks for "
            f"{ {key: asked[key] for key in differing} }. Its codes are never rounded again: pass "
            f"{', '.join(f'{key}={value}' for key, value in differing.items())}, or start from the float model."
        )


def _empty_quantized(weight: torch.Tensor, group_size: int) -> Quantized:
    """Tensors of the right size on the meta device."""
    groups = 1 if group_size == -1 else weight.shape[1] // group_size
    scale = torch.empty(weight.shape[0], groups, device="meta", dtype=torch.promote_types(weight.dtype, torch.float32))
    return Quantized(
        torch.empty(weight.shape, device="meta", dtype=torch.uint8), scale, torch.empty_like(scale, dtype=torch.uint8)
    )
