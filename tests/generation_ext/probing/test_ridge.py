# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Ridge regressions: left out is what leaving out gives, and a mean of them is one."""

from __future__ import annotations

import numpy as np
import pytest

from generation_ext.probing import choice
from generation_ext.probing.ridge import FACTORS, PENALTIES, Ridges, log_probability


sklearn = pytest.importorskip("sklearn.linear_model", reason="the naive regression is scikit-learn's")


def _naive(features, targets, penalty):
    level = penalty * (features.astype(np.float64) ** 2).sum() / len(features)
    return sklearn.Ridge(level).fit(features.astype(np.float64), targets)


@pytest.mark.parametrize("size", [5, 200])
@pytest.mark.parametrize("forms", [1, 3])
def test_left_out_is_what_leaving_out_gives(size, forms):
    """A text in all its forms."""
    rng, texts = np.random.default_rng(0), 24
    codes = np.arange(texts) % 3
    own = rng.normal(size=(texts, size))
    features = choice.standardised(np.concatenate([own + 0.1 * rng.normal(size=own.shape) for _ in range(forms)]))
    found, targets = Ridges(features, codes, 3, forms).left_out(), np.eye(3)[np.tile(codes, forms)]
    for number, penalty in list(enumerate(PENALTIES))[3:]:
        level = penalty * (features.astype(np.float64) ** 2).sum() / len(features)
        for left in (0, 7, 20):
            rest = np.arange(len(features)) % texts != left
            naive = sklearn.Ridge(level).fit(features[rest].astype(np.float64), targets[rest])
            # the mean of all features and targets, and not of the others', is the constant of ours but for their own share
            np.testing.assert_allclose(found[number, left], naive.predict(features[left : left + 1])[0], atol=0.03)


def test_a_prediction_that_is_its_own_target_says_nothing():
    """With next to no penalty, as many directions as texts."""
    rng, codes = np.random.default_rng(0), np.arange(12) % 2
    ridges = Ridges(choice.standardised(rng.normal(size=(12, 500))), codes, 2, penalties=(1e-9,))
    assert log_probability(8 * ridges.left_out()[0], codes) < -0.6


@pytest.mark.parametrize("size", [5, 200])
def test_solutions_are_scikit_learns(size):
    rng, codes = np.random.default_rng(1), np.arange(30) % 3
    features = choice.standardised(rng.normal(size=(30, size)))
    for number, penalty in enumerate(PENALTIES):
        weight, bias = Ridges(features, codes, 3).solution(np.eye(len(PENALTIES))[number])
        naive = _naive(features, np.eye(3)[codes], penalty)
        np.testing.assert_allclose(features @ weight.T + bias, naive.predict(features), atol=1e-4)


def test_of_many_texts_the_likeliest_counts_alone_and_of_few_all():
    rng = np.random.default_rng(2)
    codes = np.arange(600) % 2
    features = rng.normal(size=(600, 20)) + 0.7 * codes[:, None]
    ridges = Ridges(choice.standardised(features), codes, 2)
    scores = ridges.left_out()
    every = {(p, f): log_probability(f * scores[p], codes) for p in range(len(PENALTIES)) for f in FACTORS}
    found = ridges.weighted()
    assert found.log_probability == pytest.approx(max(every.values())) and found.share == 0
    best, factor = max(every, key=every.get)
    weight, _ = ridges.solution(factor * np.eye(len(PENALTIES))[best])
    cosine = (weight * found.weight).sum() / np.linalg.norm(weight) / np.linalg.norm(found.weight)
    assert cosine > 0.99


def test_texts_whose_class_stands_before_them_do_not_weight():
    """Known scores that are right for these texts alone."""
    rng, codes = np.random.default_rng(4), np.arange(12) % 2
    ridges = Ridges(choice.standardised(rng.normal(size=(12, 50))), codes, 2)
    known = rng.normal(size=(12, 2))
    known[:4] = 6.0 * np.eye(2)[codes[:4]]
    known[4:] = -2.0 * np.eye(2)[codes[4:]]
    assert ridges.weighted(known).share > ridges.weighted(known, silent=range(4)).share
    assert ridges.weighted(known, silent=range(4)).share < 0.05
    # where nothing would be left of a class, all of them count
    assert ridges.weighted(known, silent=range(0, 12, 2)).share == ridges.weighted(known).share


def test_known_scores_are_added_in_the_share_they_deserve():
    rng, codes = np.random.default_rng(3), np.arange(16) % 2
    features = choice.standardised(rng.normal(size=(16, 50)))
    right = 2.0 * np.eye(2)[codes]
    ridges = Ridges(features, codes, 2)
    shares = [ridges.weighted(known).share for known in (right, rng.normal(size=(16, 2)), -right)]
    assert shares[0] > 1 and shares[0] > shares[1] > shares[2] and shares[2] < 0.05
