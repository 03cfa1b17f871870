# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Intervals and win rates, against formulas and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from trl_ext.almost.evaluation.statistics import accuracy, length_controlled, win_rate, with_interval


def test_the_interval_of_a_share_is_the_normal_one():
    hits = [1.0] * 120 + [0.0] * 80
    found = with_interval(hits)
    half = 1.96 * (0.6 * 0.4 / 200) ** 0.5
    assert found["value"] == pytest.approx(0.6) and found["n"] == 200
    assert found["interval"] == pytest.approx([0.6 - half, 0.6 + half], abs=0.01)
    assert with_interval(hits) == found, "the seed decides"
    assert with_interval(hits, seed=1)["interval"] != found["interval"]


def test_groups_have_their_own_intervals():
    found = accuracy([1, 0, 1, 1], ["a", "a", "b", "b"])
    assert found["value"] == 0.75
    assert found["groups"]["a"]["value"] == 0.5 and found["groups"]["b"]["interval"] == [1.0, 1.0]
    with pytest.raises(ValueError, match="empty"):
        accuracy([])


def rows_of(theta: float, phi: float, bias: float, count: int = 400, seed: int = 0) -> np.ndarray:
    """Wins that depend on theta and on length; answers are `bias` longer on average."""
    generator = np.random.default_rng(seed)
    lengths = generator.normal(bias, 100, count)
    probability = 1 / (1 + np.exp(-(theta + phi * np.tanh(lengths / lengths.std()))))
    return np.stack([(generator.random(count) < probability).astype(float), lengths], axis=1)


def test_length_control_is_the_logistic_regression_of_scikit_learn():
    rows = rows_of(0.4, 2.0, 60)
    rows[::7, 0] = 0.5  # ties: half a win and half a loss
    length = np.tanh(rows[:, 1] / rows[:, 1].std())[:, None]
    reference = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(
        np.concatenate([length, length]),
        np.repeat([1, 0], len(rows)),
        sample_weight=np.concatenate([rows[:, 0], 1 - rows[:, 0]]),
    )
    assert length_controlled(rows) == pytest.approx(1 / (1 + np.exp(-reference.intercept_[0])), abs=1e-5)


def test_a_win_by_length_alone_is_controlled_for():
    rows = rows_of(0.0, 3.0, 100, count=4000)
    assert rows[:, 0].mean() > 0.7
    assert length_controlled(rows) == pytest.approx(0.5, abs=0.04)


def test_equal_lengths_leave_the_win_rate_as_it_is():
    wins = [1, 1, 0.5, 0, 1, 0.75]
    found = win_rate(wins, [0] * 6)
    assert found["length_controlled"]["value"] == pytest.approx(np.mean(wins), abs=1e-6)
    assert found["win_rate"]["value"] == np.mean(wins)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_all_wins_and_all_losses_have_a_rate(outcome):
    found = win_rate([outcome] * 5, [3, -2, 0, 8, 1])
    assert found["length_controlled"]["value"] == outcome and found["win_rate"]["interval"] == [outcome, outcome]
