# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The two number formats as values: what a layer's weight is, or is to become, and by which initialisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Optional, Union

import torch

from peft_ext.quant.binary import BINARY_BITS, BINARY_METHODS, BinaryQuantized, quantize_binary
from peft_ext.quant.error_feedback import SWEEPS, quantize_binary_calibrated, quantize_calibrated
from peft_ext.quant.lattice import find_lattice
from peft_ext.quant.uniform import UNIFORM_BITS, UNIFORM_METHODS, Quantized, check_format, check_zero, quantize


CALIBRATED = "calibrated"
# As that was before codes were swept: error feedback alone, of integers.
GPTQ = "gptq"
# Weights that are integers with scales already, written out as floats, are taken over as they are; see `lattice.py`.
LATTICE = "lattice"


@dataclass(frozen=True)
class Uniform:
    """Integers with a scale and a zero point per output channel, or per group of inputs. See `uniform.py`.

    `zero` says whether zero points are among the codes (`"int"`) or any numbers (`"float"`), which keep a group's minimum.
    """

    bits: int
    group_size: int = -1
    sym: bool = False
    zero: str = "int"

    name: ClassVar[str] = "uniform integers"
    supported_bits: ClassVar[tuple[int, ...]] = UNIFORM_BITS
    methods: ClassVar[tuple[str, ...]] = (*UNIFORM_METHODS, LATTICE)
    data_methods: ClassVar[tuple[str, ...]] = (CALIBRATED, GPTQ)
    # the best without data, measured: benchmarks/peqa_quality.py
    default_method: ClassVar[str] = "minmax"

    def __repr__(self) -> str:  # digests of earlier files have it without what there was only one kind of
        zero = "" if self.zero == "int" else f", zero={self.zero!r}"
        return f"Uniform(bits={self.bits}, group_size={self.group_size}, sym={self.sym}{zero})"

    @property
    def title(self) -> str:
        """What it is called where formats are listed."""
        return self.name if self.zero == "int" else f"{self.name} with float zero points"

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the scales: `[out, groups]`."""
        return out_features, groups_of(in_features, self.group_size)

    def quantize(
        self,
        weight: torch.Tensor,
        method: str,
        hessian: Optional[torch.Tensor] = None,
        shift: Optional[torch.Tensor] = None,
    ) -> Quantized:
        """Quantise a weight `[out, in]` by a data-free method, or on its inputs' moments where these are given: by error
        feedback alone if the method is `"gptq"`, else with sweeps behind it."""
        if hessian is None and method == LATTICE:
            found = find_lattice(weight, self.bits, self.group_size, self.sym, self.zero)
            if found is not None:
                return found.quantized
            method = self.default_method
        if hessian is None:
            return quantize(weight, self.bits, self.group_size, self.sym, method, self.zero)
        sweeps = 0 if method == GPTQ else SWEEPS
        return quantize_calibrated(
            weight, hessian, self.bits, self.group_size, self.sym, shift=shift, zero=self.zero, sweeps=sweeps
        )


@dataclass(frozen=True)
class BinaryCoding:
    """Sign planes with one alpha each per output channel, or per group of inputs. See `binary.py`."""

    bits: int
    group_size: int = -1

    name: ClassVar[str] = "binary coding"
    supported_bits: ClassVar[tuple[int, ...]] = BINARY_BITS
    methods: ClassVar[tuple[str, ...]] = BINARY_METHODS
    data_methods: ClassVar[tuple[str, ...]] = (CALIBRATED,)
    default_method: ClassVar[str] = "alternating"

    @property
    def title(self) -> str:
        """As [`Uniform.title`]."""
        return self.name

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the alphas: `[out, groups, bits]`."""
        return out_features, groups_of(in_features, self.group_size), self.bits

    def quantize(
        self,
        weight: torch.Tensor,
        method: str,
        hessian: Optional[torch.Tensor] = None,
        shift: Optional[torch.Tensor] = None,
    ) -> BinaryQuantized:
        """As [`Uniform.quantize`]."""
        if hessian is None:
            return quantize_binary(weight, self.bits, self.group_size, method)
        return quantize_binary_calibrated(weight, hessian, self.bits, self.group_size, shift=shift)


NumberFormat = Union[Uniform, BinaryCoding]


def groups_of(in_features: int, group_size: int) -> int:
    """Groups of a row; a group size of -1 is all of it."""
    return 1 if group_size == -1 else in_features // group_size


def group_size_of(in_features: int, groups: int) -> int:
    """The group size of a row in so many groups."""
    return -1 if groups == 1 else in_features // groups


def check_number_format(number_format: NumberFormat, in_features: Optional[int] = None) -> None:
    """Refuse widths and group sizes that the format doesn't have, or that don't fit a layer; see `check_format`."""
    check_format(number_format.bits, number_format.group_size, in_features, number_format.supported_bits)
    if isinstance(number_format, Uniform):
        check_zero(number_format.zero, number_format.sym)


def same_format(one: NumberFormat, other: NumberFormat, in_features: int) -> bool:
    """Whether two formats are the same on a layer; a single group is the whole channel."""

    def normal(number_format: NumberFormat) -> NumberFormat:
        return replace(number_format, group_size=-1) if number_format.group_size == in_features else number_format

    return normal(one) == normal(other)


def empty_quantized(
    number_format: NumberFormat, shape: torch.Size, dtype: torch.dtype
) -> Union[Quantized, BinaryQuantized]:
    """Tensors of the right size on the meta device for a weight of `shape` `[out, in]` and `dtype`."""
    codes = torch.empty(shape, device="meta", dtype=torch.uint8)
    dtype = torch.promote_types(dtype, torch.float32)
    scale = torch.empty(number_format.scale_shape(*shape), device="meta", dtype=dtype)
    if isinstance(number_format, BinaryCoding):
        return BinaryQuantized(codes, scale)
    kept = dtype if number_format.zero == "float" else torch.uint8
    return Quantized(codes, scale, torch.empty_like(scale, dtype=kept))
