# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Codes that change a layer's output least: grids searched under the inputs' second moments, GPTQ's error feedback.

Sources: GPTQ (Frantar et al., 2022, arXiv 2210.17323), algorithm 1 with columns by falling energy; the grid is found
as AWQ and EfficientQAT find theirs, by shrinking ranges, but with every input's error weighted by its energy. That a
layer makes up for what the layers before it changed is the idea of GPTAQ (Li et al., 2025, arXiv 2504.02692), here as
a damped step towards the least-squares weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch

from peft_ext.quant.binary import (
    BINARY_BITS,
    BinaryQuantized,
    dequantize_binary,
    quantize_binary,
    solve_alphas,
    sorted_levels,
)
from peft_ext.quant.matmul import linear
from peft_ext.quant.refinement import refit_grid, sweep_codes
from peft_ext.quant.uniform import (
    SHRINK_FACTORS,
    Grid,
    Quantized,
    check_format,
    check_weight,
    check_zero,
    nearest_codes,
    search_grid,
    stored_zero_point,
)


# Maps a column of weights [out] and its index in the weight to codes uint8 [out] and the values [out] of these.
ColumnRounding = Callable[[torch.Tensor, int], "tuple[torch.Tensor, torch.Tensor]"]
# How far a weight moves towards the one that undoes the shift of its inputs. All the way fits the calibration data
# instead (SmolLM2, 3 bits, 8,192 tokens, validation perplexity: 40.7 at 0, 36.6 at 0.25 and 0.5, 41.0 at 1).
_SHIFT_SHARE = 0.5
_SHIFT_DAMPING = 0.03
# Rounds of alphas refitted to the codes, and codes to the alphas (SmolLM2, 3 bits, validation perplexity before tuning:
# 37.4 without, 36.1 with one, 35.6 with two; 12 s each for the whole model on two cores).
_REFITS = 2
# Sweeps over uniform codes behind error feedback, with a grid refitted before the first and behind each.
SWEEPS = 3


def quantize_calibrated(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    group_size: int = -1,
    sym: bool = False,
    damping: float = 0.01,
    shift: Optional[torch.Tensor] = None,
    zero: str = "int",
    sweeps: int = SWEEPS,
) -> Quantized:
    """Quantise so that the layer's *output* on the calibration data changes least.

    Args:
        weight: float `[out, in]`.
        hessian: float `[in, in]`, the sum (or mean) of `x x^T` over the calibration inputs.
        bits, group_size, sym, zero: As in [`peft_ext.quant.uniform.quantize`].
        damping: Share of the mean diagonal that is added to the Hessian's diagonal.
        shift: float `[in, in]`, the sum (or mean) of `(x_float - x) x^T`, with `x_float` what the layer would get in
            the float model; the weight then makes up for part of what the layers before it changed.
        sweeps: Sweeps of coordinate descent over the codes, each followed by a refit of scales and zero points, behind one
            refit and a second round of error feedback; see `refinement.py`. 0: error feedback alone, on a grid that stays.

    Returns:
        [`peft_ext.quant.uniform.Quantized`]; the same weight and Hessian give the same codes.

    Raises:
        ValueError: If the format is unknown, the shapes don't fit, or the weight or the Hessian has NaN or infinity.
    """
    check_format(bits, group_size, weight.shape[1])
    check_zero(zero, sym)
    weight, hessian, input_weight = _prepare(weight, hessian, shift)
    grid = search_grid(weight, bits, group_size, sym, SHRINK_FACTORS, input_weight, zero)
    codes = error_feedback(weight, hessian, uniform_rounding(grid, bits, weight.shape[1], zero), damping)
    if sweeps:
        damped = _damped(_every_input_counts(hessian), damping * _mean_energy(hessian))
        grid = refit_grid(weight, damped, codes, grid, bits, sym, zero)
        codes = error_feedback(weight, hessian, uniform_rounding(grid, bits, weight.shape[1], zero), damping)
    for _ in range(sweeps):
        codes = sweep_codes(weight, damped, codes, grid, bits, zero)
        grid = refit_grid(weight, damped, codes, grid, bits, sym, zero)
    return Quantized(codes, grid.scale, stored_zero_point(grid.zero_point, zero))


