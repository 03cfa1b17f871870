# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The OOD study's benchmark runs from end to end on a tiny random model, and its own file is one that can be read."""

from __future__ import annotations

import sys

import pytest


pytest.importorskip("torch")

from benchmarks import ood, ood_detectors  # noqa: E402
from peft_ext.ood.study.grid import DETECTORS, read_config  # noqa: E402
from peft_ext.ood.study.methods import METHODS  # noqa: E402


def test_smoke(tmp_path, capsys):
    ood.main(["--smoke", "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert f"{len(METHODS)} of {len(METHODS)} cells are finished" in shown
    for method in METHODS.values():
        assert f"| tiny | {method.title} |" in shown
    assert "not measured" not in shown and "validation accuracy, LoRA, CLINC150" in shown
    before = (tmp_path / "manifest.jsonl").read_text()
    report = tmp_path / "docs" / "report.md"
    report.parent.mkdir()
    ood.main(["--smoke", "--output", str(tmp_path), "--report", str(report)])
    assert "](../plots/roc_" in (text := report.read_text()) and text.replace("](../", "](") == shown
    assert (tmp_path / "manifest.jsonl").read_text() == before, "finished cells were run again"
    assert capsys.readouterr().out == shown


def test_the_file():
    config = read_config(ood.CONFIG)
    cells = config.cells()
    assert len({cell.id for cell in cells}) == len(cells)
    first = [cell for cell in cells if cell.seed == 42][:18]
    assert {cell.method for cell in first} == set(METHODS)
    assert [cell.id for cell in first] == [cell.id for cell in cells[:18]], "the first table doesn't come first"
    assert {cell.model.layers for cell in cells if "SmolLM2" in cell.model.name} == {10, 20, 30}


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux")
def test_detectors(tmp_path, capsys):
    command = ["--smoke", "--output", str(tmp_path / "found.json")]
    ood_detectors.main(command)
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in DETECTORS) and "met" in shown
    ood_detectors.main(command)
    assert capsys.readouterr().out == shown, "finished rows were measured again"
