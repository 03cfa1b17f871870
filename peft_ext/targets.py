# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which modules of a model a tuner targets: the fields of its config that say so, and the modules, told before any of them
is changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext import saved_adapters


@dataclass
class TargetConfig(PeftConfig):
    """The fields that the configurations of all our tuners share; each documents them in its own words."""

    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "List of module names or regex expression of the module names to adapt. Only nn.Linear and Conv1D are "
                "supported, packed layers among them. Default: what the method's documentation says."
            )
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "List of module names or regex expression of the modules to leave as they are."},
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Modules apart from the adapted layers that are trained in full and saved."},
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Indexes of the layers to adapt; the others stay as they are."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Name of the nn.ModuleList that layers_to_transform indexes."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Initialise as init_method says; False: with random numbers (for tests)."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        is_regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        if is_regex and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` cannot be used when `target_modules` is a str; pass a list of names."
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does; and those who listen are told, see `saved_adapters.py`."""
        super().save_pretrained(save_directory, **kwargs)
        saved_adapters.saved(self, Path(save_directory))


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


def check_supported(name: str, module: nn.Module) -> None:
    """Refuse a target that is no linear layer; packed ones are.

    Raises:
        ValueError: Names the module, what it is and the way out.
    """
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise ValueError(
            f"Target module {name!r} is a {type(module).__name__}, which is not supported. Currently, only "
            "`torch.nn.Linear` and `Conv1D` are; leave it out of `target_modules` or name it in `exclude_modules`."
        )
