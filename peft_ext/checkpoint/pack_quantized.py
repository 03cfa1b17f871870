# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""compressed-tensors `pack-quantized`: what stock transformers and vLLM load, written from and read into packed layers.

Writing hangs on transformers' own hook: `save_pretrained` asks `model.hf_quantizer` for the state dict. Packing is the library's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CompressedTensorsConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.uniform import UNIFORM_BITS, Quantized


def make_saveable(model: nn.Module) -> None:
    """Let `model.save_pretrained` write pack-quantized. Other modules than transformers' are left alone.

    The model's config names the format from now on, as that of a checkpoint that was loaded from it would.
    """
    if not isinstance(model, PreTrainedModel):
        return
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        model.hf_quantizer = PackQuantizedWriter(model)
        model.config.quantization_config = model.hf_quantizer.quantization_config
    elif isinstance(getattr(model, "hf_quantizer", None), PackQuantizedWriter) or _was_loaded_compressed(model):
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config


class PackQuantizedWriter(HfQuantizer):
    """Hands `save_pretrained` the state dict of a model with [`PackedLinear`] layers as compressed-tensors stores it."""

    requires_calibration = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(quantization_config(model), pre_quantized=True)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """State dict with `weight_packed`, `weight_scale`, `weight_zero_point`, `weight_shape` for each packed layer.

        Raises:
            ValueError: If a layer was a `Conv1D`, which the format doesn't know.
        """
        # the layers may have changed since the model was handed out; the file and its config must agree
        self.quantization_config = model.config.quantization_config = quantization_config(model)
        state_dict = model.state_dict()
        for name, layer in _packed_layers(model).items():
            for key in ("planes", "scale", "zero_point"):
                state_dict.pop(f"{name}.{key}")
            state_dict.update({f"{name}.{key}": tensor for key, tensor in compress(layer).items()})
        return state_dict, {}


def quantization_config(model: nn.Module) -> CompressedTensorsConfig:
    """The `quantization_config` of a model's packed layers, one group for each format among them."""
    layers = _packed_layers(model)
    formats: dict[tuple[int, int, bool], list[str]] = {}
    for name, layer in layers.items():
        formats.setdefault((layer.bits, layer.group_size, layer.sym), []).append(name)
    groups = {}
    for index, ((bits, group_size, sym), names) in enumerate(formats.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": sym,
            "strategy": "channel" if group_size == -1 else "group",
            "group_size": None if group_size == -1 else group_size,
        }
        # by class where all layers are alike: what engines that fuse q, k and v expect
        groups[f"group_{index}"] = {"targets": ["Linear"] if len(formats) == 1 else names, "weights": weights}
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return CompressedTensorsConfig(
        config_groups=groups, format="pack-quantized", quantization_status="compressed", ignore=others
    )


def compress(layer: PackedLinear) -> dict[str, torch.Tensor]:
    """A packed layer's tensors under compressed-tensors' names; `weight_zero_point` for asymmetric formats only."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    def signed(values: torch.Tensor) -> torch.Tensor:
        return (values.to(torch.int16) - 2 ** (layer.bits - 1)).to(torch.int8)

    tensors = {
        "weight_packed": pack_to_int32(signed(layer.codes()), layer.bits),
        "weight_scale": layer.scale.detach().clone(),
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }
    if not layer.sym:
        tensors["weight_zero_point"] = pack_to_int32(signed(layer.zero_point), layer.bits, packed_dim=0)
    return tensors


def is_compressed(module: nn.Module) -> bool:
    """Whether a layer was loaded by transformers from a compressed-tensors checkpoint."""
    scheme = getattr(module, "quantization_scheme", None)
    return isinstance(module, nn.Linear) and getattr(scheme, "weights", None) is not None


def take_over(module: nn.Module, name: str) -> PackedLinear:
    """The packed layer with the very codes, zero points and scales of a pack-quantized one.

    Raises:
        ValueError: If the layer's format has no packed counterpart here; names the layer and what it has.
    """
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    check_taken_over(module, name)
    weights = module.quantization_scheme.weights
    if not hasattr(module, "weight_packed"):
        compress_module(module)  # a forward pass has decompressed it; its values lie on the grid, so this is exact
    bits, middle = weights.num_bits, 2 ** (weights.num_bits - 1)
    shape = torch.Size(module.weight_shape.tolist())
    scale = module.weight_scale.detach()
    scale = scale.reshape(shape[0], -1)
    codes = unpack_from_int32(module.weight_packed, bits, shape)
    if weights.symmetric:
        zero_point = torch.full_like(scale, middle, dtype=torch.uint8)
    else:
        zero_point = unpack_from_int32(module.weight_zero_point, bits, scale.shape, packed_dim=0)
        zero_point = _unsigned(zero_point, middle)
    quantized = Quantized(_unsigned(codes, middle), scale.clone(), zero_point)
    return PackedLinear.from_quantized(quantized, bits, module.bias, sym=bool(weights.symmetric))


def check_taken_over(module: nn.Module, name: str) -> None:
    """Refuse compressed layers that aren't uniform integers per channel or group in a width that we have.

    Raises:
        ValueError: Names the layer and what it has.
    """
    scheme = module.quantization_scheme
    weights = scheme.weights
    found = f"{weights.num_bits}-bit {weights.type} per {weights.strategy}"
    if weights.type != "int" or weights.num_bits not in UNIFORM_BITS or weights.strategy not in ("channel", "group"):
        raise ValueError(f"layer {name!r} is {found}; only integers of {UNIFORM_BITS} bits per channel or group fit.")
    if scheme.input_activations is not None or scheme.output_activations is not None:
        raise ValueError(f"layer {name!r} quantises activations too; only weight-only checkpoints can be tuned.")
    if weights.actorder not in (None, "static", "weight") or hasattr(module, "weight_g_idx"):
        raise ValueError(f"layer {name!r} orders its groups by activation (g_idx), which packed layers don't have.")


def release_hook(model: nn.Module) -> None:
    """Remove compressed-tensors' decompress-at-first-forward hook once no layer of its own is left."""
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None and not any(is_compressed(module) for module in model.modules()):
        hook.remove()
        del model.ct_decompress_hook


def _packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    for name, layer in layers.items():
        if layer.conv1d:
            raise ValueError(
                f"layer {name!r} was a Conv1D, which compressed-tensors can't store. Save merge_and_unload(dequantize=True) "
                "instead, or keep the adapter beside the float model (data-free starts are derived again at load)."
            )
    return layers


def _was_loaded_compressed(model: PreTrainedModel) -> bool:
    config = getattr(model.config, "quantization_config", None)
    return isinstance(config, CompressedTensorsConfig) and not any(is_compressed(m) for m in model.modules())


def _unsigned(values: torch.Tensor, middle: int) -> torch.Tensor:
    return (values.to(torch.int16) + middle).to(torch.uint8)
