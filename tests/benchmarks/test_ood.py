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
from benchmarks.ood_tables import recommended_table  # noqa: E402
from peft_ext.ood.study.grid import DETECTORS  # noqa: E402
from peft_ext.ood.study.methods import METHODS  # noqa: E402
from peft_ext.ood.study.results import CellResult  # noqa: E402
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


def test_what_is_recommended_stands_beside_the_study():
    """Cells without a contrastive term are the study's own way, which takes the study's cells as well."""
    (run,) = open_runs("ood", ["recommended"])
    study = list(ood.study_of(next(iter(open_runs("ood", ["minilm"]))), RESULTS).cells())

    def made(cells, value):
        detectors = {
            name: {"auroc": value, "fpr95": 0.1} for name in ("msp", "mahalanobis", "mahalanobis_cosine_layers")
        }
        return [CellResult(cell, {"id_accuracy": 0.9, "detectors": detectors}) for cell in cells]

    cells = ood.study_of(run, RESULTS).cells()
    assert {cell.setting.name for cell in cells} >= {"clinc150_quarter", "banking77_quarter", "clinc150_oos_all"}
    shown = recommended_table(made(study, 0.5), made(cells, 0.75)).splitlines()
    lines = {line.split(" | ")[0].strip("| "): line for line in shown}
    plain = lines["LoRA as in the study: Mahalanobis"].split(" | ")
    assert plain[1].startswith("50.0 ± 0.0 / 10 (90.0; 3)") and "75.0" in "".join(plain)
    assert "| 75.0 ± 0.0 / 10 (90.0; 3)" in lines["LoRA, contrastive: Mahalanobis cosine, two layers"]
    assert "MiniLM as it is: Mahalanobis" in lines and "LoRA, contrastive: Mahalanobis cosine" not in lines


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
