# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Uniform codes and grids brought closer to the least change of a layer's output, each by turns while the other stays.

With `E = W - scale * (codes - zero_point)` and the inputs' second moments `H`, the change is `sum E H E^T`. Error feedback
decides each column once and never comes back; sweeps over the columns do (QuantEase, Behdin et al., 2023, arXiv 2309.01885;
CDQuant, Nair and Suggala, 2024, arXiv 2406.17542): a code moves to the level at which the change is least while all others
stay. Between sweeps, scales and zero points move to their least squares. No step makes the change larger.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from peft_ext.quant.uniform import Grid, dequantize, nearest_codes


# Columns whose updates of the others are applied together.
_BLOCK = 64


def output_change(weight: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """`sum E H E^T` of each row, float64 `[out]`.

    Args:
        weight: float `[out, in]`.
        hessian: `[in, in]` in the weight's dtype.
        codes: uint8 `[out, in]`.
        grid: Their scales and zero points, `[out, groups]`.
    """
    error = weight - dequantize(codes, *grid)
    return ((error @ hessian) * error).sum(1, dtype=torch.float64)


def sweep_codes(
    weight: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, grid: Grid, bits: int, zero: str = "int"
) -> torch.Tensor:
    """One sweep of coordinate descent over the columns: every code in turn to the best level while the others stay.

    Args:
        weight, hessian, codes, grid: As in [`output_change`].
        bits, zero: Of the format, see [`peft_ext.quant.uniform.quantize`].

    Returns:
        uint8 `[out, in]`.
    """
    in_features = weight.shape[1]
    size = in_features // grid.scale.shape[1]
    scales, zero_points = grid.scale.t().contiguous(), grid.zero_point.t().contiguous()
    found = codes.t().contiguous()
    values = dequantize(codes, *grid).t().contiguous()  # [in, out], rows contiguous
    pulled = hessian @ (weight.t() - values)
    energies = hessian.diagonal().tolist()
    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        moved = torch.zeros_like(values[start:stop])
        block, own = hessian[start:stop, start:stop].contiguous(), pulled[start:stop].clone()
        for at, column in enumerate(range(start, stop)):
            if not energies[column] > 0:
                continue  # an input that never fires: no code is better than another
            scale, zero_point = scales[column // size], zero_points[column // size]
            target = torch.add(values[column], own[at], alpha=1 / energies[column])
            code = nearest_codes(target, scale, zero_point, bits, zero)
            found[column] = code.to(torch.uint8)
            torch.sub(code.sub_(zero_point).mul_(scale), values[column], out=moved[at])
            values[column] += moved[at]
            own.addr_(block[at], moved[at], alpha=-1)
        pulled.addmm_(hessian[:, start:stop], moved, alpha=-1)
    return found.t().contiguous()


class _Sums(NamedTuple):
    """What a group's change depends on, `[out]` each: with codes `q` and ones, under `H` and with what pulls on the group."""

    qq: torch.Tensor
    q1: torch.Tensor
    ones: torch.Tensor
    rq: torch.Tensor
    r1: torch.Tensor

    def best_scale(self, zero_point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least-squares scale under zero points, and by how much the change then is less than without the group."""
        energy = self.qq - 2 * zero_point * self.q1 + zero_point**2 * self.ones
        pull = self.rq - zero_point * self.r1
        scale = pull / energy
        good = (energy > 0) & (scale > torch.finfo(scale.dtype).tiny) & torch.isfinite(scale)
        return torch.where(good, scale, 1.0), torch.where(good, pull * scale, -torch.inf)

    def gain(self, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """By how much the change is less with these than without the group."""
        energy = self.qq - 2 * zero_point * self.q1 + zero_point**2 * self.ones
        return scale * (2 * (self.rq - zero_point * self.r1) - scale * energy)

    def best_zero_point(self) -> torch.Tensor:
        """The least-squares zero point, any number; not finite where the codes don't say which."""
        determinant = self.qq * self.ones - self.q1**2
        scale = self.rq * self.ones - self.r1 * self.q1
        minimum = self.r1 * self.qq - self.rq * self.q1
        return torch.where(determinant > 1e-9 * self.qq * self.ones, -minimum / scale, torch.nan)


def refit_grid(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    bits: int,
    sym: bool = False,
    zero: str = "int",
) -> Grid:
    """The scales and zero points for which given codes change the layer's output least, group after group.

    A group takes its least-squares scale, and the zero point among three (its own and its neighbours; with floats, its own and
    the least-squares one) that suits best, if it gains by that; the other groups stay meanwhile.

    Args:
        weight, hessian, codes, grid: As in [`output_change`].
        bits, sym, zero: Of the format; symmetric zero points stay.
    """
    groups = grid.scale.shape[1]
    scales, zero_points = grid.scale.clone(), grid.zero_point.clone()
    pulled = (weight - dequantize(codes, *grid)) @ hessian
    spans = [slice(int(part[0]), int(part[-1]) + 1) for part in torch.arange(weight.shape[1]).view(groups, -1)]
    for group, span in enumerate(spans):
        scale, zero_point = scales[:, group].clone(), zero_points[:, group].clone()
        own, numbers = hessian[span, span].contiguous(), codes[:, span].to(weight.dtype)
        before = (numbers - zero_point[:, None]) * scale[:, None]
        pull = torch.addmm(pulled[:, span], before, own)
        weighted = numbers @ own
        sums = _Sums(*_in_double(weighted * numbers, weighted, own.sum().expand(len(scale), 1), pull * numbers, pull))
        best_scale, best_zero_point = scale.double(), zero_point.double()
        best = sums.gain(best_scale, best_zero_point)
        for candidate in _zero_points(zero_point.double(), sums, bits, sym, zero):
            fitted, gain = sums.best_scale(candidate)
            better = gain > best
            best = torch.where(better, gain, best)
            best_scale = torch.where(better, fitted, best_scale)
            best_zero_point = torch.where(better, candidate, best_zero_point)
        scales[:, group], zero_points[:, group] = best_scale, best_zero_point
        if groups > 1:
            after = (numbers - zero_points[:, group, None]) * scales[:, group, None]
            pulled.addmm_(after - before, hessian[span], alpha=-1)
    return Grid(scales, zero_points)


def _in_double(*terms: torch.Tensor) -> list[torch.Tensor]:
    return [term.sum(1, dtype=torch.float64) for term in terms]


def _zero_points(own: torch.Tensor, sums: _Sums, bits: int, sym: bool, zero: str) -> list[torch.Tensor]:
    if sym:
        return [own]
    if zero == "int":
        return [own, *((own + step).clamp(0, 2**bits - 1) for step in (-1, 1))]
    best = sums.best_zero_point()
    return [own, torch.where(torch.isfinite(best), best, own)]
