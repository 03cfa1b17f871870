# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Resonance and scope: how strongly a query of granularity z_i may look at a key of granularity z_j, |i - j| away.

With 0 (a word of the sentence's template) for all tokens, everything is 1: plain attention. With 1 (a word of a detail), a
token sees its like within two tokens. Equations are those of the paper (Gu et al. 2022, section 3.1).
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch


MODES = ("R", "S", "R*S", "R+S")
EPSILON = 2  # of eq. 8
# What a mask of zero counted as once: a key out of scope kept a millionth of its weight, which a high score made good. Models
# that were saved then were trained with it, and keep it as their `mask_floor`.
EARLIER_FLOOR = 1e-6
# The bias moves by `1 / mask` for a step of the mask, at most by the inverse of this: a mask near 0 doesn't throw a step far.
STEEPEST = 1e-6


def resonance(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """C of eq. 6.

    Args:
        queries: Granularities of the queries, `[..., q, 1]`.
        keys: Of the keys, `[..., 1, k]`.

    Returns:
        `[..., q, k]` in [0, 1].
    """
    alike = (1 - queries - keys).clamp(min=0)
    return (1 - queries) * alike + queries * (1 - queries + keys).clamp(max=1)


def scope(queries: torch.Tensor, distances: torch.Tensor, max_length: int) -> torch.Tensor:
    """S of eq. 8.

    Args:
        queries: Granularities of the queries, `[..., q, 1]`.
        distances: `|i - j|`, `[q, k]`.
        max_length: N.

    Returns:
        `[..., q, k]` in [0, 1].
    """
    return (_width(queries, max_length) - distances).clamp(0, 1)


def granularity_mask(
    queries: torch.Tensor, keys: torch.Tensor, distances: Optional[torch.Tensor], mode: str, max_length: int
) -> torch.Tensor:
    """What attention weights are multiplied by (eq. 9 and its variants).

    Args:
        queries: Granularities of the queries, `[batch, q]`.
        keys: Of the keys, `[batch, k]`.
        distances: `|i - j|`, `[q, k]` or `[batch, q, k]`; None for cross-attention, which has resonance alone.
        mode: One of `MODES`.
        max_length: N.

    Returns:
        `[batch, q, k]` in [0, 1].
    """
    queries, keys = queries[:, :, None], keys[:, None]
    if mode == "R" or distances is None:
        return resonance(queries, keys)
    if mode == "S":
        return scope(queries, distances, max_length)
    alike, near = resonance(queries, keys), scope(queries, distances, max_length)
    return alike * near if mode == "R*S" else (alike + near) / 2


def granularity_bias(
    queries: torch.Tensor,
    keys: torch.Tensor,
    distances: Optional[torch.Tensor],
    mode: str,
    max_length: int,
    leak: float = 0.0,
    floor: float = 0.0,
) -> torch.Tensor:
    """`log(max(mask, floor))` of [`granularity_mask`], to be added to the scores before the softmax, `[batch, q, k]`.

    Where that is log(0), it is the dtype's lowest number: no score makes up for it, and nothing becomes nan. The backward
    works the mask out again, so that nothing of that size is kept but the result.

    Eq. 8's clamp has no gradient where it is saturated, and at z = 0 it is saturated for all pairs of a text shorter than
    `max_length`. With `leak`, such a pair has one that asks to leave saturation, `leak / (1 + tokens to the scope's edge)` of
    the full one: a surrogate, not the derivative. (Compiled graphs don't have it.) A key out of scope can ask only under a
    `floor` that leaves it a weight.
    """
    if torch.compiler.is_compiling() or not (queries.requires_grad or keys.requires_grad):
        return _log(granularity_mask(queries, keys, distances, mode, max_length), floor)
    return _Bias.apply(queries, keys, distances, mode, max_length, leak, floor)


def _log(mask: torch.Tensor, floor: float) -> torch.Tensor:
    """The logarithm of a mask, in its place where no gradient goes through."""
    limits = torch.finfo(mask.dtype)
    if not (torch.compiler.is_compiling() or mask.requires_grad):
        return mask.clamp_(min=floor).log_().clamp_(min=limits.min)
    if floor:
        return mask.clamp(min=floor).log()
    # in this order, since log(0) has a gradient of nan even where it isn't taken
    return mask.clamp(min=limits.tiny).log().masked_fill(mask <= 0, limits.min)


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        distances: Optional[torch.Tensor],
        mode: str,
        max_length: int,
        leak: float,
        floor: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(queries, keys, distances)
        ctx.mode, ctx.max_length, ctx.leak, ctx.floor = mode, max_length, leak, floor
        return _log(granularity_mask(queries, keys, distances, mode, max_length), floor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        queries, keys, distances = ctx.saved_tensors
        (gradient,) = gradients
        a, b = queries[:, :, None], keys[:, None]
        mode = "R" if distances is None else ctx.mode
        alike: Any = None
        near: Any = None
        if mode != "S":
            apart = 1 - a - b
            gap = (1 - a + b).clamp(max=1)
            alike = (1 - a) * apart.clamp(min=0) + a * gap
        if mode != "R":
            width = _width(a, ctx.max_length)
            near = (width - distances).clamp(0, 1)
        mask: Any = near if alike is None else alike
        if mode in ("R*S", "R+S"):
            mask = alike * near if mode == "R*S" else (alike + near) / 2
        rises = gradient / mask.clamp(min=STEEPEST)
        # where the floor holds, the bias doesn't move; but a leak asks
        moving = mask >= ctx.floor if ctx.floor else mask > 0
        gradient = rises if ctx.leak else torch.where(moving, rises, torch.zeros_like(gradient))
        of_queries: Any = 0
        of_keys = torch.zeros_like(keys)
        if alike is not None:
            through = gradient * near if mode == "R*S" else gradient / 2 if mode == "R+S" else gradient
            here = (apart >= 0).to(gradient.dtype)
            below = (b <= a).to(gradient.dtype)
            slope = a * below - (1 - a) * here
            of_keys = (through * slope).sum(1)
            # d/da of (1 - a) relu(1 - a - b) + a min(1, 1 - a + b)
            of_queries = through * (gap - apart.clamp(min=0) - (1 - a) * here - a * below)
        if near is not None:
            through = gradient * alike if mode == "R*S" else gradient / 2 if mode == "R+S" else gradient
            room = width - distances
            moves = ((room >= 0) & (room <= 1)).to(through.dtype)
            if ctx.leak:
                inside, outside = (room > 1) & (through > 0), (room < 0) & (through < 0)
                moves = torch.where(inside, ctx.leak / room.clamp(min=1), moves)
                moves = torch.where(outside, ctx.leak / (1 - room.clamp(max=0)), moves)
            rate = -math.log(ctx.max_length - EPSILON) * (width - EPSILON)
            of_queries = of_queries + through * moves * rate
        return of_queries.sum(2), of_keys, None, None, None, None, None


def _width(queries: torch.Tensor, max_length: int) -> torch.Tensor:
    return (max_length - EPSILON) ** (1 - queries) + EPSILON


def check_mode(mode: str, max_length: int) -> None:
    """Refuse an unknown mode, and an N that eq. 8 has no meaning for.

    Raises:
        ValueError: Names the argument.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {MODES}.")
    if not isinstance(max_length, int) or max_length <= EPSILON:
        raise ValueError(f"max_length={max_length!r} must be an integer above {EPSILON}: the N of eq. 8.")
