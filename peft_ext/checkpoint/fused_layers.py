# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Layers that vLLM runs as one, such as q, k and v: it takes them stored alike, all packed or all float.

vLLM 0.33 raises "Found different quantization schemes for the shards of ..." otherwise (`should_ignore_layer` of its
compressed-tensors reader, which looks each shard up in the config's `ignore`).
"""

from __future__ import annotations

from typing import Any, Optional

from torch import nn

from peft_ext.checkpoint.pack_quantized import is_compressed
from peft_ext.quant.conversion import quantize_layer
from peft_ext.quant.formats import Uniform
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.packed_module import replace_layer


# The `packed_modules_mapping` of vLLM's models, as far as these are kinds of linear layers that transformers keeps apart.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_FLOAT = "float"


def stored_apart(model: nn.Module, one_scheme: bool = True) -> list[dict[str, str]]:
    """The groups of layers that vLLM runs as one and that aren't stored alike: of each, what its layers are, by name.

    Args:
        model: With packed layers.
        one_scheme: Whether all packed layers share a scheme in the file, as [`PackQuantizedWriter`] stores them.
    """
    found = []
    for parent_name, parent in model.named_modules():
        for shards in FUSED:
            children = {name: getattr(parent, name, None) for name in shards}
            kinds = {
                f"{parent_name}.{name}".lstrip("."): _kind(child, one_scheme)
                for name, child in children.items()
                if isinstance(child, nn.Linear)
            }
            if len(set(kinds.values())) > 1:
                found.append(kinds)
    return found


def pack_the_rest(model: nn.Module) -> list[str]:
    """Pack the float layers that vLLM runs as one with packed ones, to these one's format, each weight to the nearest level.

    Returns:
        Their names.

    Raises:
        ValueError: If a group has layers that are neither float nor packed integers, or can't be packed so; names one.
    """
    packed = {}
    for kinds in stored_apart(model):
        layers = {name: model.get_submodule(name) for name in kinds}
        beside = [layer for layer in layers.values() if isinstance(layer, PackedLinear)]
        foreign = [
            name for name, kind in kinds.items() if kind != _FLOAT and not isinstance(layers[name], PackedLinear)
        ]
        if foreign:
            raise ValueError(
                f"layer {foreign[0]!r} is {kinds[foreign[0]]}, which can't be packed like the layers beside it; vLLM needs "
                "them alike, so quantise the float model again."
            )
        number_format: Any = max((layer.number_format for layer in beside), key=lambda one: one.bits)
        for name, layer in layers.items():
            if not isinstance(layer, PackedLinear):
                packed[name] = quantize_layer(layer, number_format, number_format.default_method, name)
    for name, layer in packed.items():
        replace_layer(model, name, layer)
    return list(packed)


def fused_notice(model: nn.Module, one_scheme: bool = True) -> Optional[str]:
    """What keeps vLLM from a model's checkpoint because of layers that it runs as one, and the way out; None: nothing."""
    groups = stored_apart(model, one_scheme)
    if not groups:
        return None
    kinds = groups[0]
    listed = ", ".join(f"{name.rsplit('.', 1)[-1]} {kind}" for name, kind in kinds.items())
    parent = next(iter(kinds)).rpartition(".")[0]
    can_pack = all(kind == _FLOAT or kind.startswith(Uniform.name) for group in groups for kind in group.values())
    way_out = "--pack_rest packs the rest" if can_pack else "quantise the float model again, these layers alike"
    return (
        f"vLLM won't run this checkpoint: it runs these layers as one and finds different quantization schemes in "
        f"{len(groups)} of them, such as {parent!r} ({listed}); {way_out}."
    )


def _kind(layer: Any, one_scheme: bool) -> str:
    if isinstance(layer, PackedLinear):
        return layer.number_format.name if one_scheme else f"{layer.number_format.name} {layer.number_format}"
    if is_compressed(layer):
        weights = layer.quantization_scheme.weights
        return f"{weights.num_bits}-bit {weights.type} per {weights.strategy}"
    return _FLOAT
