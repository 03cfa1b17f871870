# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Models of which compressed-tensors has some layers as packed integers and others otherwise (FP8, W8A8): the integers become
packed layers, the others stay what stock transformers made of them, in memory, in training and in the file.

Stock transformers decompresses these others at the first forward pass, and rounds their inputs where the scheme says so,
without a gradient: whatever lies below would train on the residual stream's gradient alone. Here the gradient goes straight
through the rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any, Optional

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from peft_ext.checkpoint import pack_quantized
from peft_ext.checkpoint.pack_quantized import OWN_BITS, StoredConfig, compress, container_of, is_compressed
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.packed_module import replace_layer
from peft_ext.tensor_files import PLACEHOLDER


def kept_layers(model: nn.Module) -> dict[str, Any]:
    """The compressed layers of a model that have no packed counterpart, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_compressed(module) and not pack_quantized.can_take_over(module)
    }


def check_room(model: nn.Module, layers: Iterable[str], packs: bool) -> None:
    """Refuse, before anything is trained, layers that no checkpoint could hold beside those that are kept.

    Args:
        model: May have kept layers.
        layers: Names of the layers to be tuned.
        packs: Whether they become uniform integers with whole zero points in `nn.Linear` layers.

    Raises:
        ValueError: Names a layer of either kind and the way out.
    """
    kept, first = kept_layers(model), next(iter(layers), None)
    if kept and first is not None and not packs:
        raise ValueError(
            f"layer {next(iter(kept))!r} ({len(kept)} such) is stored by compressed-tensors in a way that is kept as it is, and "
            f"a checkpoint that has it beside {first!r} can hold uniform integers with whole zero points alone. Use PeqaConfig "
            "(zero='int'), or start from the float model."
        )


class MixedPrecisionWriter(HfQuantizer):
    """Hands `save_pretrained` a state dict with packed layers as `pack-quantized` and compressed ones as they are stored.

    Args:
        model: Has compressed layers, and packed ones of uniform integers or none.
        container_bits: Width of what holds a code in the file; by default each layer's own.

    Raises:
        ValueError: If a packed layer doesn't fit; names it.
    """

    requires_calibration = True
    is_trainable = True

    def __init__(self, model: PreTrainedModel, container_bits: Optional[int] = None) -> None:
        self.container_bits = container_bits
        super().__init__(_describe(model, container_bits), pre_quantized=True)

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors of every layer under compressed-tensors' names."""
        # the layers may have changed since the model was handed out; file and config must agree
        self.quantization_config = _describe(model, self.container_bits)
        state_dict = model.state_dict()
        for name, layer in packed_layers(model).items():
            tensors = compress(layer, self.container_bits or container_of(layer.bits), layer.sym)
            _put(state_dict, name, ("planes", "scale", "zero_point"), tensors)
        for name, module in _compressed(model).items():
            _put(state_dict, name, module.state_dict(), _stored(module))
        return state_dict, dict(PLACEHOLDER)


def let_gradients_through(model: nn.Module) -> None:
    """Give layers that round their inputs or outputs the gradient of not rounding them; again is harmless."""
    for module in kept_layers(model).values():
        scheme = module.quantization_scheme
        rounds = scheme.input_activations is not None or scheme.output_activations is not None
        if rounds and "rounded_forward" not in vars(module):
            module.rounded_forward = module.forward
            module.forward = MethodType(_forward, module)


def kept_as_floats(model: PreTrainedModel) -> None:
    """Replace the kept layers by plain ones with the weights that they stand for; inputs are rounded no longer."""
    dtype = model.get_input_embeddings().weight.dtype
    for name, module in kept_layers(model).items():
        tensors = dict(module.state_dict())
        if module.quantization_status == QuantizationStatus.COMPRESSED:
            compressor = BaseCompressor.get_value_from_registry(_format(module))
            tensors = compressor.decompress(tensors, module.quantization_scheme)
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(tensors["weight"].detach().to(dtype), requires_grad=False)
        plain.bias = module.bias
        replace_layer(model, name, plain)
    pack_quantized.release_hook(model)


def stock_loads(model: nn.Module) -> bool:
    """Whether stock transformers loads what is saved of a model: beside kept layers it makes no room for zero points."""
    return not kept_layers(model) or all(getattr(layer, "sym", False) for layer in packed_layers(model).values())


