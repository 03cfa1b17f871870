# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A critic's own LoRA: which layers of the language model it is for, and how they add it while the critic reads."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import nn

from generation_ext.critic.reading import modules_behind
from peft_ext.language_model import backbone, text_config
from peft_ext.threads import hooks_of_this_thread


def lora_layers(
    model: nn.Module, targets: Optional[list[str]], read_layers: Optional[list[int]]
) -> dict[str, list[int]]:
    """Name -> inputs and outputs of the layers of the backbone that a LoRA goes on; none behind what is read."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    endings = targets if targets is not None else DEFAULTS.get(text_config(model).model_type)
    later = modules_behind(model, read_layers)
    layers: dict[str, list[int]] = {}
    for name, module in backbone(model).named_modules():
        inside_adapter = any(part in ("base_layer", "original_module") or "lora_" in part for part in name.split("."))
        shape = _linear_shape(module)
        if shape is None or inside_adapter or module in later:
            continue
        if endings is None or any(name == ending or name.endswith(f".{ending}") for ending in endings):
            layers[name] = shape
    if not layers:
        linear = (name for name, module in backbone(model).named_modules() if _linear_shape(module))
        raise ValueError(
            f"lora_target_modules={targets!r}: no linear layer of the model has such a name; its layers are "
            f"called {sorted({name.rsplit('.', 1)[-1] for name in linear})}."
        )
    return layers


def _linear_shape(module: nn.Module) -> Optional[list[int]]:
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return [inputs, outputs]
    if type(module).__name__ == "Conv1D":
        return list(module.weight.shape)  # type: ignore[arg-type]
    return None


def adding(critic_layers: Mapping[str, Any], model: nn.Module, scale: float) -> contextlib.AbstractContextManager:
    """Within it, layers of the backbone add a LoRA's output to theirs, in this thread.

    Args:
        critic_layers: Name -> down `[rank, inputs]` and up `[outputs, rank]`.
        model: The language model.
        scale: Of what is added.

    Raises:
        ValueError: If the model lacks one of the layers.
    """
    modules = dict(backbone(model).named_modules())
    for name in critic_layers:
        if name not in modules:
            raise ValueError(f"the critic has a LoRA for the layer {name!r}, which this model doesn't have.")
    return hooks_of_this_thread(
        (modules[name], _lora_hook(down, up, scale)) for name, (down, up) in critic_layers.items()
    )


def _lora_hook(down: torch.Tensor, up: torch.Tensor, scale: float) -> Any:
    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        added = nn.functional.linear(nn.functional.linear(inputs[0].to(down.dtype), down), up)
        return output + (added * scale).to(output.dtype)

    return add
