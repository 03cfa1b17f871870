# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How well scores tell in-distribution from out-of-distribution examples, with bootstrap intervals.

All take two arrays of scores, higher meaning more in-distribution; in-distribution is the positive class except in
`aupr_out`. `evaluate_metrics.py` has them as `evaluate.Metric`s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t
from sklearn.metrics import average_precision_score


class Interval(NamedTuple):
    """A measured value and its bootstrap interval."""

    value: float
    low: float
    high: float


def auroc(id_scores: Any, ood_scores: Any) -> float:
    """The probability that an in-distribution example scores higher than an out-of-distribution one, ties half.

    Raises:
        ValueError: If one of the two sets is empty or has NaN (as all measures here).
    """
    inside, outside = _checked(id_scores, ood_scores)
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, side="left")
    up_to = np.searchsorted(ordered, inside, side="right")
    return float((below + up_to).mean() / 2 / len(outside))


def aupr_in(id_scores: Any, ood_scores: Any) -> float:
    """Average precision with in-distribution examples as the positives."""
    inside, outside = _checked(id_scores, ood_scores)
    truth = np.repeat([1, 0], [len(inside), len(outside)])
    return float(average_precision_score(truth, np.concatenate([inside, outside])))


def aupr_out(id_scores: Any, ood_scores: Any) -> float:
    """Average precision with out-of-distribution examples as the positives, by the scores' negatives."""
    inside, outside = _checked(id_scores, ood_scores)
    truth = np.repeat([0, 1], [len(inside), len(outside)])
    return float(average_precision_score(truth, -np.concatenate([inside, outside])))


def fpr_at_recall(id_scores: Any, ood_scores: Any, recall: float = 0.95, positive: str = "in") -> float:
    """The share of out-of-distribution examples that pass the highest threshold that lets at least `recall` of the
    in-distribution examples pass.

    An example passes if its score is at least the threshold, so equal scores stand or fall together: exact on ties.

    Args:
        id_scores, ood_scores: Scores.
        recall: Share of the positive examples that must be told.
        positive: `"in"`: in-distribution examples are the positives, as in Hendrycks and Gimpel (2017) and the papers after
            it. `"out"`: out-of-distribution ones are, as in pytorch-ood: the share of in-distribution examples that are
            rejected where at least `recall` of the others are.

    Raises:
        ValueError: If `positive` is neither.
    """
    inside, outside = _checked(id_scores, ood_scores)
    if positive not in ("in", "out"):
        raise ValueError(f"positive={positive!r} must be 'in' or 'out'.")
    if positive == "out":
        inside, outside = -outside, -inside
    return float((outside >= threshold_for_recall(inside, recall)).mean())


def threshold_for_recall(id_scores: Any, recall: float = 0.95) -> float:
    """The highest score that at least a share `recall` of the in-distribution examples reaches.

    Raises:
        ValueError: If `recall` is not in (0, 1], or there is no score.
    """
    if not 0 < recall <= 1:
        raise ValueError(f"recall={recall!r} must be greater than 0 and at most 1.")
    scores = _scores(id_scores, "id_scores")
    needed = int(np.ceil(recall * len(scores) - 1e-9))  # 0.95 of 20 is 19, whatever 0.95 * 20 rounds to
    return float(np.sort(scores)[len(scores) - needed])


def detection_error(id_scores: Any, ood_scores: Any) -> float:
    """The least mean of the two error rates over all thresholds: both kinds of examples equally likely."""
    inside, outside = _checked(id_scores, ood_scores)
    thresholds = np.append(np.unique(np.concatenate([inside, outside])), np.inf)
    missed = np.searchsorted(np.sort(inside), thresholds, side="left") / len(inside)
    passed = 1 - np.searchsorted(np.sort(outside), thresholds, side="left") / len(outside)
    return float((missed + passed).min() / 2)


def id_accuracy(predictions: Any, labels: Any) -> float:
    """The share of in-distribution examples that are classified right.

    Raises:
        ValueError: If there are none, or the lengths differ.
    """
    classes, truth = np.asarray(predictions), np.asarray(labels)
    if classes.shape != truth.shape or not classes.size:
        raise ValueError(f"{classes.shape} predictions can't be compared with {truth.shape} labels.")
    return float((classes == truth).mean())


MEASURES: dict[str, Callable[[Any, Any], float]] = {
    "auroc": auroc,
    "aupr_in": aupr_in,
    "aupr_out": aupr_out,
    "fpr95": fpr_at_recall,
    "detection_error": detection_error,
}


def bootstrap(
    measure: Callable[[Any, Any], float],
    id_scores: Any,
    ood_scores: Any,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """A measure with its percentile bootstrap interval; the two sets are drawn anew separately.

    Args:
        measure: One of this module's, or any function of the two arrays.
        id_scores, ood_scores: Scores.
        level: Share of the resamples inside the interval.
        resamples: How many.
        seed: Of the resampling.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level={level!r} must be between 0 and 1, and resamples={resamples!r} at least 1.")
    inside, outside = _checked(id_scores, ood_scores)
    generator = np.random.default_rng(seed)
    values = [
        measure(
            inside[generator.integers(len(inside), size=len(inside))],
            outside[generator.integers(len(outside), size=len(outside))],
        )
        for _ in range(resamples)
    ]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(measure(inside, outside)), float(low), float(high))


def mean_interval(values: Any, *, level: float = 0.95) -> Interval:
    """The mean of a few numbers with its interval by Student's t; of a single number, the interval is everything.

    (A bootstrap of two or three numbers is far too narrow.)

    Raises:
        ValueError: If there are none.
    """
    numbers = _scores(values, "values")
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Interval(mean, -np.inf, np.inf)
    half = float(student_t.ppf((1 + level) / 2, len(numbers) - 1) * numbers.std(ddof=1) / np.sqrt(len(numbers)))
    return Interval(mean, mean - half, mean + half)


def _checked(id_scores: Any, ood_scores: Any) -> tuple[np.ndarray, np.ndarray]:
    return _scores(id_scores, "id_scores"), _scores(ood_scores, "ood_scores")


def _scores(values: Any, name: str) -> np.ndarray:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"{name} has shape {scores.shape}: telling two kinds of examples apart takes some of each, in a flat array."
        )
    bad = np.flatnonzero(np.isnan(scores))
    if len(bad):
        raise ValueError(f"{name} has NaN in rows {bad[:5].tolist()}.")
    return scores
