# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Uniform (affine) integers: `W = scale * (codes - zero_point)` per output channel or per group of inputs.

Source: PEQA (Kim et al., 2023, arXiv 2305.14152), section 3; names as in GPTQ. The data-free initialisations live here;
the one that uses calibration data is in `error_feedback.py`.

A zero point is a code of its group (`zero="int"`), or any float (`zero="float"`): then `-scale * zero_point` is the group's
minimum, as GGUF's Q4_1, MLX and HQQ keep it, and the range needn't contain zero.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch


UNIFORM_BITS = (2, 3, 4, 5, 6, 8)
UNIFORM_METHODS = ("minmax", "mse")
# What a zero point is: a whole number among the codes, or any number.
ZEROS = ("int", "float")
# The range shrinks in these steps while a grid is searched; the first is min-max itself.
SHRINK_FACTORS = tuple(1.0 - 0.02 * step for step in range(36))
# Rows are quantised in chunks of about this many weights, so that a chunk stays in a core's cache.
_CHUNK = 1 << 18


class Grid(NamedTuple):
    """Where a row's (group's) levels lie: `scale` float `[out, groups]`, `zero_point` like it, with whole values unless
    zero points are floats."""

    scale: torch.Tensor
    zero_point: torch.Tensor


class Quantized(NamedTuple):
    """A quantised weight: `codes` uint8 `[out, in]`; `scale` float and `zero_point` uint8 or float, `[out, groups]`."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor


def check_format(
    bits: int, group_size: int, in_features: Optional[int] = None, supported_bits: tuple[int, ...] = UNIFORM_BITS
) -> None:
    """Refuse widths and group sizes that don't exist.

    Raises:
        ValueError: Names the argument, its value and what may be passed instead.
    """
    if isinstance(bits, bool) or bits not in supported_bits:
        raise ValueError(f"bits={bits!r} is not supported; choose one of {supported_bits}.")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or (group_size != -1 and group_size < 1):
        raise ValueError(f"group_size={group_size!r} must be -1 (one scale per output channel) or a positive integer.")
    if in_features is not None and group_size != -1 and in_features % group_size:
        divisors = [size for size in (32, 64, 96, 128, 192, 256) if in_features % size == 0]
        raise ValueError(
            f"group_size={group_size} does not divide in_features={in_features}; use -1 (per channel)"
            + (f" or one of {divisors}." if divisors else f" or a divisor of {in_features}.")
        )


def check_zero(zero: str, sym: bool = False) -> None:
    """Refuse kinds of zero points that don't exist.

    Raises:
        ValueError: Names the argument, its value and what may be passed instead.
    """
    if zero not in ZEROS:
        raise ValueError(f"zero={zero!r} is unknown; choose one of {ZEROS}.")
    if sym and zero == "float":
        raise ValueError(
            "sym=True keeps every zero point in the middle of the range, so zero='float' can't be; drop one."
        )


def quantize(
    weight: torch.Tensor,
    bits: int,
    group_size: int = -1,
    sym: bool = False,
    method: str = "minmax",
    zero: str = "int",
) -> Quantized:
    """Round a weight to the nearest level of a data-free grid.

    Args:
        weight: float `[out, in]`.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: Inputs that share a scale; -1 for all inputs of an output channel.
        sym: Keep the zero point at `2**(bits - 1)` for every group.
        method: `"minmax"` (the range of each row or group) or `"mse"` (the range shrunk to the least squared error).
        zero: `"int"` (zero points are codes, uint8) or `"float"` (any number, in the scale's dtype). With floats, a group
            that lies on `2**bits` evenly spaced levels, its least and largest among them, is represented as it is by
            `"minmax"`, and so is a constant one by both methods: scale 1, codes 0, zero point `-constant`.

    Returns:
        [`Quantized`]; the same weight and arguments give the same codes on every machine.

    Raises:
        ValueError: If the format or method is unknown, or the weight has NaN or infinity.
    """
    check_format(bits, group_size, weight.shape[1])
    check_zero(zero, sym)
    if method not in UNIFORM_METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {UNIFORM_METHODS}.")
    weight = check_weight(weight)
    grid = search_grid(weight, bits, group_size, sym, SHRINK_FACTORS if method == "mse" else (1.0,), zero=zero)
    return round_to_grid(weight, grid, bits, zero)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """`scale * (codes - zero_point)`.

    Args:
        codes: uint8 `[out, in]`.
        scale: float `[out, groups]`.
        zero_point: `[out, groups]`.

    Returns:
        `[out, in]` in the dtype of `scale`.
    """
    out_features, in_features = codes.shape
    groups = scale.shape[1]
    centred = codes.reshape(out_features, groups, in_features // groups) - zero_point.to(scale.dtype)[..., None]
    return (centred * scale[..., None]).view(out_features, in_features)


def round_to_grid(weight: torch.Tensor, grid: Grid, bits: int, zero: str = "int") -> Quantized:
    """Nearest level of `grid` for every entry of `weight` `[out, in]`."""
    groups = weight.view(weight.shape[0], grid.scale.shape[1], -1)
    codes = nearest_codes(groups, grid.scale[..., None], grid.zero_point[..., None], bits, zero)
    return Quantized(codes.to(torch.uint8).view(weight.shape), grid.scale, stored_zero_point(grid.zero_point, zero))


def nearest_codes(
    values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int, zero: str = "int"
) -> torch.Tensor:
    """The codes of the levels `scale * (code - zero_point)` that lie nearest, as floats; shapes broadcast."""
    codes = values / scale
    # in both cases as it always was: a half is rounded to the even code, or to the even distance from a whole zero point
    codes = codes.add_(zero_point).round_() if zero == "float" else codes.round_().add_(zero_point)
    return codes.clamp_(0, 2**bits - 1)


def stored_zero_point(zero_point: torch.Tensor, zero: str) -> torch.Tensor:
    """A grid's zero points as layers keep them: uint8, or floats as they are."""
    return zero_point if zero == "float" else zero_point.to(torch.uint8)


def search_grid(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    shrink_factors: tuple[float, ...] = SHRINK_FACTORS,
    input_weight: Optional[torch.Tensor] = None,
    zero: str = "int",
) -> Grid:
    """Scale and zero point per row or group: the range, shrunk by the factor with the least (weighted) squared error.

    Args:
        weight: float32 or float64 `[out, in]`.
        shrink_factors: Tried in turn; `(1.0,)` is plain min-max.
        input_weight: `[in]`, the second moment of each input; the error of input `j` counts `input_weight[j]` times.
        zero: `"int"`, or `"float"`: zero points needn't be whole, nor the range contain zero.
    """
    size = weight.shape[1] if group_size == -1 else group_size
    weights = None if input_weight is None else input_weight.to(weight.dtype).view(1, -1, size)
    parts = [_search_rows(rows, bits, sym, zero, shrink_factors, weights) for rows in grouped_rows(weight, size)]
    return Grid(*map(torch.cat, zip(*parts)))


def grouped_rows(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """A weight `[out, in]` in groups of `size` inputs, some rows at a time: `[rows, groups, size]`."""
    return weight.view(len(weight), -1, size).split(max(1, _CHUNK // weight.shape[1]))


def check_weight(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a contiguous float32 (or float64) matrix without gradient.

    Raises:
        ValueError: If it isn't a float matrix, or has NaN or infinity.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"expected a float matrix [out, in], got {weight.dtype} of shape {tuple(weight.shape)}.")
    weight = weight.detach()
    weight = weight.to(torch.float32) if weight.dtype != torch.float64 else weight
    if weight.device.type != "meta" and not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinity, which no integer can stand for; repair or reload the model.")
    return weight.contiguous()


def _search_rows(
    groups: torch.Tensor,
    bits: int,
    sym: bool,
    zero: str,
    shrink_factors: tuple[float, ...],
    weights: Optional[torch.Tensor],
) -> Grid:
    """Grid of some rows. groups: [rows, groups, size]."""
    low, high = groups.amin(-1), groups.amax(-1)
    if zero == "int":
        low, high = low.clamp(max=0), high.clamp(min=0)
    best, best_error = _grid(low, high, bits, sym, zero, shrink_factors[0]), None
    for factor in shrink_factors[1:]:
        if best_error is None:
            best_error = _error(groups, best, bits, zero, weights)
        grid = _grid(low, high, bits, sym, zero, factor)
        error = _error(groups, grid, bits, zero, weights)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best)))
    return best


def _grid(low: torch.Tensor, high: torch.Tensor, bits: int, sym: bool, zero: str, factor: float) -> Grid:
    """The range `[low, high]` times `factor`, cut into `2**bits - 1` steps."""
    steps = 2**bits - 1
    width = 2 * torch.maximum(-low, high) if sym else high - low
    scale = width * factor / steps
    constant = ~(scale > 0)  # or so narrow that no float stands for a step
    scale = torch.where(constant, torch.ones_like(scale), scale)  # a row of zeros: any scale stands for it
    if sym:
        return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)))
    if zero == "float":
        # the range shrinks towards zero if it contains it, else towards the end that lies nearer, as weights do
        least = torch.where(constant, low, _shrunk(low, high, factor))
        return Grid(scale, -least / scale)
    return Grid(scale, (-low * factor / scale).round().clamp(0, steps))


def _shrunk(low: torch.Tensor, high: torch.Tensor, factor: float) -> torch.Tensor:
    """The lower end of a range that is made `factor` times as wide."""
    anchor = torch.minimum(torch.maximum(low, torch.zeros_like(low)), high)
    return anchor + (low - anchor) * factor


def _error(groups: torch.Tensor, grid: Grid, bits: int, zero: str, weights: Optional[torch.Tensor]) -> torch.Tensor:
    """(Weighted) squared rounding error of each group; summed in float64, so that all machines break ties alike."""
    scale, zero_point = grid.scale[..., None], grid.zero_point[..., None]
    squared = nearest_codes(groups, scale, zero_point, bits, zero).sub_(zero_point).mul_(scale).sub_(groups).square_()
    if weights is not None:
        squared.mul_(weights)
    return squared.sum(-1, dtype=torch.float64)
