# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of ALMoST runs from end to end on a tiny random model, and goes on where it was stopped."""

from __future__ import annotations

import pytest


pytest.importorskip("trl")

from benchmarks.almost_ablations import FILTERS, GENERATORS  # noqa: E402
from benchmarks.almost_speed import SPEED_STAGES  # noqa: E402


def test_almost(smoke):
    found = smoke("almost")
    assert "not measured" not in found.shown
    for name in (*FILTERS, *GENERATORS, *SPEED_STAGES, "queries: accepted", "comparisons: pairs"):
        assert f"| {name} |" in found.shown, name
    for seed in (0, 1):
        assert f"| RLSF, over SFT (seed {seed}) |" in found.shown
    assert "| RLSF without the penalty of repetitions, over SFT (seed 0) |" in found.shown
    assert "| rlsf (seed 0) |" in found.shown and "| reward_model_2 (seed 1) |" in found.shown
    assert len(found.results) == 7 + len(FILTERS) + len(GENERATORS) + len(SPEED_STAGES)
    (filters,) = (row["result"] for row in found.rows["smollm2"] if row["key"]["name"] == "none")
    assert filters["pairs"] > 0 and 0 <= filters["heldout"]["value"] <= 1
