# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The methods that PEQA is measured against: LoRA, QLoRA, rounding, and quantisation-aware training of all weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Optional

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.autograd.function import once_differentiable

from peft_ext import PeqaConfig, calibrate
from peft_ext.quant.linear import PackedLinear
from peft_ext.scale_tuning.config import ScaleTuningConfig


# The learned scales of quantisation-aware training move this many times faster than its weights: relative steps of
# about 1e-2 go with absolute steps of about 1e-4 in weights of size 1e-1.
_SCALE_PACE = 100.0


def lora(model: nn.Module, rank: int = 8) -> PeftModel:
    """LoRA on all linear layers but the output layer."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(model, config)


def qlora(model: nn.Module, rank: int = 8) -> PeftModel:
    """LoRA on weights in bitsandbytes' NF4 (blocks of 64, double quantisation), computed in float32.

    Raises:
        ImportError: If bitsandbytes isn't installed.
        RuntimeError: If its CPU build has no kernels for this machine.
    """
    import bitsandbytes as bnb

    output = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not output:
            model.set_submodule(name, _nf4(bnb, module))
    model.is_loaded_in_4bit = True  # what PEFT asks for before it builds its 4-bit LoRA layer
    return lora(model, rank)


def _nf4(bnb, linear: nn.Linear) -> nn.Module:
    """A bitsandbytes layer with the weight of `linear`; `.to` quantises."""
    with_bias = linear.bias is not None
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=with_bias,
        compute_dtype=linear.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    layer.bias = linear.bias
    return layer.to(linear.weight.device)


def quantized(model: nn.Module, config: ScaleTuningConfig, calibration: torch.Tensor) -> PeftModel:
    """The model under PEQA or AlphaTuning, untuned; `calibration` `[blocks, tokens]` is read only to calibrate."""
    if config.needs_data:
        model = calibrate(model, config, calibration.split(4), progressbar=False)
    return get_peft_model(model, config)


def rounded(model: nn.Module, config: PeqaConfig, calibration: torch.Tensor) -> nn.Module:
    """The model with the rounded weights in plain float layers."""
    return quantized(model, config, calibration).merge_and_unload(dequantize=True)


def quantization_aware(model: nn.Module, config: PeqaConfig, calibration: torch.Tensor) -> nn.Module:
    """All parameters trained, the linear layers through rounding with learned scales (straight through, as in LSQ).

    Weights start as close to the float ones as PEQA's codes allow, scales as PEQA's: what PEQA can reach, this can.

    Raises:
        TypeError: If the model has linear layers other than `nn.Linear`.
    """
    packed = quantized(copy.deepcopy(model), config, calibration).unload()
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLinear):
            linear = model.get_submodule(name)
            if type(linear) is not nn.Linear:
                raise TypeError(f"layer {name!r} is a {type(linear).__name__}; this comparison knows nn.Linear alone.")
            model.set_submodule(name, FakeQuantizedLinear(linear, layer))
    return model.requires_grad_(True)


class FakeQuantizedLinear(nn.Module):
    """A linear layer whose float weight `[out, in]` is rounded at every forward; weight and scale are trained."""

    def __init__(self, linear: nn.Linear, packed: PackedLinear) -> None:
        super().__init__()
        self.top = 2**packed.bits - 1
        self.weight = nn.Parameter(_inside_cells(linear.weight.detach(), packed))
        self.bias = linear.bias
        self.relative = nn.Parameter(torch.zeros_like(packed.scale))
        self.register_buffer("scale", packed.scale.detach().clone())
        self.register_buffer("zero_point", packed.zero_point.detach().to(packed.scale.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale * (1 + _SCALE_PACE * self.relative)
        weight = FakeQuantize.apply(self.weight, scale, self.zero_point, self.top)
        return nn.functional.linear(x, weight, self.bias)


def _inside_cells(weight: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """Each weight moved into the cell that rounds to its code, and no further. Returns `[out, in]`."""
    scale, rows = packed.scale.detach()[..., None], weight.shape[0]
    groups = weight.reshape(rows, scale.shape[1], -1)
    centred = packed.codes().reshape(groups.shape) - packed.zero_point[..., None].to(scale.dtype)
    # codes at the ends stand for everything beyond them, but a weight out there gets no gradient
    return torch.clamp(groups, (centred - 0.49) * scale, (centred + 0.49) * scale).reshape(weight.shape)


class FakeQuantize(torch.autograd.Function):
    """`scale * (clamp(round(w / scale) + z, 0, top) - z)`; gradients as in LSQ (Esser et al., 2020, eq. 3 and 5)."""

    @staticmethod
    def forward(ctx, weight, scale, zero_point, top):
        ratio = weight.view(*scale.shape, -1) / scale[..., None]
        zero_point = zero_point[..., None]
        codes = ratio.round().add_(zero_point)
        inside = (codes >= 0) & (codes <= top)
        centred = codes.clamp_(0, top).sub_(zero_point)
        value = (centred * scale[..., None]).view(weight.shape)
        ctx.save_for_backward(inside, centred.sub_(ratio.mul_(inside)))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inside, slope = ctx.saved_tensors
        groups = grad.reshape(inside.shape)
        return (groups * inside).view(grad.shape), (groups * slope).sum(-1), None, None


def adapter_bytes(model: nn.Module, folder: str) -> Optional[int]:
    """Size of a PEFT model's adapter file, written into an empty `folder`; None for a model without an adapter."""
    if not isinstance(model, PeftModel):
        return None
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
