# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import math

import pytest
import torch

from generation_ext.critic.diagnostics import (
    by_position,
    calibration_error,
    calibration_table,
    explained_variance,
    summary,
)


def test_explained_variance():
    outcomes = torch.tensor([0.0, 1.0, 0.5, 0.25])
    assert explained_variance(outcomes, outcomes) == pytest.approx(1.0)
    assert explained_variance(torch.full((4,), 0.9), outcomes) == pytest.approx(0.0)
    assert explained_variance(1 - outcomes, outcomes) == pytest.approx(-3.0)
    assert explained_variance(outcomes / 2, outcomes) == pytest.approx(0.75)
    assert math.isnan(explained_variance(torch.rand(4), torch.ones(4)))


def test_calibration():
    values = torch.tensor([0.05, 0.05, 0.95, 0.95, 1.0, 0.0])
    outcomes = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    rows = calibration_table(values, outcomes)
    assert [row["count"] for row in rows] == [3, 3]
    assert rows[0]["outcome"] == 0.0 and rows[1]["outcome"] == pytest.approx(2 / 3)
    low, high = 0.1 / 3, 2.9 / 3 - 2 / 3
    assert calibration_error(values, outcomes) == pytest.approx((low + high) / 2)
    assert calibration_error(outcomes, outcomes) == 0.0


def test_by_position_counts_the_texts_that_are_long_enough():
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    outcomes = torch.tensor([1.0, 0.0, 0.5])[:, None].expand(3, 3)
    values = torch.tensor([[0.5, 1.0, 0.7], [0.5, 0.0, 9.0], [0.5, 9.0, 9.0]])
    rows = by_position(values, outcomes, mask)
    assert [row["count"] for row in rows] == [3, 2, 1]
    assert rows[0]["explained_variance"] == pytest.approx(0.0)
    assert rows[1]["explained_variance"] == pytest.approx(1.0)
    assert math.isnan(rows[2]["explained_variance"])
    assert rows[1]["value"] == pytest.approx(0.5) and rows[2]["outcome"] == pytest.approx(1.0)


def test_summary_names_powers_of_two_and_leaves_out_what_cannot_be_had():
    mask = torch.ones(4, 6, dtype=torch.bool)
    outcomes = torch.rand(4)[:, None].expand(4, 6)
    figures = summary(torch.rand(4, 6), outcomes, mask)
    positions = [int(name.rsplit("_", 1)[1]) for name in figures if name.startswith("explained_variance_at")]
    assert positions == [0, 1, 2, 4]
    constant = summary(torch.rand(4, 6), torch.ones(4, 6), mask)
    assert "explained_variance" not in constant and "calibration_error" in constant
