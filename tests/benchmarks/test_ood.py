# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The OOD study's benchmark runs from end to end on a tiny random model, and its files hold what is stored."""

from __future__ import annotations

import json
import shutil
import sys

import pytest


pytest.importorskip("torch")

from benchmarks import ood  # noqa: E402
from benchmarks.core.run import RESULTS  # noqa: E402
from benchmarks.core.runner import open_runs  # noqa: E402
from benchmarks.ood_baselines import TITLES  # noqa: E402
from peft_ext.ood.study.grid import DETECTORS  # noqa: E402
from peft_ext.ood.study.methods import METHODS  # noqa: E402
from tests.ood.conftest import LABELS, write_corpus  # noqa: E402


def test_smoke(smoke, tmp_path):
    found = smoke("ood")
    for method in METHODS.values():
        assert f"| {method.title} |" in found.shown
    assert len(found.results) == len(METHODS)
    report = (tmp_path / "ood" / "minilm.work" / "report.md").read_text()
    assert f"{len(METHODS)} of {len(METHODS)} cells are finished" in report


def test_a_study_goes_on_from_its_rows_alone(smoke, tmp_path):
    smoke("ood")
    (run,) = open_runs("ood", ["minilm"], "smoke", tmp_path)
    rows = list(run.rows)
    work = tmp_path / "ood" / "minilm.work"
    shutil.rmtree(work / "cells"), (work / "manifest.jsonl").unlink()
    run.rows = rows[:-1]
    ood.measure(run)
    manifest = [json.loads(line) for line in (work / "manifest.jsonl").read_text().splitlines()]
    assert [event["job"] for event in manifest if event["status"] == "started"] == [rows[-1]["key"]["cell"]]
    assert {row["key"]["cell"] for row in run.rows} == {row["key"]["cell"] for row in rows}


def test_the_studies():
    runs = {run.experiment: run for run in open_runs("ood")}
    for run in runs.values():
        cells = ood.study_of(run, RESULTS).cells()
        assert len({cell.id for cell in cells}) == len(cells)
        assert len(ood.cells_of(run)) == len(run.rows), "a stored cell is in no grid of the study's file"
    first = [cell for cell in ood.study_of(runs["minilm"], RESULTS).cells() if cell.seed == 42][:18]
    assert {cell.method for cell in first} == set(METHODS)
    assert [cell.id for cell in first] == [cell.id for cell in ood.study_of(runs["minilm"], RESULTS).cells()[:18]]
    assert {cell.model.layers for cell in ood.study_of(runs["smollm2"], RESULTS).cells()} == {10, 20, 30}


def test_cells_that_chose_learning_rates_are_in_no_mean():
    runs = open_runs("ood")
    shown = ood.tables(runs)
    studies = ood.tables([run for run in runs if run.experiment in ("minilm", "smollm2")])
    assert {name: shown[name] for name in studies} == studies
    assert set(shown) - set(studies) - {"recommended"} == {"minilm_rates", "smollm2_rates"}
    assert "| LoRA | 0.006: " in shown["minilm_rates"], "the rate that minilm's study takes isn't the best one"


def test_baselines(smoke):
    found = smoke("ood_baselines")
    assert all(f"| {title} | " in found.shown for title in TITLES.values())
    assert all(result["id_accuracy"] > 0.9 and result["auroc"] > 0.5 for result in found.results)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux")
def test_detectors(smoke):
    found = smoke("ood_detectors")
    measured = set(DETECTORS) - {"mahalanobis_cosine"}  # costs what Mahalanobis does
    assert all(f"| {name} |" in found.shown for name in measured) and "met" in found.shown


def test_a_classifier_that_refuses(smoke, tmp_path, monkeypatch):
    write_corpus(tmp_path / "clinc150", LABELS, outside=True)
    monkeypatch.setenv("PEFT_EXT_DATA", str(tmp_path))
    found = smoke("open_set")
    assert found.shown.count("| TF-IDF, msp | per-class") == 2
    assert all(0 <= result["right"] <= 1 for result in found.results)
