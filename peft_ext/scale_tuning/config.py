# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the configurations of all scale tuners have in common; each documents the fields in its own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, Union

from peft.utils.other import get_pattern_key

from peft_ext.quant.formats import CALIBRATED, LATTICE, BinaryCoding, NumberFormat, Uniform, check_number_format
from peft_ext.targets import TargetConfig


# Said of bits: a layer's own format, which a float layer doesn't have.
BASE = "base"
# What a budget chooses from.
BUDGET_WIDTHS = (2, 3, 4, 8)
# Of a float layer, where the config leaves it open.
# Of embeddings and heads; see embeddings.py for the formats.
EMBEDDING_BITS = (4, 8)
DEFAULT_BITS, DEFAULT_GROUP_SIZE = 4, -1
PARAMETRIZATIONS = ("relative", "log", "absolute")


@dataclass
class ScaleTuningConfig(TargetConfig):
    """Base of [`PeqaConfig`] and [`AlphaTuningConfig`]: which layers are packed in which format, and what is trained.

    A tuner's config says which number format it tunes, adds its own fields, and documents them all.
    """

    number_format_cls: ClassVar[type[Union[Uniform, BinaryCoding]]]

    bits: Optional[Union[int, str]] = field(
        default=None,
        metadata={
            "help": "Width of the code of a weight, in bits; 'base': a packed base's own. Default: the base's own, or 4."
        },
    )
    group_size: Optional[int] = field(
        default=None,
        metadata={
            "help": "Number of inputs that share a scale; -1: all inputs of an output channel. Default: a packed base's "
            "own, or -1."
        },
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
    group_size_pattern: Optional[dict] = field(
        default_factory=dict,
        metadata={
            "help": "Other group sizes for some layers: module names or regex expressions mapped to group sizes."
        },
    )
    bits_budget: Optional[float] = field(
        default=None,
        metadata={
            "help": "Average width of the layers, such as 3.0: each gets 2, 3, 4 or 8 bits, the more the more the loss depends "
            "on it (call calibrate or allocate_bits first). What was chosen is kept in bits and bits_pattern."
        },
    )
    embedding_bits: Optional[int] = field(
        default=None,
        metadata={
            "help": "Pack the token embedding and the output head as well, frozen: 8 (one scale for each token) or 4 (groups of "
            "32). Default: they stay as they are."
        },
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Whether the target layers store their weight as (fan_in, fan_out)."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.bits_pattern, self.group_size_pattern = self.bits_pattern or {}, self.group_size_pattern or {}
        if self.embedding_bits is not None and self.embedding_bits not in EMBEDDING_BITS:
            raise ValueError(
                f"embedding_bits={self.embedding_bits!r} is not supported; choose one of {EMBEDDING_BITS}, or leave it out."
            )
        if self.bits_budget is not None:
            self._check_budget()
        if isinstance(self.bits, float) and not self.bits.is_integer():
            raise ValueError(
                f"bits={self.bits!r} is not supported; choose one of {self.number_format_cls.supported_bits}, or for layers of "
                f"several widths that have {self.bits:g} bits on average pass bits_budget={self.bits!r}."
            )
        if isinstance(self.bits, str) and self.bits != BASE:
            raise ValueError(
                f"bits={self.bits!r} is not supported; choose one of {self.number_format_cls.supported_bits}, or {BASE!r} on a "
                "packed base."
            )
        for bits in self.bits_pattern.values():
            check_number_format(self.number_format(bits, -1))
        check_number_format(self._format(self.bits, self.group_size))
        for group_size in self.group_size_pattern.values():
            check_number_format(self.number_format(DEFAULT_BITS, group_size))
        methods = (*self.number_format_cls.methods, *self.number_format_cls.data_methods)
        if self.init_method not in methods:
            raise ValueError(f"init_method={self.init_method!r} is unknown; choose one of {methods}.")
        if self.parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"parametrization={self.parametrization!r} is unknown; choose one of {PARAMETRIZATIONS}.")

    def _check_budget(self) -> None:
        budget, least, most = self.bits_budget, BUDGET_WIDTHS[0], BUDGET_WIDTHS[-1]
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not least <= budget <= most:
            raise ValueError(
                f"bits_budget={budget!r} must be a number from {least} to {most}, the narrowest and the widest that a layer can "
                "get."
            )
        for name in ("bits", "bits_pattern"):
            if getattr(self, name):
                raise ValueError(
                    f"bits_budget={budget!r} chooses the widths of all layers, and {name}={getattr(self, name)!r} names some; "
                    "leave out one of the two."
                )
        if self.init_method == LATTICE:
            raise ValueError(
                f"bits_budget={budget!r} rounds weights, and init_method={LATTICE!r} takes them over as they are; leave out one "
                "of the two."
            )

    def number_format(self, bits: int, group_size: int, base: Optional[NumberFormat] = None) -> NumberFormat:
        """That format; what else belongs to it is the config's or, where that leaves it open, `base`'s."""
        raise TypeError("ScaleTuningConfig has no number format; use PeqaConfig or AlphaTuningConfig.")

    def format_of(self, name: str, base: Optional[NumberFormat] = None) -> NumberFormat:
        """The format of the layer called `name`: `bits` and `group_size`, or its entries in their patterns.

        Args:
            name: The layer's.
            base: What a packed layer has, which is what the config leaves open; None: a float layer, see the defaults.

        Raises:
            ValueError: If `bits="base"` and the layer is float.
        """
        bits, group_size = self.asked_of(name)
        at = self.base_model_name_or_path
        if base is None and bits == BASE:
            raise ValueError(
                f"bits={BASE!r} takes the format of a packed base, but layer {name!r} is float. Load the packed base"
                + (f" ({at!r} is what the config names)" if at else "")
                + f", or pass bits (such as {DEFAULT_BITS}) and group_size."
            )
        return self._format(bits, group_size, base if isinstance(base, self.number_format_cls) else None)

    def format_at(self, name: str, bits: int) -> NumberFormat:
        """The format of the float layer called `name` if it gets that width."""
        return self._format(bits, self.asked_of(name)[1])

    def asked_of(self, name: str) -> tuple[Optional[Union[int, str]], Optional[int]]:
        """Bits and group size that the config asks of a layer; None (or "base") where it leaves them open."""
        return _entry(self.bits_pattern, name, self.bits), _entry(self.group_size_pattern, name, self.group_size)

    def _format(
        self, bits: Optional[Union[int, str]], group_size: Optional[int], base: Optional[NumberFormat] = None
    ) -> NumberFormat:
        if bits is None or isinstance(bits, str):
            bits = DEFAULT_BITS if base is None else base.bits
        if group_size is None:
            group_size = DEFAULT_GROUP_SIZE if base is None else base.group_size
        return self.number_format(bits, group_size, base)

    @property
    def needs_data(self) -> bool:
        """Whether float layers are packed by `calibrate`, on data."""
        return self.init_method in self.number_format_cls.data_methods

    @property
    def trains_zero_points(self) -> bool:
        """Whether zero points are trained beside the scales."""
        return False

    def trained_shape(self, scale_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of what is trained of a layer's scale: all of it here, `[out, groups(, bits)]`."""
        return tuple(scale_shape)


def _entry(pattern: Optional[Mapping[str, Any]], name: str, otherwise: Any) -> Any:
    """What a pattern says of a layer, as LoRA's `rank_pattern`."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), otherwise)
