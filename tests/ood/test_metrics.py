# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Measures against their definitions, counted pair by pair and threshold by threshold."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from peft_ext.ood import metrics


@pytest.fixture(params=["continuous", "ties", "all-equal", "separate"])
def scores(request):
    generator = np.random.default_rng(1)
    inside, outside = generator.normal(1, 1, 40), generator.normal(0, 1, 25)
    if request.param == "ties":
        return inside.round(), outside.round()
    if request.param == "all-equal":
        return np.ones(40), np.ones(25)
    return inside + (10 if request.param == "separate" else 0), outside


def _thresholds(inside, outside):
    return sorted({*inside.tolist(), *outside.tolist(), np.inf}, reverse=True)


def test_auroc(scores):
    inside, outside = scores
    pairs = [(i > o) + (i == o) / 2 for i in inside for o in outside]
    assert metrics.auroc(inside, outside) == pytest.approx(np.mean(pairs))
    truth = np.repeat([1, 0], [len(inside), len(outside)])
    assert metrics.auroc(inside, outside) == pytest.approx(roc_auc_score(truth, np.concatenate(scores)))


def test_fpr_at_recall(scores):
    """The first threshold from above that lets 95 % of the in-distribution examples pass, ties as one."""
    inside, outside = scores
    for recall in (0.95, 0.5, 1.0):
        threshold = next(t for t in _thresholds(inside, outside) if np.mean(inside >= t) >= recall)
        assert metrics.fpr_at_recall(inside, outside, recall) == np.mean(outside >= threshold)
        # as pytorch-ood counts: out-of-distribution examples are what is to be detected
        least = next(t for t in _thresholds(-outside, -inside) if np.mean(-outside >= t) >= recall)
        assert metrics.fpr_at_recall(inside, outside, recall, positive="out") == np.mean(-inside >= least)
    with pytest.raises(ValueError, match="positive='both'"):
        metrics.fpr_at_recall(inside, outside, positive="both")


def test_fpr95_by_hand():
    # 19 of 20 pass at 1.0; the tie with an outlier counts as passed
    inside = [0.0] + [1.0] * 19
    assert metrics.fpr_at_recall(inside, [1.0, 0.5, 0.5, 0.0]) == 0.25
    assert metrics.fpr_at_recall(np.arange(100), [4.5, 5.0, 5.5]) == pytest.approx(2 / 3)


def test_detection_error(scores):
    inside, outside = scores
    errors = [(np.mean(inside < t) + np.mean(outside >= t)) / 2 for t in _thresholds(inside, outside)]
    assert metrics.detection_error(inside, outside) == pytest.approx(min(errors))


def test_aupr(scores):
    """Precision at every threshold, weighted by the gain in recall."""

    def average_precision(positives, negatives):
        total, before = 0.0, 0.0
        for t in _thresholds(positives, negatives)[1:]:
            recall, hits = np.mean(positives >= t), np.sum(positives >= t)
            total += (recall - before) * hits / max(hits + np.sum(negatives >= t), 1)
            before = recall
        return total

    inside, outside = scores
    assert metrics.aupr_in(inside, outside) == pytest.approx(average_precision(inside, outside))
    assert metrics.aupr_out(inside, outside) == pytest.approx(average_precision(-outside, -inside))


def test_threshold_keeps_the_recall():
    scores = np.random.default_rng(0).normal(size=997)
    for recall in (0.9, 0.95, 1.0):
        threshold = metrics.threshold_for_recall(scores, recall)
        assert np.mean(scores >= threshold) >= recall > np.mean(scores > threshold)
    assert metrics.threshold_for_recall(np.arange(20), 0.95) == 1.0
    with pytest.raises(ValueError, match="recall=0"):
        metrics.threshold_for_recall(scores, 0)


def test_bootstrap_covers_the_truth():
    """Normal scores one deviation apart have an AUROC of 0.7602; of 60 intervals of 90 %, 54 hold it on average."""
    covered = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        value, low, high = metrics.bootstrap(
            metrics.auroc, generator.normal(1, 1, 80), generator.normal(0, 1, 80), level=0.9, resamples=200, seed=seed
        )
        assert low < value < high
        covered += low <= 0.7602 <= high
    assert 46 <= covered <= 60
    again = [metrics.bootstrap(metrics.auroc, [1, 2, 3], [0, 2], resamples=50, seed=3) for _ in range(2)]
    assert again[0] == again[1]


def test_mean_interval():
    numbers = np.random.default_rng(0).normal(5, 1, 400)
    value, low, high = metrics.mean_interval(numbers)
    assert value == pytest.approx(numbers.mean())
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    from scipy.stats import ttest_1samp

    few = [0.1, 0.3, 0.2]
    assert metrics.mean_interval(few)[1:] == pytest.approx(ttest_1samp(few, 0).confidence_interval(0.95))
    assert metrics.mean_interval([0.5]) == (0.5, -np.inf, np.inf)


@pytest.mark.parametrize("measure", metrics.MEASURES.values())
@pytest.mark.parametrize(("inside", "outside"), [([], [1.0]), ([1.0], []), ([[1.0]], [1.0]), ([np.nan], [1.0])])
def test_what_cannot_be_measured(measure, inside, outside):
    with pytest.raises(ValueError, match="id_scores|ood_scores"):
        measure(inside, outside)


def test_accuracy():
    assert metrics.id_accuracy([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
    with pytest.raises(ValueError, match="predictions"):
        metrics.id_accuracy([], [])


def test_evaluate_metrics(scores):
    """Through `evaluate`'s own machinery, in batches, without a network."""
    pytest.importorskip("evaluate")
    from peft_ext.ood import evaluate_metrics as wrapped

    inside, outside = scores
    predictions = np.concatenate([inside, outside])
    references = np.repeat([1, 0], [len(inside), len(outside)])
    table = {
        wrapped.Auroc: ("auroc", metrics.auroc),
        wrapped.AuprIn: ("aupr_in", metrics.aupr_in),
        wrapped.AuprOut: ("aupr_out", metrics.aupr_out),
        wrapped.FprAtRecall: ("fpr_at_recall", metrics.fpr_at_recall),
        wrapped.DetectionError: ("detection_error", metrics.detection_error),
    }
    for cls, (name, measure) in table.items():
        metric = cls()
        for rows in (slice(0, 30), slice(30, None)):
            metric.add_batch(predictions=predictions[rows], references=references[rows])
        assert metric.compute() == {name: pytest.approx(measure(inside, outside))}
    half = wrapped.FprAtRecall().compute(predictions=predictions, references=references, recall=0.5)
    assert half["fpr_at_recall"] == metrics.fpr_at_recall(inside, outside, 0.5)
    assert wrapped.IdAccuracy().compute(predictions=[1, 2], references=[1, 0]) == {"id_accuracy": 0.5}
    with pytest.raises(ValueError, match="references hold 2"):
        wrapped.Auroc().compute(predictions=[0.5, 0.1], references=[2, 0])
