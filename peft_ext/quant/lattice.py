# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Float weights that lie on a lattice: every weight of a group is `offset + step * code`, rounded to the file's float type.

That is what quantisation-aware training releases in bfloat16, and what is left of a GGUF once it was dequantised. Rounding such
a weight to integers once more, by its range, loses what was exact: the ends of a group's range needn't be the ends of its
lattice. Here step and offset are found by arithmetic: whatever the step is, it divides every difference between two weights of
a group. Each number of steps that the range may have is tried, fewest first; the interval of steps, then of offsets, that leads
to the very weights after rounding is computed, and in it the number with the fewest binary digits is taken, which is the one
that the weights were made from. A layer counts as found when all its weights come out as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch

from peft_ext.quant.uniform import UNIFORM_BITS, Quantized, dequantize


# Group sizes that are looked for, besides one group for a whole row.
GROUP_SIZES = (1024, 512, 256, 128, 64, 32, 16)
# Rows on which a layer without a lattice is told at little cost.
_FEW_ROWS = 4
_CHUNK = 1 << 20
# Binary digits of a float type's numbers, and the exponent of the least one.
_PRECISION = {torch.float32: (24, -149), torch.float16: (11, -24), torch.bfloat16: (8, -133)}
# Sums in float32 are rounded more than once: relative to a group's largest weight.
_ROUNDING = 2.0**-22
# Binary digits of a step or offset, those of float types first.
_DIGITS = (8, 11, 17, 24)
_PASSES = 6
# Groups of which all pairs of weights are looked at.
_LARGEST_PAIRED = 256
_PARTS = (0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.4, -0.4, 0.45, -0.45)
# What double precision itself may be off by, in sums and quotients of a few numbers.
_ARITHMETIC = 2.0**-40
# How unlikely (in binary digits, for a group) it must be that numbers that lie on no lattice look as if they did.
_EVIDENCE = 12


class Lattice(NamedTuple):
    """A weight as integers that stand for it exactly.

    Args:
        quantized: Codes, steps and zero points.
        bits: Width of a code.
        sym: Whether all zero points are `2**(bits - 1)`.
    """

    quantized: Quantized
    bits: int
    sym: bool


class _Fit(NamedTuple):
    """Of some groups: codes from zero on `[rows, groups, size]`, and step and offset `[rows, groups, 1]`, float64."""

    codes: torch.Tensor
    step: torch.Tensor
    offset: torch.Tensor


