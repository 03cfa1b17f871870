# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Whether a packed checkpoint is sound: no layer's tensors are missing, so that none becomes random numbers, and scales and
zero points are numbers that a weight can have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_ext.adapter_files import LARGEST
from peft_ext.checkpoint.files import TensorHeader, names_in_model, stored_layers
from peft_ext.file_formats import Field, check_fields, mapping_of, number, one_of, text, truth, values_problem, whole
from peft_ext.language_model import is_causal_config
from peft_ext.quant.conversion import LINEAR_LAYERS
from peft_ext.quant.packed_module import PackedModule
from peft_ext.quant.uniform import ZEROS


_AGAIN = "The checkpoint is damaged, or its config.json is another's; download or save it again."
# What config.json says of quantisations, as far as we read it; a missing one has a default, ranges are the formats'.
QUANTIZATION: dict[str, Field] = {
    name: each.or_missing()
    for name, each in {
        "bits": whole(),
        "group_size": whole(),
        "sym": truth(),
        "zero_point": truth(),
        "zero": text(*ZEROS),
        "zero_pattern": mapping_of(text(*ZEROS)).or_null(),
        "number_format": text(),
        "init_method": text(),
        "bits_pattern": mapping_of(whole()).or_null(),
        "group_size_pattern": mapping_of(whole()).or_null(),
        "embeddings": mapping_of(mapping_of(one_of(whole(), truth(), text()))).or_null(),
        "dynamic": mapping_of(one_of(mapping_of(one_of(whole(), number(), truth(), text())))).or_null(),
        "pack_dtype": text(),
        "checkpoint_format": text().or_null(),
    }.items()
}


def check_quantization(values: Mapping[str, Any]) -> None:
    """Check what a config says of a quantisation.

    Raises:
        ValueError: Names the field, its value and what it must be.
    """
    check_fields(values, QUANTIZATION, "quantization_config", "Mend it, or save the checkpoint again.")


def check_complete(
    model: PreTrainedModel,
    headers: Mapping[str, TensorHeader],
    tensor: str,
    parts: Iterable[str],
    packed: Iterable[str],
) -> None:
    """Refuse a checkpoint that has no codes of a layer, nor a float weight: transformers would fill it with random numbers.

    Args:
        model: Before its tensors are read; packed layers may stand in it already.
        headers: Of the checkpoint.
        tensor: The tensor with the codes, which every packed layer has.
        parts: Tensors that only packed layers have.
        packed: The model's names of the layers that the checkpoint has packed.

    Raises:
        ValueError: Names the layer.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, LINEAR_LAYERS)}
    for part in parts:
        orphans = [
            name
            for name in stored_layers(headers, part)
            if f"{name}.{tensor}" not in headers and f"{name}.weight" not in headers
        ]
        lost = {name: key for name, key in names_in_model(model, orphans).items() if name in linear}
        if lost:
            key = next(iter(lost.values()))
            raise ValueError(
                f"layer {key!r}: the checkpoint has {part} ({headers[f'{key}.{part}'].file!r}) but no {tensor} of it "
                f"({len(lost)} such layers). {_AGAIN}"
            )
    others = dict.fromkeys(key.rpartition(".")[0] for key in headers if not key.endswith(".bias"))
    floats = names_in_model(model, others)
    tied = {name.rpartition(".")[0] for name in getattr(model, "all_tied_weights_keys", None) or ()}
    # a body alone may have been saved, and gets a new head
    head = model.get_output_embeddings() if is_causal_config(model.config) else None
    heads = {name for name, module in model.named_modules() if head is not None and module is head}
    bare = sorted(name for name in linear - set(packed) - set(floats) - tied if _in_a_block(name) or name in heads)
    if bare:
        raise ValueError(
            f"layer {bare[0]!r}: the checkpoint has neither {bare[0]}.{tensor} nor {bare[0]}.weight ({len(bare)} such layers). "
            f"{_AGAIN}"
        )


def _in_a_block(name: str) -> bool:
    """Whether a layer lies in a model's numbered blocks; heads outside of them may be new, but for the one that writes
    tokens."""
    return any(part.isdigit() for part in name.split("."))


def check_numbers(model: nn.Module) -> None:
    """Refuse packed layers whose scales (or float zero points, or the minimums that both stand for) are NaN, infinite or so
    large that a product overflows, or whose whole zero points lie outside of the codes' range.

    Raises:
        ValueError: Names the checkpoint, the layer and the value.
    """
    where = getattr(getattr(model, "config", None), "_name_or_path", None) or "the checkpoint"
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedModule):
            continue
        if layer.scale.device.type == "meta":
            continue
        problem = values_problem(layer.scale, -LARGEST, LARGEST)
        if problem:
            raise ValueError(f"{str(where)!r}: layer {name!r}: scale {problem}. {_AGAIN}")
        zero_point = layer.zero_point
        problem = None if zero_point is None else _problem_of_zero_point(layer, zero_point)
        if problem:
            raise ValueError(f"{str(where)!r}: layer {name!r}: zero_point {problem}. {_AGAIN}")


def _problem_of_zero_point(layer: PackedModule, zero_point: torch.Tensor) -> Optional[str]:
    if not zero_point.is_floating_point():
        return values_problem(zero_point, 0, 2**layer.bits - 1)
    problem = values_problem(zero_point, -LARGEST, LARGEST)
    if problem:
        return problem
    of_minimum = values_problem(layer.scale * zero_point, -LARGEST, LARGEST)
    return of_minimum and f"times scale {of_minimum}"
