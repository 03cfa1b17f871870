# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Thresholds for all classes and for each, by recall and by right answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ext.ood import best_threshold, choose_thresholds, threshold_for_recall
from peft_ext.ood.thresholds import PRIOR_EXAMPLES, Scored


NUMBERS = st.lists(st.integers(0, 8), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(inside=NUMBERS, outside=NUMBERS, data=st.data(), share=st.sampled_from([0.1, 0.5, 0.9]))
def test_no_threshold_is_right_more_often(inside, outside, data, share):
    """Against every threshold that can make a difference."""
    inside, outside = np.array(inside, dtype=float), np.array(outside, dtype=float)
    right = np.array(data.draw(st.lists(st.booleans(), min_size=len(inside), max_size=len(inside))))

    def gain(threshold):
        return (1 - share) * (right & (inside >= threshold)).mean() + share * (outside < threshold).mean()

    found = best_threshold(inside, outside, right=right, outside_share=share)
    assert gain(found) == pytest.approx(max(gain(each) for each in np.arange(-0.5, 9.5, 0.5)))


def test_lies_in_the_middle_of_a_gap():
    assert best_threshold([4.0, 5.0], [0.0, 1.0]) == 2.5
    close = np.nextafter(1.0, 2.0)  # nothing lies between the two
    assert best_threshold([close], [1.0]) == close


def test_one_for_all_is_the_quantile():
    scores = np.arange(20.0)
    chosen = choose_thresholds(Scored(scores, np.zeros(20, dtype=int)), 2, id_recall=0.95)
    assert chosen.common == threshold_for_recall(scores, 0.95) == 1 and not chosen.offsets.any()


def test_a_class_whose_texts_score_lower_is_not_refused_more_often():
    """Two classes of one spread, one 10 below the other: one threshold refuses the lower one alone."""
    generator = np.random.default_rng(0)
    classes = np.repeat([0, 1], 500)
    scores = generator.normal(size=1000) - 10 * classes
    fresh = generator.normal(size=1000) - 10 * classes
    common = choose_thresholds(Scored(scores, classes), 3)
    own = choose_thresholds(Scored(scores, classes), 3, kind="per-class")
    assert [(fresh >= common.of(classes))[classes == c].mean() for c in (0, 1)] == pytest.approx([1, 0.88], abs=0.04)
    assert [(fresh >= own.of(classes))[classes == c].mean() for c in (0, 1)] == pytest.approx([0.95, 0.95], abs=0.04)
    mean = 500 * (scores[classes == 1].mean() - scores.mean()) / (500 + PRIOR_EXAMPLES)  # drawn towards all classes'
    assert own.offsets[1] == pytest.approx(mean) and own.offsets[2] == 0  # a class that was never given


def test_recall_on_new_texts_is_what_was_asked_for():
    """With 5 examples of each of 60 classes; each class's own quantile accepts far less."""
    generator = np.random.default_rng(0)
    middles, classes = 2 * generator.normal(size=60), np.repeat(np.arange(60), 5)
    fresh_classes = np.repeat(np.arange(60), 200)
    kept, naive = [], []
    for _ in range(5):
        scores = middles[classes] + generator.normal(size=300)
        fresh = middles[fresh_classes] + generator.normal(size=12000)
        chosen = choose_thresholds(Scored(scores, classes), 60, kind="per-class", id_recall=0.9)
        kept.append((fresh >= chosen.of(fresh_classes)).mean())
        quantiles = np.array([threshold_for_recall(scores[classes == c], 0.9) for c in range(60)])
        naive.append((fresh >= quantiles[fresh_classes]).mean())
    assert np.mean(kept) == pytest.approx(0.9, abs=0.015) and np.mean(naive) < 0.87


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"id_scores": [1.0], "ood_scores": []}, r"ood_scores has shape \(0,\)"),
        ({"id_scores": [np.nan], "ood_scores": [1.0]}, "id_scores"),
        ({"id_scores": [1.0], "ood_scores": [1.0], "outside_share": 0}, "outside_share=0"),
        ({"id_scores": [1.0], "ood_scores": [1.0], "right": [True, False]}, r"right has shape \(2,\)"),
    ],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        best_threshold(**arguments)