def quantize_binary_calibrated(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    group_size: int = -1,
    damping: float = 0.01,
    shift: Optional[torch.Tensor] = None,
) -> BinaryQuantized:
    """[`quantize_calibrated`] onto binary codes: alphas by weighted alternation, then error feedback onto their levels,
    and in turn the best alphas for the codes and feedback onto the new levels.

    Args:
        bits, group_size: As in [`peft_ext.quant.binary.quantize_binary`]; the others as above.

    Raises:
        ValueError: If the format is unknown, the shapes don't fit, or the weight or the Hessian has NaN or infinity.
    """
    check_format(bits, group_size, weight.shape[1], BINARY_BITS)
    weight, hessian, input_weight = _prepare(weight, hessian, shift)
    alpha = quantize_binary(weight, bits, group_size, input_weight=input_weight).alpha
    codes = error_feedback(weight, hessian, binary_rounding(alpha, weight.shape[1]), damping)
    for _ in range(_REFITS):
        alpha = refit_alphas(weight, hessian, codes, alpha, damping)
        codes = error_feedback(weight, hessian, binary_rounding(alpha, weight.shape[1]), damping)
    return BinaryQuantized(codes, alpha)


def refit_alphas(
    weight: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, alpha: torch.Tensor, damping: float = 0.01
) -> torch.Tensor:
    """The alphas for which given codes change the layer's output least, group after group, not negative and falling.

    With `E = W - sum_p alpha_p B_p`, each group's alphas go to the minimum of `sum E H E^T` while the others stay.

    Args:
        weight: float `[out, in]`.
        hessian: `[in, in]` in the weight's dtype.
        codes: uint8 `[out, in]`.
        alpha: `[out, groups, bits]`, where to start from.
        damping: Share of the mean diagonal that is added to the Hessian's diagonal.

    Returns:
        `[out, groups, bits]`. A plane whose alpha would be negative is the same plane with its signs turned: the codes
        are to be rounded again.
    """
    out_features, groups, bits = alpha.shape
    damped = _damped(hessian, damping * _mean_energy(hessian))
    planes = torch.arange(bits, dtype=torch.uint8, device=codes.device)[:, None, None]
    refitted, pulled = alpha.clone(), linear(weight - dequantize_binary(codes, alpha), damped)
    for group, columns in enumerate(torch.arange(weight.shape[1], device=codes.device).view(groups, -1)):
        span = slice(int(columns[0]), int(columns[-1]) + 1)
        signs = ((codes[:, span] >> planes) & 1).to(weight.dtype).mul_(2).sub_(1)  # [bits, out, size]
        weighted = linear(signs.flatten(0, 1), damped[span, span]).view_as(signs)
        gram = torch.einsum("pos,qos->opq", weighted, signs).double()
        step = solve_alphas(gram, torch.einsum("pos,os->op", signs, pulled[:, span]).double()).to(weight.dtype)
        refitted[:, group] += step
        if groups > 1:
            pulled -= linear(torch.einsum("op,pos->os", step, signs), damped[:, span])
    return refitted.abs().sort(dim=-1, descending=True).values