def _forward(self: Any, input: torch.Tensor) -> torch.Tensor:
    """What compressed-tensors computes, with a gradient."""
    if not (torch.is_grad_enabled() and input.requires_grad) or not getattr(self, "quantization_enabled", True):
        return self.rounded_forward(input)
    scheme = self.quantization_scheme
    output = type(self).forward(self, _rounded(self, input, "input", scheme.input_activations))
    return _rounded(self, output, "output", scheme.output_activations)


def _rounded(module: nn.Module, value: torch.Tensor, kind: str, arguments: Any) -> torch.Tensor:
    if arguments is None:
        return value
    with torch.no_grad():
        difference = forward_quantize(module, value, kind, arguments) - value
    return value + difference


def _compressed(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if is_compressed(module)}


def _put(
    state_dict: dict[str, torch.Tensor], name: str, parts: Iterable[str], tensors: dict[str, torch.Tensor]
) -> None:
    for part in list(parts):
        state_dict.pop(f"{name}.{part}", None)
    state_dict.update({f"{name}.{part}": tensor for part, tensor in tensors.items()})


def _stored(module: Any) -> dict[str, torch.Tensor]:
    """A compressed layer's tensors as its format stores them, also once a forward pass has decompressed it: its values lie
    on the grid, so rounding them again is exact."""
    tensors = dict(module.state_dict())
    if module.quantization_status == QuantizationStatus.COMPRESSED:
        return tensors
    scheme = module.quantization_scheme
    return BaseCompressor.get_value_from_registry(_format(module)).compress(tensors, scheme)


def _format(module: Any) -> str:
    scheme = module.quantization_scheme
    stored = scheme.format or infer_module_format(type(module), scheme)
    return str(getattr(stored, "value", stored))


def _describe(model: PreTrainedModel, container_bits: Optional[int]) -> StoredConfig:
    """Write the format of all layers into the model's config, and return it."""
    groups: list[tuple[dict[str, Any], list[str]]] = []

    def add(scheme: dict[str, Any], name: str) -> None:
        names = next((names for other, names in groups if other == scheme), None)
        if names is None:
            groups.append((scheme, [name]))
        else:
            names.append(name)

    own_bits = {}
    for name, layer in packed_layers(model).items():
        _check_fits(name, layer, container_bits)
        add(_packed_scheme(layer, container_bits), name)
        if (container_bits or container_of(layer.bits)) != layer.bits:
            own_bits[name] = layer.bits
    kept = _compressed(model)
    for name, module in kept.items():
        stored = module.quantization_scheme.model_dump(exclude={"targets"})
        add({**stored, "format": _format(module)}, name)
    described = {name for _, names in groups for name in names}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    formats = {scheme["format"] for scheme, _ in groups}
    config = StoredConfig(
        config_groups={f"group_{index}": {**scheme, "targets": names} for index, (scheme, names) in enumerate(groups)},
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=[name for name in linear if name not in described],
    )
    model.config.quantization_config = config
    setattr(model.config, OWN_BITS, own_bits)
    return config


def _packed_scheme(layer: PackedLinear, container_bits: Optional[int]) -> dict[str, Any]:
    weights = {
        "num_bits": container_bits or container_of(layer.bits),
        "type": "int",
        "symmetric": layer.sym,
        "strategy": "channel" if layer.group_size == -1 else "group",
        "group_size": None if layer.group_size == -1 else layer.group_size,
    }
    return {"weights": weights, "format": "pack-quantized"}


def _check_fits(name: str, layer: PackedLinear, container_bits: Optional[int]) -> None:
    if not pack_quantized.has_room_for(layer):
        raise ValueError(
            f"layer {name!r} holds {layer.number_format.title}{' as Conv1D' if layer.conv1d else ''}, which compressed-tensors "
            "has no room for, and other layers of the model are stored by it; dequantise the packed ones "
            "(merge_and_unload(dequantize=True))."
        )
    if container_bits is not None and container_bits < layer.bits:
        raise ValueError(
            f"container_bits={container_bits} can't hold the codes of layer {name!r}, of {layer.bits} bits."
        )
