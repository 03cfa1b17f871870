# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the values of a roll-out's states are regressed on: generalised advantage estimates of a terminal reward."""

from __future__ import annotations

import torch


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 1.0
) -> torch.Tensor:
    """`A_t = sum_i (gamma lam)^i delta_(t+i)` with `delta_t = r_t + gamma V_(t+1) - V_t` (CriticControl, equations 1 and
    2; Schulman et al., 2016).

    The critic's loss is the square of these; `A_t + V_t` is the target that the value of state t is regressed on. With
    `gamma = lam = 1` and a terminal reward, that is the reward itself.

    Args:
        rewards: `[batch, states]`, of a finished text 0 except at its last state.
        values: `[batch, states]`, V of each state. Of the state after the last one it is 0.
        mask: `[batch, states]`, True at the states of a text, which come first in its row.
        gamma: Discount of later rewards, in [0, 1].
        lam: Between one-step differences (0) and whole returns (1).

    Returns:
        `[batch, states]`, 0 where the mask is False.
    """
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for state in reversed(range(values.shape[1])):
        inside = mask[:, state].to(values.dtype)
        difference = rewards[:, state] + gamma * next_value - values[:, state]
        following = (difference + gamma * lam * following) * inside
        next_value = values[:, state] * inside
        advantages[:, state] = following
    return advantages


def terminal_rewards(outcomes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`[batch, states]`: each text's outcome `[batch]` at its last state, 0 elsewhere."""
    last = mask.long().sum(dim=1, keepdim=True) - 1
    return torch.zeros(mask.shape, dtype=outcomes.dtype, device=outcomes.device).scatter(1, last, outcomes[:, None])


def discounted_outcomes(outcomes: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """`[batch, states]`: `gamma^(states left) * outcome`, what a perfect value is on average; 0 outside the mask."""
    states = torch.arange(mask.shape[1], device=mask.device)
    left = (mask.long().sum(dim=1, keepdim=True) - 1 - states).clamp(min=0)
    return gamma ** left.to(outcomes.dtype) * outcomes[:, None] * mask.to(outcomes.dtype)
