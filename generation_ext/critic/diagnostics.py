# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How much a critic knows: explained variance of the outcome and calibration of V, overall and by position."""

from __future__ import annotations

import math
from typing import Any

import torch


def explained_variance(values: torch.Tensor, outcomes: torch.Tensor) -> float:
    """`1 - Var(outcome - V) / Var(outcome)`: 1 is a perfect critic, 0 a constant one, below 0 worse than constant.

    Args:
        values, outcomes: Of one shape.

    Returns:
        NaN if all outcomes are the same, so that there is nothing to explain.
    """
    values, outcomes = values.flatten().double(), outcomes.flatten().double()
    total = outcomes.var(correction=0) if outcomes.numel() else torch.tensor(0.0)
    if total < 1e-12:
        return float("nan")
    return float(1.0 - (outcomes - values).var(correction=0) / total)


def calibration_error(values: torch.Tensor, outcomes: torch.Tensor, bins: int = 10) -> float:
    """Expected calibration error: the mean over bins of V of |mean outcome - mean V|, weighted by how many fall there."""
    table = calibration_table(values, outcomes, bins)
    total = sum(row["count"] for row in table)
    return sum(row["count"] * abs(row["outcome"] - row["value"]) for row in table) / total if total else float("nan")


def calibration_table(values: torch.Tensor, outcomes: torch.Tensor, bins: int = 10) -> list[dict[str, float]]:
    """What happened where the critic said so: for each of `bins` equal parts of [0, 1] that holds any value, its bounds,
    the count, the mean V and the mean outcome."""
    values, outcomes = values.flatten().double(), outcomes.flatten().double()
    index = (values * bins).long().clamp(0, bins - 1)
    rows = []
    for number in range(bins):
        inside = index == number
        if inside.any():
            rows.append(
                {
                    "from": number / bins,
                    "to": (number + 1) / bins,
                    "count": int(inside.sum()),
                    "value": float(values[inside].mean()),
                    "outcome": float(outcomes[inside].mean()),
                }
            )
    return rows


def by_position(values: torch.Tensor, outcomes: torch.Tensor, mask: torch.Tensor) -> list[dict[str, Any]]:
    """One row a position: 0 is the prompt alone, t the text after t tokens.

    Args:
        values, outcomes, mask: `[texts, states]`; position t counts the texts that have so many tokens.

    Returns:
        Rows with position, count, explained_variance, calibration_error, mean value and mean outcome.
    """
    rows = []
    for position in range(mask.shape[1]):
        inside = mask[:, position].bool()
        if not inside.any():
            break
        here, there = values[inside, position], outcomes[inside, position]
        rows.append(
            {
                "position": position,
                "count": int(inside.sum()),
                "explained_variance": explained_variance(here, there),
                "calibration_error": calibration_error(here, there),
                "value": float(here.double().mean()),
                "outcome": float(there.double().mean()),
            }
        )
    return rows


def summary(values: torch.Tensor, outcomes: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """The figures for a log: over all positions, and at position 0, 1, 2, 4, 8, ... (`explained_variance_at_4`).

    A figure that can't be had (all outcomes equal) is left out.
    """
    inside = mask.bool()
    figures = {
        "explained_variance": explained_variance(values[inside], outcomes[inside]),
        "calibration_error": calibration_error(values[inside], outcomes[inside]),
        "value_mean": float(values[inside].double().mean()),
    }
    for row in by_position(values, outcomes, mask):
        position = row["position"]
        if position & (position - 1) == 0:  # 0 and the powers of two
            figures[f"explained_variance_at_{position}"] = row["explained_variance"]
            figures[f"calibration_error_at_{position}"] = row["calibration_error"]
    return {name: value for name, value in figures.items() if value == value}


def finite(value: Any) -> Any:
    """Figures for JSON, which has no NaN: it becomes null."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
