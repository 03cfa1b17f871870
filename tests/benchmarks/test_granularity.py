# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks of GA-Attention and of paraphrases run from end to end, and go on where they were stopped."""

from __future__ import annotations

import json

import pytest


pytest.importorskip("nltk"), pytest.importorskip("matplotlib")

from benchmarks import ga_attention, paraphrase  # noqa: E402


def test_ga_attention(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ga_attention, "LENGTHS", (20, 32))
    output = tmp_path / "ga.json"
    ga_attention.main(["--smoke", "--output", str(output)])
    shown = capsys.readouterr().out
    assert "32 tokens, batch 2: R*S" in shown and "training step over the Transformer's" in shown
    rows = {row["settings"]["part"]: row["result"] for row in json.loads(output.read_text())["rows"]}
    # a bias and what its gradient takes, beside the projections
    assert rows[20]["peak"]["R*S"] < 1.5 * rows[20]["peak"][ga_attention.PLAIN]
    before = output.read_text()
    ga_attention.main(["--smoke", "--output", str(output)])
    assert output.read_text() == before, "finished rows were measured again"


def test_paraphrase(tmp_path, capsys):
    for name in (*paraphrase.SETS.values(), *paraphrase.TEST.values()):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        pairs = [{"source": f"how do i {i} it", "target": f"what is the way to {i} it"} for i in range(24)]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    output = tmp_path / "paraphrase.json"
    arguments = ["--smoke", "--data-dir", str(tmp_path), "--output", str(output), "--work_dir", str(tmp_path / "work")]
    arguments += ["--modes", "Transformer", "R*S", "--seeds", "0"]
    paraphrase.main(arguments)
    shown = capsys.readouterr().out
    for text in ("| quora | BLEU-2 |", "| C-DNPG (R*S) |", "twitter: iBLEU of C-DNPG (R*S) above the Transformer"):
        assert text in shown
    assert output.with_suffix(".png").stat().st_size > 5000
    before = output.read_text()
    paraphrase.main(arguments)
    assert output.read_text() == before, "finished rows were measured again"


def test_splits_have_no_pair_in_common(tmp_path):
    pairs = [{"source": f"a {i}", "target": f"b {i}"} for i in range(60)]
    path = tmp_path / paraphrase.SETS["twitter"]
    path.parent.mkdir()
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    class Study(paraphrase.Study):
        def __init__(self):
            self.args = type("Args", (), {"data_dir": tmp_path, "seed": 0})
            self.budget = paraphrase.Budget(validation=7, test=9)

    parts = Study().pairs("twitter")
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 44, "validation": 7, "test": 9}
    assert len({row["source"] for rows in parts.values() for row in rows}) == 60
