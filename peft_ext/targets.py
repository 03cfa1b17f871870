# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which modules of a model a tuner targets: the fields of its config that say so, and the modules, told before any of them
is changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext import saved_adapters
from peft_ext.quant.replaceable import acts_linearly, bypassed_layers, foreign_weight


# Why "all-linear" leaves a layer out: its weight is read by the module that it lies in, or its forward is another one.
NOT_CALLED, NOT_LINEAR = "never called", "computes something else"
# The heads that PEFT's models of these tasks train in full, by the ends of their names.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


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
        and _may_be_named(config, name)
        and BaseTuner._check_target_module_exists(config, name)
    }


def _may_be_named(config: PeftConfig, name: str) -> bool:
    """Whether a list of targets has an ending of a name; PEFT compares every name with every target, which takes minutes with
    the ten thousands of layers that experts are."""
    targets = config.target_modules
    if not isinstance(targets, (set, list)):
        return True
    while name and name not in targets:
        name = name.partition(".")[2]
    return bool(name)


def expand_all_linear(config: PeftConfig, model: nn.Module) -> dict[str, str]:
    """Spell "all-linear" out in a config: PEFT's layers without heads that are trained in full and without those that an
    adapter can't stand around, which are returned with the reason."""
    _maybe_include_all_linear_layers(config, model)
    left = left_out(model)
    found: set[str] = set(config.target_modules)
    config.target_modules = {name for name in found if name not in left and not _trained_in_full(config, name)}
    return {name: reason for name, reason in left.items() if name in found}


def left_out(model: nn.Module) -> dict[str, str]:
    """The linear layers of a model that "all-linear" leaves as they are, by name, and why."""
    reasons = {name: f"{NOT_CALLED} by {owner}" for name, owner in bypassed_layers(model).items()}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or name in reasons or foreign_weight(module) is not None:
            continue  # other libraries' are refused, each by its name
        if not acts_linearly(module):
            reasons[name] = f"{NOT_LINEAR}, a {type(module).__name__}"
    return reasons


def check_called(targets: dict[str, nn.Module], model: nn.Module) -> None:
    """Refuse targets whose adapters would have no part in training: layers that the model never calls.

    Raises:
        ValueError: Names the first of them, the module that reads its weight and the way out.
    """
    for name, owner in bypassed_layers(model).items():
        if name in targets:
            raise ValueError(
                f"Target module {name!r} is never called: {owner} reads its weight instead, so an adapter there would get no "
                "gradient and act only once it is merged. Leave it out of `target_modules` or name it in "
                f"`exclude_modules` (exclude_modules=[{name.rpartition('.')[2]!r}])."
            )


def check_weights_stay(model: nn.Module) -> None:
    """Refuse a model that changes its layers' weights between training and inference, which packed ones can't be.

    Raises:
        ValueError: Says which setting of RWKV's does it.
    """
    config = getattr(model, "config", None)
    if (getattr(config, "rescale_every", None) or 0) > 0:
        raise ValueError(
            f"{type(model).__name__} divides its layers' weights for inference (rescale_every={config.rescale_every}), and "  # type: ignore[union-attr]
            "packed codes are never changed: load it with from_pretrained(..., rescale_every=0), which computes the same "
            "without it."
        )


def _trained_in_full(config: PeftConfig, name: str) -> bool:
    """Whether a layer is, or lies in, a module that PEFT will train whole."""
    task = getattr(config.task_type, "value", config.task_type)
    keys = (*(config.modules_to_save or ()), *_HEADS.get(task or "", ()))
    parts = name.split(".")
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(path.endswith(key) for path in paths for key in keys)


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
