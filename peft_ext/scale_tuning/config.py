# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the configurations of all scale tuners have in common; each documents the fields in its own words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional, Union

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from peft_ext.quant.formats import CALIBRATED, NumberFormat, check_number_format


PARAMETRIZATIONS = ("relative", "log", "absolute")


@dataclass
class ScaleTuningConfig(PeftConfig):
    """Base of [`PeqaConfig`] and [`AlphaTuningConfig`]: which layers are packed in which format, and what is trained.

    A tuner's config says which number format it tunes, adds its own fields, and documents them all.
    """

    bits: int = field(default=4, metadata={"help": "Width of the code of a weight, in bits."})
    group_size: int = field(
        default=-1, metadata={"help": "Number of inputs that share a scale; -1: all inputs of an output channel."}
    )
    init_method: str = field(
        default=CALIBRATED,
        metadata={"help": "Where the codes come from: a data-free method, or 'calibrated' (call calibrate first)."},
    )
    parametrization: str = field(
        default="relative",
        metadata={"help": "What the optimiser sees of a scale: 'relative', 'log' or 'absolute'."},
    )
    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "List of module names or regex expression of the module names to quantise. Only nn.Linear and Conv1D "
                "are supported. Default: 'all-linear', every linear layer but the output layer."
            )
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "List of module names or regex expression of the modules to leave as they are."},
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Modules apart from the quantised layers that are trained in full and saved."},
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Indexes of the layers to quantise; the others stay as they are."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Name of the nn.ModuleList that layers_to_transform indexes."}
    )
    bits_pattern: Optional[dict] = field(
        default_factory=dict,
        metadata={"help": "Other widths for some layers: module names or regex expressions mapped to bits."},
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Whether the target layers store their weight as (fan_in, fan_out)."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start from the quantised model; False starts from random scales (for tests)."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self.bits_pattern = self.bits_pattern or {}
        for bits in (self.bits, *self.bits_pattern.values()):
            check_number_format(self.number_format(bits))
        methods = (*self.number_format(self.bits).methods, CALIBRATED)
        if self.init_method not in methods:
            raise ValueError(f"init_method={self.init_method!r} is unknown; choose one of {methods}.")
        if self.parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"parametrization={self.parametrization!r} is unknown; choose one of {PARAMETRIZATIONS}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        is_regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        if is_regex and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` cannot be used when `target_modules` is a str; pass a list of names."
            )

    def number_format(self, bits: int) -> NumberFormat:
        """The format of a layer of that width."""
        raise TypeError("ScaleTuningConfig has no number format; use PeqaConfig or AlphaTuningConfig.")

    def format_of(self, name: str) -> NumberFormat:
        """The format of the layer called `name`: `bits`, or its entry in `bits_pattern`."""
        pattern = self.bits_pattern or {}
        return self.number_format(pattern.get(get_pattern_key(list(pattern), name), self.bits))

    def trained_shape(self, scale_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of what is trained of a layer's scale: all of it here, `[out, groups(, bits)]`."""
        return tuple(scale_shape)
