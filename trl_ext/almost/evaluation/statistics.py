# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Bootstrap intervals and win rates, plain and with the length of the answers taken out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np


LEVEL = 0.95
_RESAMPLES = 1000
_STEPS = 50


def with_interval(rows: Any, statistic: Callable[[np.ndarray], float] = np.mean, seed: int = 0) -> dict[str, Any]:
    """A statistic of rows with its 95 % bootstrap interval (percentiles over rows drawn with replacement).

    Args:
        rows: `[n]` or `[n, columns]`.
        statistic: Of such an array.
        seed: Of the draws.

    Raises:
        ValueError: If there are no rows.
    """
    values = np.asarray(rows, dtype=np.float64)
    if not len(values):
        raise ValueError("rows is empty; there is nothing to average.")
    generator = np.random.default_rng(seed)
    drawn = [statistic(values[generator.integers(len(values), size=len(values))]) for _ in range(_RESAMPLES)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(statistic(values)), "interval": [float(low), float(high)], "n": len(values)}


def accuracy(hits: Sequence[float], groups: Optional[Sequence[str]] = None) -> dict[str, Any]:
    """Share of hits with its interval, over all and for each group."""
    result = with_interval(hits)
    if groups is not None:
        members: dict[str, list[float]] = {}
        for hit, group in zip(hits, groups):
            members.setdefault(group, []).append(hit)
        result["groups"] = {group: with_interval(values) for group, values in members.items()}
    return result


def length_controlled(rows: np.ndarray) -> float:
    """The win rate if answers were of equal length (after AlpacaEval 2's length-controlled win rate, Dubois et al. 2024).

    Fits `P(win) = sigmoid(theta + phi * tanh(d / std(d)))`, d the difference in length, and returns `sigmoid(theta)`.
    AlpacaEval's further term, the difficulty of each instruction, is left out: it is fitted on many models. `phi` has
    the penalty `phi^2 / 2`.

    Args:
        rows: `[n, 2]`: wins (0, 1, or between for ties and disagreeing orders), and differences in length.
    """
    wins, differences = rows[:, 0], rows[:, 1]
    if wins.min() == wins.max() and wins[0] in (0.0, 1.0):
        return float(wins[0])
    spread = differences.std()
    length = np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)
    design = np.stack([np.ones_like(length), length], axis=1)
    penalty = np.diag([0.0, 1.0])
    weights = np.zeros(2)
    for _ in range(_STEPS):
        predicted = _sigmoid(design @ weights)
        gradient = design.T @ (predicted - wins) + penalty @ weights
        curvature = (design * (predicted * (1 - predicted))[:, None]).T @ design + penalty
        step = np.linalg.solve(curvature + 1e-9 * np.eye(2), gradient)
        weights -= np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    return float(_sigmoid(weights[0]))


def win_rate(wins: Sequence[float], differences: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Win rate and length-controlled win rate, each with its interval over questions.

    Args:
        wins: Each question's share of wins over both orders, a tie counting half.
        differences: Length of the answer less that of the baseline's.
        seed: Of the bootstrap.
    """
    rows = np.stack([np.asarray(wins, np.float64), np.asarray(differences, np.float64)], axis=1)
    return {
        "win_rate": with_interval(rows[:, 0], seed=seed),
        "length_controlled": with_interval(rows, length_controlled, seed=seed),
    }


def _sigmoid(value: Any) -> Any:
    return 1 / (1 + np.exp(-np.clip(value, -60, 60)))
