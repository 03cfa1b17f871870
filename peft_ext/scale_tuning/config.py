# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the configurations of all scale tuners have in common; each documents the fields in its own words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from peft.utils.other import get_pattern_key

from peft_ext.quant.formats import CALIBRATED, NumberFormat, check_number_format
from peft_ext.targets import TargetConfig


PARAMETRIZATIONS = ("relative", "log", "absolute")


@dataclass
class ScaleTuningConfig(TargetConfig):
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
    bits_pattern: Optional[dict] = field(
        default_factory=dict,
        metadata={"help": "Other widths for some layers: module names or regex expressions mapped to bits."},
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Whether the target layers store their weight as (fan_in, fan_out)."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.bits_pattern = self.bits_pattern or {}
        for bits in (self.bits, *self.bits_pattern.values()):
            check_number_format(self.number_format(bits))
        methods = (*self.number_format(self.bits).methods, CALIBRATED)
        if self.init_method not in methods:
            raise ValueError(f"init_method={self.init_method!r} is unknown; choose one of {methods}.")
        if self.parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"parametrization={self.parametrization!r} is unknown; choose one of {PARAMETRIZATIONS}.")

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
