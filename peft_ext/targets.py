# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which modules of a model a tuner's config targets, told before any of them is changed."""

from __future__ import annotations

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn


def target_layers(config: PeftConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that a config targets, by name; a tuner layer stands for the layer that it wraps."""
    tuner_layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and not (tuner_layers and name.startswith(tuner_layers))
        and BaseTuner._check_target_module_exists(config, name)
    }
