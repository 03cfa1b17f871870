# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks of in-context methods run from end to end on tiny random models, and go on where they were stopped."""

from __future__ import annotations

import json

import pytest


pytest.importorskip("torch")

from benchmarks import common, in_context, scoring, sgicl  # noqa: E402


def _rows(path):
    return json.loads(path.read_text())["rows"]


def test_scoring(tmp_path, capsys):
    output = tmp_path / "scoring.json"
    arguments = ["--smoke", "--output", str(output), "--memory-limits", "50000000"]
    scoring.main(arguments)
    shown = capsys.readouterr().out
    for name in ("sst2", "sst5", "ag_news"):
        assert f"| {name} | {scoring.OURS} |" in shown and f"| {name} | {scoring.NAIVE} |" in shown
        assert f"{name}: over the naive loop" in shown
        (result,) = (r["result"] for r in _rows(output) if r["settings"]["task"] == name and "peak" not in r["result"])
        assert 0 < result["differences"][scoring.OURS] < 1e-4
    before = output.read_text()
    scoring.main(arguments)
    assert output.read_text() == before, "finished rows were measured again"
    assert capsys.readouterr().out == shown


def test_scoring_says_why_the_harness_is_missing(tmp_path, capsys):
    pytest.importorskip("peft_ext")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        scoring.main(["--smoke", "--output", str(tmp_path / "scoring.json"), "--tasks", "sst2", "--memory-limits"])
        shown = capsys.readouterr().out
        assert "not possible here: No module named 'lm_eval'" in shown
        assert "lm-evaluation-harness at its best: not measured" in shown
    else:
        pytest.skip("lm_eval is here")


def test_sgicl(tmp_path, capsys):
    output = tmp_path / "sgicl.json"
    sgicl.main(["--smoke", "--output", str(output)])
    shown = capsys.readouterr().out
    for row in (*sgicl.main_rows(), *sgicl.development_rows()):
        assert f"| {row.title} |" in shown
    assert "not measured" not in shown and "worth, on the averages" in shown
    before, files = output.read_text(), {path.name: path.read_text() for path in (tmp_path / "sgicl.work").iterdir()}
    assert "sst2-main-input-13-4.jsonl" in files and "cb-development-class-13-4.jsonl" in files
    sgicl.main(["--smoke", "--output", str(output)])
    assert output.read_text() == before, "finished rows were measured again"
    assert capsys.readouterr().out == shown


def test_sgicl_goes_on_after_a_kill(tmp_path):
    output = tmp_path / "sgicl.json"
    arguments = ["--smoke", "--output", str(output), "--rows", "SG-ICL, calibrated", "--tasks", "sst2"]
    sgicl.main(arguments)
    rows = _rows(output)
    common.write_json(output, {"rows": rows[:2]})  # as a kill before the third row leaves it
    pools = tmp_path / "sgicl.work" / "sst2-development-input-13-4.jsonl"
    lines = pools.read_text()
    pools.write_text(lines[: len(lines) // 2])
    sgicl.main(arguments)
    assert [(r["settings"], r["result"]["accuracy"]) for r in _rows(output)] == [
        (r["settings"], r["result"]["accuracy"]) for r in rows
    ]
    assert sorted(pools.read_text().splitlines()) == sorted(lines.splitlines())


@pytest.mark.parametrize("module", [scoring, sgicl])
def test_without_data(module, tmp_path, capsys):
    with pytest.raises(SystemExit):
        module.main(["--data-dir", str(tmp_path)])
    assert f"{tmp_path / 'sst2'}: no" in capsys.readouterr().err


def test_worth():
    curve = [50.0, 60.0, 58.0, 70.0, 80.0]
    assert sgicl.worth(curve, 55.0) == 0.5 / 4
    assert sgicl.worth(curve, 64.0) == 2.5 / 4
    assert sgicl.worth(curve, 80.0) == 1.0 and sgicl.worth(curve, 90.0) == 1.0
    assert sgicl.worth(curve, 40.0) == 0.0 == sgicl.worth(curve, 50.0)
    assert sgicl.worth([50.0, None, 70.0, None, 80.0], 65.0) == 1.5 / 4  # a line through what is measured


def test_development_examples_are_no_demonstrations(tmp_path):
    for name, splits in (("cb", ("train", "validation")), ("sst2", ("train", "validation", "test"))):
        (tmp_path / name).mkdir()
        for split in splits:
            rows = [
                {"text": f"{split} {i}", "text_a": "a", "text_b": f"{split} {i}", "label": "neutral"}
                for i in range(30)
            ]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args, budget = sgicl.parse(["--data-dir", str(tmp_path), "--tasks", "cb", "sst2", "--development-inputs", "10"])
    study = sgicl.Study.__new__(sgicl.Study)
    study.args, study.budget = args, budget
    pair, single = study._data("cb"), study._data("sst2")
    assert len(pair["train"]) == 20 and len(pair[sgicl.DEVELOPMENT]) == 10
    used = {example.fields["hypothesis"] for part in pair.values() for example in part}
    assert len(used) == 60 and all(e.fields["hypothesis"].startswith("validation") for e in pair[sgicl.MAIN])
    assert all(example.fields["text"].startswith("test") for example in single[sgicl.MAIN])
    assert all(example.fields["text"].startswith("validation") for example in single[sgicl.DEVELOPMENT])


def test_accuracy():
    examples = [in_context.Example({}, "a"), in_context.Example({}, "b")]
    assert in_context.accuracy(["a", "a"], examples) == 50.0
