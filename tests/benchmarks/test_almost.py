# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of ALMoST runs from end to end on a tiny random model, and goes on where it was stopped."""

from __future__ import annotations

import json

import pytest


pytest.importorskip("trl")

from benchmarks import almost  # noqa: E402
from benchmarks.almost_ablations import FILTERS, GENERATORS  # noqa: E402
from benchmarks.almost_speed import SPEED_STAGES  # noqa: E402


def test_almost(tmp_path, capsys):
    output = tmp_path / "almost.json"
    flags = ["--smoke", "--output", str(output), "--threads", "1"]
    almost.main([*flags, "--parts", "run", "speed"])
    assert "RLSF over SFT: lower end of the difference: not measured" in capsys.readouterr().out
    almost.main(flags)
    shown = capsys.readouterr().out
    assert "not measured" not in shown
    for name in (*FILTERS, *GENERATORS, *SPEED_STAGES, "queries: accepted", "comparisons: pairs", "RLSF, over SFT"):
        assert f"| {name} |" in shown, name
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 3 + len(FILTERS) + len(GENERATORS) + len(SPEED_STAGES)
    (filters,) = (row["result"] for row in rows if row["settings"]["name"] == "none")
    assert filters["pairs"] > 0 and 0 <= filters["heldout"]["value"] <= 1
    before = output.read_text()
    almost.main(flags)
    assert output.read_text() == before, "finished rows were measured again"
    almost.main([*flags, "--table"])
    assert capsys.readouterr().out.endswith(shown)
