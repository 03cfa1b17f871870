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
# What a mask of zero counts as: a key's weight shrinks by this factor, and keeps a finite logarithm in every dtype. A row
# that is zero all over is plain attention, since the factor cancels.
FLOOR = 1e-6


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
) -> torch.Tensor:
    """`log(max(mask, FLOOR))` of [`granularity_mask`], to be added to the scores before the softmax, `[batch, q, k]`.

    The backward works the mask out again, so that nothing of that size is kept but the result.

    Eq. 8's clamp has no gradient where it is saturated, and at z = 0 it is saturated for all pairs of a text shorter than
    `max_length`. With `leak`, such a pair has one that asks to leave saturation, `leak / (1 + tokens to the scope's edge)` of
    the full one: a surrogate, not the derivative. (Compiled graphs don't have it.)
    """
    if torch.compiler.is_compiling() or not (queries.requires_grad or keys.requires_grad):
        return granularity_mask(queries, keys, distances, mode, max_length).clamp_(min=FLOOR).log_()
    return _Bias.apply(queries, keys, distances, mode, max_length, leak)


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
    ) -> torch.Tensor:
        ctx.save_for_backward(queries, keys, distances)
        ctx.mode, ctx.max_length, ctx.leak = mode, max_length, leak
        return granularity_mask(queries, keys, distances, mode, max_length).clamp_(min=FLOOR).log_()

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
        rises = gradient / mask.clamp(min=FLOOR)
        # where the floor holds, the bias doesn't move; but a leak asks
        gradient = rises if ctx.leak else torch.where(mask >= FLOOR, rises, torch.zeros_like(gradient))
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
        return of_queries.sum(2), of_keys, None, None, None, None


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