def _prepare(
    weight: torch.Tensor, hessian: torch.Tensor, shift: Optional[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checked: the weight to round, the Hessian in its dtype, and every input's weight `[in]` in the error."""
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"hessian has shape {tuple(hessian.shape)}, expected {(weight.shape[1],) * 2}.")
    if not torch.isfinite(hessian).all() or (shift is not None and not torch.isfinite(shift).all()):
        raise ValueError("the calibration inputs have NaN or infinity; check the model and the calibration data.")
    weight = check_weight(weight)
    hessian = hessian.to(weight.dtype)
    if shift is not None:
        weight = follow_shift(weight, hessian, shift.to(weight.dtype))
    energy = hessian.diagonal()
    if not (energy > 0).any():  # the layer saw only zeros: every input counts the same
        hessian = torch.eye(len(energy), dtype=hessian.dtype, device=hessian.device)
        energy = hessian.diagonal()
    return weight, hessian, energy / energy.mean()


def follow_shift(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    shift: torch.Tensor,
    share: float = _SHIFT_SHARE,
    damping: float = _SHIFT_DAMPING,
) -> torch.Tensor:
    """A step from `W` towards `argmin_V sum |W x_float - V x|^2 = W + W shift hessian^-1`; arguments as above.

    The least-squares weight brings the output on the inputs that do arrive to where the float model has it.

    Args:
        share: Length of the step; 1 goes all the way.
        damping: Share of the mean diagonal that is added to the Hessian's diagonal.
    """
    # (W C) H^-1 = (H^-1 (W C)^T)^T
    step = torch.linalg.solve(_damped(hessian, damping * _mean_energy(hessian)), (weight @ shift).t()).t()
    return torch.add(weight, step, alpha=share).contiguous()


def uniform_rounding(grid: Grid, bits: int, in_features: int, zero: str = "int") -> ColumnRounding:
    """Rounding of one column onto a uniform grid, for [`error_feedback`]."""
    size = in_features // grid.scale.shape[1]
    scales, zero_points = grid.scale.t().contiguous(), grid.zero_point.t().contiguous()

    def round_column(column: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero_point = scales[index // size], zero_points[index // size]
        codes = nearest_codes(column, scale, zero_point, bits, zero)
        return codes.to(torch.uint8), codes.sub_(zero_point).mul_(scale)

    return round_column


def binary_rounding(alpha: torch.Tensor, in_features: int) -> ColumnRounding:
    """Rounding of one column to the nearest level of alphas `[out, groups, bits]`, for [`error_feedback`]."""
    size = in_features // alpha.shape[1]
    levels, middles, codes_of = sorted_levels(alpha.transpose(0, 1))  # [groups, out, 2**bits]

    def round_column(column: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        group = index // size
        position = torch.searchsorted(middles[group], column[:, None])
        return codes_of[group].gather(-1, position)[:, 0], levels[group].gather(-1, position)[:, 0]

    return round_column


def error_feedback(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    round_column: ColumnRounding,
    damping: float = 0.01,
    block_size: int = 64,
) -> torch.Tensor:
    """GPTQ: round column by column, and let the columns still to come make up for each column's error.

    Args:
        weight: float `[out, in]`.
        hessian: `[in, in]` in the weight's dtype.
        round_column: The number format: column and its index to codes and values. Any grid will do.
        damping: Share of the mean diagonal added to the Hessian's diagonal; raised tenfold until it can be factorised.
        block_size: Columns whose updates to the rest are applied together.

    Returns:
        uint8 codes `[out, in]`.
    """
    in_features = weight.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], damping)
    columns = weight.t()[order]  # [in, out], rows contiguous
    codes = torch.empty(in_features, weight.shape[0], dtype=torch.uint8, device=weight.device)
    indices = order.tolist()
    for start in range(0, in_features, block_size):
        stop = min(start + block_size, in_features)
        errors = torch.empty_like(columns[start:stop])
        block_factor = factor[start:stop, start:stop]
        pivots = block_factor.diagonal().tolist()
        for j in range(start, stop):
            at = j - start
            codes[j], values = round_column(columns[j], indices[j])
            error = torch.sub(columns[j], values, out=errors[at]).div_(pivots[at])
            columns[j + 1 : stop].addr_(block_factor[at, at + 1 :], error, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()


def _mean_energy(hessian: torch.Tensor) -> torch.Tensor:
    return hessian.diagonal().mean().clamp(min=torch.finfo(hessian.dtype).tiny)


def _damped(hessian: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    damped = hessian.clone()
    damped.diagonal().add_(amount)
    return damped


def _every_input_counts(hessian: torch.Tensor) -> torch.Tensor:
    """A copy in which an input that never fires, and so pulls on no other, has the mean energy."""
    hessian, mean = hessian.clone(), _mean_energy(hessian)
    diagonal = hessian.diagonal()
    diagonal.copy_(torch.where(diagonal > 0, diagonal, mean))
    return hessian


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian `[in, in]`."""
    hessian, mean = _every_input_counts(hessian), _mean_energy(hessian)
    for _ in range(6):
        lower, failed = torch.linalg.cholesky_ex(_damped(hessian, damping * mean))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
    raise ValueError("the Hessian of the calibration inputs can't be factorised; pass more varied calibration data.")