def find_lattice(
    weight: torch.Tensor,
    bits: Optional[int] = None,
    group_size: Optional[int] = None,
    sym: Optional[bool] = None,
    zero: Optional[str] = None,
) -> Optional[Lattice]:
    """The lattice that a weight lies on; None if it lies on none, or on none of that format.

    Args:
        weight: float `[out, in]`. Numbers of half precision are recognised in float32, too.
        bits: Width of a code; None: the smallest that holds all codes.
        group_size: Inputs that share a step, -1 for all of a row; None: what takes the fewest bits in all.
        sym: Whether zero points lie in the middle of the codes; None: if they can.
        zero: `"int"`: zero is one of the levels; `"float"`: it needn't be; None: if it can.

    Returns:
        Its `quantized` weight, cast to the type of the weight, is the weight: bit for bit in half precision, up to rounding of
        the last digits in float32.
    """
    weight = weight.detach()
    if weight.dim() != 2 or not weight.numel() or not bool(torch.isfinite(weight).all()):
        return None
    in_features = weight.shape[1]
    wanted = GROUP_SIZES if group_size is None else (in_features if group_size == -1 else group_size,)
    sizes = [size for size in wanted if in_features % size == 0 and size < in_features]
    if group_size in (None, -1, in_features):
        sizes.insert(0, in_features)
    for dtype in _types(weight):
        sample = weight[:: max(1, len(weight) // _FEW_ROWS)][:_FEW_ROWS]
        fitting: list[tuple[float, int, bool]] = []
        for integer in (True, False):
            if zero is not None and integer != (zero == "int") or (sym and not integer):
                continue
            for size in reversed(sizes):
                found = _pack(sample, size, integer, dtype, bits, sym)
                if found is not None:
                    zeros = 0 if found.sym else 8 if integer else 32
                    fitting.append((found.bits + (32 + zeros) / size, size, integer))
                elif size == sizes[-1]:
                    break  # what holds for a group holds for the parts of it
        for _, size, integer in sorted(fitting):
            found = _pack(weight, size, integer, dtype, bits, sym)
            if found is not None:
                return found
    return None


def _types(weight: torch.Tensor) -> list[torch.dtype]:
    """The types that a weight's numbers were rounded to: its own, and half ones that hold them all; float32 first, which
    leaves the least room."""
    halves = [
        dtype
        for dtype in (torch.float16, torch.bfloat16)
        if weight.dtype == dtype or torch.equal(weight.to(dtype).to(weight.dtype), weight)
    ]
    return [torch.float32, *halves]


def _pack(
    weight: torch.Tensor, size: int, integer: bool, dtype: torch.dtype, bits: Optional[int], sym: Optional[bool]
) -> Optional[Lattice]:
    """A whole weight on lattices of groups of one size."""
    fits = []
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        fit = _find(rows, size, integer, dtype, bits)
        if fit is None:
            return None
        fits.append(_Fit(fit.codes.to(torch.uint8), fit.step, fit.offset))
    codes = torch.cat([fit.codes for fit in fits])
    step, offset = (torch.cat([getattr(fit, name) for fit in fits])[..., 0] for name in ("step", "offset"))
    if integer:
        packed = _with_integer_zeros(codes, step, (-offset / step).round().long(), bits, sym)
    else:
        width = _width(int(codes.max()), bits)
        zero_point = (-offset / step).to(torch.float32)
        packed = None if width is None else Lattice(Quantized(codes, step.to(torch.float32), zero_point), width, False)
    if packed is None:
        return None
    quantized = packed.quantized._replace(codes=packed.quantized.codes.view(weight.shape))
    again = dequantize(*quantized)
    if dtype != torch.float32:
        exact = torch.equal(again.to(dtype).to(torch.float32), weight.to(torch.float32))
    else:
        largest = weight.view(len(weight), -1, size).float().abs().amax(-1, keepdim=True)
        error = (again - weight.float()).abs().view(len(weight), -1, size)
        exact = bool((error <= _ROUNDING * largest).all())
    return packed._replace(quantized=quantized) if exact else None


def _with_integer_zeros(
    codes: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, bits: Optional[int], sym: Optional[bool]
) -> Optional[Lattice]:
    """Codes and zero points from zero on, or symmetric where all groups allow it in as few bits.

    Args:
        codes: uint8 `[rows, groups, size]`, from zero on.
        step: float64 `[rows, groups]`.
        zero: The code of zero, int64 `[rows, groups]`.
        bits, sym: As of [`find_lattice`].
    """
    highest = codes.amax(-1).long()
    low, high = -zero, highest - zero
    # turned round where that makes it fit: the middle leaves one level more below than above
    turned = high > -low
    reach = torch.where(turned, torch.maximum(high, 1 - low), torch.maximum(-low, high + 1))
    symmetric, plain = _width(2 * int(reach.max()) - 1, bits), _width(max(int(highest.max()), int(zero.max())), bits)
    if sym is not False and symmetric is not None and (sym or plain is None or symmetric <= plain):
        middle = 2 ** (symmetric - 1)
        sign = torch.where(turned, -1, 1)
        signed = (codes.long() - zero[..., None]) * sign[..., None] + middle
        zeros = torch.full_like(zero, middle, dtype=torch.uint8)
        return Lattice(Quantized(signed.to(torch.uint8), (step * sign).float(), zeros), symmetric, True)
    if sym or plain is None or int(zero.min()) < 0:
        return None
    return Lattice(Quantized(codes, step.float(), zero.to(torch.uint8)), plain, False)


def _width(highest: int, bits: Optional[int]) -> Optional[int]:
    """The smallest width of a code, or the one that is asked for; None if that is too small."""
    fitting = (width for width in UNIFORM_BITS if highest < 2**width and (bits is None or width == bits))
    return next(fitting, None)


def _find(rows: torch.Tensor, size: int, integer: bool, dtype: torch.dtype, bits: Optional[int]) -> Optional[_Fit]:
    """The lattices of all groups of some rows; None if one of them has none.

    Args:
        integer: Whether zero must be one of the levels.
    """
    groups = rows.to(torch.float64).view(-1, size)
    digits, smallest = _PRECISION[dtype]
    if dtype == torch.float32:
        slack = groups.abs().amax(-1, keepdim=True).expand_as(groups) * (_ROUNDING / 2) + 2.0 ** (smallest - 1)
    else:  # half of the distance between neighbours
        half = torch.where(groups == 0, smallest, (torch.frexp(groups).exponent - digits).clamp(min=smallest)) - 1
        slack = torch.ldexp(torch.ones_like(groups), half)
    slack = slack * (1 + _ARITHMETIC)  # a weight may lie just on the boundary
    values, slacks = groups, slack
    if integer:
        values = torch.cat([groups, torch.zeros_like(groups[:, :1])], -1)
        slacks = torch.cat([slack, torch.zeros_like(slack[:, :1])], -1)
    steps = _fewest_steps(values, slacks, 2 ** (8 if bits is None else bits) - 1, integer)
    if steps is None:
        return None
    fit = _fit(groups, slack, values, steps, integer, dtype)
    return None if fit is None else _Fit(*(each.view(len(rows), -1, each.shape[-1]) for each in fit))


def _fewest_steps(values: torch.Tensor, slacks: torch.Tensor, most: int, integer: bool) -> Optional[torch.Tensor]:
    """How many steps there are between the least and the largest of each group, int64 `[n]` (0: they are all the same); None
    if a group lies on no lattice of at most `most`."""
    ordered, order = values.sort(-1)
    sorted_slacks = slacks.gather(-1, order)
    span = ordered[:, -1:] - ordered[:, :1]
    ends = sorted_slacks[:, :1] + sorted_slacks[:, -1:]
    # levels are counted from zero, which is known exactly, or else from the least
    anchor = torch.zeros_like(span) if integer else ordered[:, :1]
    uncertain_anchor = torch.zeros_like(span) if integer else sorted_slacks[:, :1]
    distance = values - anchor
    off = ends / (span - ends).clamp(min=1e-300)  # of a step, relative
    room = slacks + uncertain_anchor + (distance.abs() + slacks) * off
    gaps, between = ordered.diff(), sorted_slacks[:, 1:] + sorted_slacks[:, :-1]
    different = gaps > between
    gaps = torch.where(different, gaps, torch.inf)
    smallest, at = gaps.min(-1, keepdim=True)
    uncertain = between.gather(-1, at)
    steps = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    left = torch.arange(len(values), device=values.device)[different.any(-1)]
    # of a step, the smallest difference is a whole number: tried on it first, on all then
    for count in range(1, most + 1):
        if not len(left):
            break
        step = span[left] / count
        ratio = smallest[left] / step
        whole = ratio.round()
        likely = (whole >= 1) & ((ratio - whole).abs() * step <= uncertain[left] + whole * step * off[left])
        some = left[likely[:, 0]]
        if not len(some):
            continue
        step = span[some] / count
        place = distance[some] / step
        fits = ((place - place.round()).abs() * step <= room[some]).all(-1)
        # a weight that may lie anywhere between two levels says nothing; one that can't says as much as it could miss them
        evidence = (step / (2 * room[some])).clamp(1, 2.0**24).log2()
        said = evidence.sum(-1) - 2 * evidence.amax(-1) - 8
        found = some[fits & (said >= _EVIDENCE)]
        steps[found] = count
        keep = torch.ones(len(values), dtype=torch.bool, device=values.device)
        keep[found] = False
        left = left[keep[left]]
    return None if len(left) else steps


def _fit(
    groups: torch.Tensor,
    slack: torch.Tensor,
    values: torch.Tensor,
    steps: torch.Tensor,
    integer: bool,
    dtype: torch.dtype,
) -> Optional[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Codes, steps and offsets of groups whose number of steps is known; None if the weights of one don't come out.

    Args:
        groups, slack: float64 `[n, size]`, and how far a weight may be from its level.
        values: The groups, with zero if that is a level.
    """
    constant = (steps == 0)[:, None]
    low = values.amin(-1, keepdim=True)
    step = torch.where(constant, 1.0, (values.amax(-1, keepdim=True) - low) / steps.clamp(min=1)[:, None])
    codes = torch.where(constant, 0.0, ((groups - low) / step).round())
    if integer:
        return _fit_integer(groups, slack, torch.where(constant, 1.0, step), steps, dtype)
    mean = codes.mean(-1, keepdim=True)
    spread = (codes - mean).square().sum(-1, keepdim=True)
    slope = ((codes - mean) * groups).sum(-1, keepdim=True) / spread.clamp(min=1)
    best_step, best_offset = torch.ones_like(slope), groups[:, :1].clone()
    open_ = ~constant
    for candidate in _steps_to_try(groups, slack, codes, slope, open_):
        least = (groups - slack - candidate * codes).amax(-1, keepdim=True)
        most = (groups + slack - candidate * codes).amin(-1, keepdim=True)
        for offset in _simple(least, most):
            inside = (offset >= least) & (offset <= most) & (candidate > 0)
            found = open_ & inside & _comes_out(groups, codes + offset / candidate, candidate, dtype)
            best_step, best_offset = (
                torch.where(found, new, old) for new, old in ((candidate, best_step), (offset, best_offset))
            )
            open_ &= ~found
        if not bool(open_.any()):
            break
    return None if bool(open_.any()) else (codes, best_step, best_offset)


def _steps_to_try(
    groups: torch.Tensor, slack: torch.Tensor, codes: torch.Tensor, slope: torch.Tensor, open_: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Steps for offsets to be found for, `[n, 1]`: least squares' first, then of groups that are open still what all pairs of
    their weights allow (an offset exists where, and only where, every two weights have one).

    Args:
        open_: bool `[n, 1]`, changed by the caller.
    """
    yield from (_rounded(slope, digits) for digits in _DIGITS)
    left, size = open_[:, 0].nonzero()[:, 0], groups.shape[1]
    if size > _LARGEST_PAIRED:
        yield from (slope * (1 + turn * 2.0**-13) for turn in sorted(range(-16, 17), key=abs))
        return
    least, most = slope.clone(), slope.clone()
    for some in left.split(max(1, _CHUNK // size**2)):
        values, room, counts = (each[some] for each in (groups, slack, codes))
        apart = counts[:, :, None] - counts[:, None]
        difference, both = values[:, :, None] - values[:, None], room[:, :, None] + room[:, None]
        ahead = apart > 0
        apart = torch.where(ahead, apart, 1.0)
        lower = torch.where(ahead, (difference - both) / apart, -torch.inf)
        upper = torch.where(ahead, (difference + both) / apart, torch.inf)
        least[some], most[some] = lower.amax((1, 2))[:, None], upper.amin((1, 2))[:, None]
    yield from _simple(least, most)


def _fit_integer(
    groups: torch.Tensor, slack: torch.Tensor, step: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype
) -> Optional[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The same where zero is a level, from a step that may be too rough for the far levels: the near ones make it finer."""
    constant = (steps == 0)[:, None]
    off = torch.where(constant, 0.0, (2.0**-7 / steps.clamp(min=1)[:, None]).clamp(max=2.0**-7)) * step
    size = groups.abs()
    for _ in range(_PASSES):
        counts = (groups / step).round()
        sure = (slack + size / step * off < 0.5 * step) & (counts != 0)
        least, most = _allowed(groups, slack, counts, sure)
        some = sure.any(-1, keepdim=True) & (least <= most)
        step = torch.where(some, (least + most) / 2, step)
        off = torch.where(some, (most - least) / 2, off)
    counts = torch.where(constant, 0.0, (groups / step).round())
    least, most = _allowed(groups, slack, counts, counts != 0)
    open_ = ~constant & ((counts != 0) | (size <= slack)).all(-1, keepdim=True)
    step, good = torch.ones_like(step), constant & (groups == 0).all(-1, keepdim=True)
    for candidate in _simple(least, most):
        found = open_ & (candidate >= least) & (candidate <= most) & _comes_out(groups, counts, candidate, dtype)
        step, good, open_ = torch.where(found, candidate, step), good | found, open_ & ~found
    low = counts.amin(-1, keepdim=True).clamp(max=0)
    return (counts - low, step, low * step) if bool(good.all()) else None


def _allowed(
    groups: torch.Tensor, slack: torch.Tensor, counts: torch.Tensor, sure: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The interval of steps that all weights with sure counts allow."""
    divisor = torch.where(sure, counts, 1.0)
    one, other = (groups - slack) / divisor, (groups + slack) / divisor
    least = torch.where(sure, torch.minimum(one, other), -torch.inf).amax(-1, keepdim=True)
    most = torch.where(sure, torch.maximum(one, other), torch.inf).amin(-1, keepdim=True)
    return least, most


def _simple(least: torch.Tensor, most: torch.Tensor) -> list[torch.Tensor]:
    """Numbers inside of an interval, those with the fewest binary digits first. More than one, since some lead just to the
    boundary between two roundings."""
    middle, width = (least + most) / 2, most - least
    return [
        *(_rounded(middle, digits) for digits in _DIGITS),
        *(_rounded(middle + width * part, digits) for digits in (11, 24) for part in _PARTS),
    ]


def _comes_out(groups: torch.Tensor, levels: torch.Tensor, step: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Whether all weights of a group are the product of a step and their level once that is rounded, bool `[n, 1]`."""
    if dtype == torch.float32:
        return torch.ones_like(step, dtype=torch.bool)  # the interval says it
    product = step.to(torch.float32) * levels.to(torch.float32)
    return (product.to(dtype).to(torch.float64) == groups).all(-1, keepdim=True)


def _rounded(values: torch.Tensor, digits: int) -> torch.Tensor:
    """Rounded to so many binary digits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**digits).round() / 2**digits, exponent)
