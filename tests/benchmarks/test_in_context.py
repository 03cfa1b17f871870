# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks of in-context methods run from end to end on tiny random models, and go on where they were stopped."""

from __future__ import annotations

import json
import sys

import pytest


pytest.importorskip("torch")

from benchmarks import in_context, scoring, sgicl, sgicl_recommended  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.core import experiments  # noqa: E402
from benchmarks.core.run import Run  # noqa: E402


def test_scoring(smoke):
    found = smoke("scoring")
    for name in ("sst2", "sst5", "ag_news"):
        title = in_context.TITLES[name]
        assert f"| {title}: {scoring.OURS} |" in found.shown and f"| {title}: {scoring.NAIVE} |" in found.shown
        assert f"{name}: over the naive loop" in found.shown
        (result,) = (row["result"] for row in found.rows["smollm2"] if row["key"] == {"set": name})
        assert 0 < result["differences"][scoring.OURS] < 1e-4


def test_scoring_says_why_the_harness_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    settings = {**experiments.settings("scoring", "smollm2", "smoke"), "sets": ["sst2"], "memory_limits": []}
    run = Run("scoring", "smollm2", settings, "smoke", tmp_path)
    scoring.measure(run)
    assert "not possible here: " in scoring.tables(run)["speed"]
    claims = {claim.name: claim.value for claim in scoring.claims(run)}
    assert claims["sst2: over lm-evaluation-harness at its best"] is None and claims["sst2: over the naive loop"] > 0


def test_sgicl(smoke, tmp_path):
    found = smoke("sgicl")
    for row in (*sgicl.main_rows([8, 1]), *sgicl.development_rows()):
        assert f"| {row.title} |" in found.shown
    assert "not measured" not in found.shown and "worth, on the averages" in found.shown
    for line in sgicl_recommended.LINES:
        assert f"| {line.title} |" in found.shown
    assert "its share of the gain of 8 gold demonstrations, all calibrated" in found.shown
    files = {path.name for path in (tmp_path / "sgicl").glob("*.work/*.jsonl")}
    assert "sst2-input-13-4.jsonl" in files and "cb-class-13-4.jsonl" in files


def test_sgicl_goes_on_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(sgicl, "rows_of", lambda run: [sgicl.Row(sgicl.SG_ICL, 8, calibrate=True)])
    settings = {**experiments.settings("sgicl", "development", "smoke"), "sets": ["sst2"], "seeds": [13, 21]}
    run = Run("sgicl", "development", settings, "smoke", tmp_path)
    sgicl.measure(run)
    results = [(row["key"], row["result"]["accuracy"]) for row in run.rows]
    pools = run.work / "sst2-input-13-4.jsonl"
    lines = pools.read_text()
    # as a kill before the second row leaves it
    run.rows = run.rows[:1]
    run.write()
    pools.write_text(lines[: len(lines) // 2])
    run = Run("sgicl", "development", settings, "smoke", tmp_path)
    sgicl.measure(run)
    assert [(row["key"], row["result"]["accuracy"]) for row in run.rows] == results
    assert sorted(pools.read_text().splitlines()) == sorted(lines.splitlines())


@pytest.mark.parametrize("task", ["scoring", "palp", "paraphrase", "ood"])
def test_without_data(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEFT_EXT_DATA", str(tmp_path))
    monkeypatch.setattr("benchmarks.sentence_encoder.SentenceEncoder", None)
    assert main([task, "--quick", "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"PEFT_EXT_DATA={str(tmp_path)!r} has no folder " in said and "Traceback" not in said


def test_sgicl_says_that_it_has_no_quick_size(tmp_path, capsys):
    assert main(["sgicl", "--quick", "--output_dir", str(tmp_path / "out")]) == 2
    assert "sgicl has no experiment of quick size" in capsys.readouterr().err


def test_worth():
    curve = [50.0, 60.0, 58.0, 70.0, 80.0]
    assert sgicl.worth(curve, 55.0) == 0.5 / 4
    assert sgicl.worth(curve, 64.0) == 2.5 / 4
    assert sgicl.worth(curve, 80.0) == 1.0 and sgicl.worth(curve, 90.0) == 1.0
    assert sgicl.worth(curve, 40.0) == 0.0 == sgicl.worth(curve, 50.0)
    assert sgicl.worth([50.0, None, 70.0, None, 80.0], 65.0) == 1.5 / 4  # a line through what is measured


def recommended_run(tmp_path, right, seeds=(13, 21)):
    """As measured, of `right[method]`: a text of marks for each seed, the same with and without calibration."""
    settings = {"sets": ["sst2"], "seeds": list(seeds)}
    run = Run("sgicl", "recommended", settings, "smoke", tmp_path)
    for method, marks in right.items():
        for seed, each in zip(sgicl_recommended.seeds_of(method, seeds), marks):
            key = sgicl_recommended.key_of(method, "sst2", seed)
            run.add(key, {"right": each, "right_calibrated": each})
    return run


def test_recommended_sgicl_against_gold(tmp_path):
    zero, gold, two, own = sgicl_recommended.METHODS
    ours = ["1101", "0111"]
    run = recommended_run(tmp_path, {zero: ["1100"], gold: ["1111", "1100"], two: ours, own: ours})
    values = {claim.name: claim.value for claim in sgicl_recommended.claims(run)}
    assert values["recommended SG-ICL over zero-shot"] == 25.0
    assert values["its share of the gain of 8 gold demonstrations"] == 1.0
    assert values["its deviation over that of 8 gold demonstrations"] == -25.0
    line = sgicl_recommended.Line(own, sgicl_recommended.CALIBRATED)
    low, high = sgicl_recommended.interval(run, line, sgicl_recommended.Line(zero, sgicl_recommended.CALIBRATED))
    assert low < 25 < high
    less = recommended_run(
        tmp_path / "less", {zero: ["1100"], gold: ["1110", "1110"], two: ours, own: ["1000", "1000"]}
    )
    assert sgicl_recommended.worth(less, sgicl_recommended.PLAIN) == -1.0


def test_development_examples_are_no_demonstrations(tmp_path, monkeypatch):
    for name, splits in (("cb", ("train", "validation")), ("sst2", ("train", "validation", "test"))):
        (tmp_path / name).mkdir()
        for split in splits:
            rows = [
                {"text": f"{split} {i}", "text_a": "a", "text_b": f"{split} {i}", "label": "neutral"}
                for i in range(30)
            ]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("PEFT_EXT_DATA", str(tmp_path))
    icl = sgicl.InContext.__new__(sgicl.InContext)
    icl.run = Run("sgicl", "main", {"seed": 0, "development_inputs": 10}, folder=tmp_path)
    pair, single = icl._data("cb"), icl._data("sst2")
    assert len(pair["train"]) == 20 and len(pair[sgicl.DEVELOPMENT]) == 10
    used = {example.fields["hypothesis"] for part in pair.values() for example in part}
    assert len(used) == 60 and all(e.fields["hypothesis"].startswith("validation") for e in pair[sgicl.MAIN])
    assert all(example.fields["text"].startswith("test") for example in single[sgicl.MAIN])
    assert all(example.fields["text"].startswith("validation") for example in single[sgicl.DEVELOPMENT])


def test_accuracy():
    examples = [in_context.Example({}, "a"), in_context.Example({}, "b")]
    assert in_context.accuracy(["a", "a"], examples) == 50.0
