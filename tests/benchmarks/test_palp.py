# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PALP's benchmark runs from end to end on tiny random models and made-up data, and goes on where it was stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest


pytest.importorskip("sklearn", reason="PALPClassifier is an estimator of scikit-learn")

from benchmarks import palp  # noqa: E402
from benchmarks.palp_data import SETS, Remembering, Split  # noqa: E402
from tests.tiny.byte_models import model  # noqa: E402
from tests.tiny.tokenizers import tokenizer_for  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """Models, and two sets of made-up rows."""
    for name in ("llama", "bert"):
        model(name).save_pretrained(tmp_path / name)
        tokenizer_for(name).save_pretrained(tmp_path / name)
    rows = {
        "sst2": [
            {"text": f"{i} {'fun' if i % 2 else 'bore'}", "label": "positive" if i % 2 else "negative"}
            for i in range(40)
        ],
        "cb": [
            {"text_a": f"{i}", "text_b": "yes", "label": ("entailment", "contradiction", "neutral")[i % 3]}
            for i in range(30)
        ],
    }
    for name, each in rows.items():
        (tmp_path / name).mkdir()
        for split in ("train", SETS[name].test):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return tmp_path


def test_from_end_to_end(folder, capsys):
    output = folder / "palp.json"
    arguments = ["--smoke", "--model", str(folder / "llama"), "--encoder", str(folder / "bert"), "--seeds", "13"]
    arguments += ["--data-dir", str(folder), "--sets", "sst2", "cb", "--output", str(output), "--max-length", "300"]
    palp.main([*arguments, "--timing"])
    palp.main(arguments)
    shown = capsys.readouterr().out
    for title in ("PALP-D, 16 shots", "In-context learning, 4 shots", "LoRA, full", "MiniLM, linear probing, full"):
        assert f"| {title} |" in shown
    assert "demonstrations encoded once, over with every text" in shown and "LoRA above full PALP-D" in shown
    assert output.with_suffix(".png").stat().st_size > 5000
    before = output.read_text()
    palp.main([*arguments, "--table"])
    palp.main(arguments)
    assert output.read_text() == before, "finished rows were measured again"
    timing = next(row["result"] for row in json.loads(before)["rows"] if "timing" in row["settings"])
    assert timing["difference"] < 0.05 and timing["texts"] == 24


def test_draws_have_the_wanted_shots(folder):
    split = Split(SETS["cb"], folder, pool=30, test=5)
    drawn = split.draw(4, 13)
    assert sorted(split.pool[1][drawn].tolist()) == sorted(split.labels * 4)
    assert (split.draw(4, 13) == drawn).all() and (split.draw(4, 27) != drawn).any()
    assert len(split.draw(100, 13)) == 30 and len(split.test[0]) == 5
    assert set(split.pool[0][0]) == {"premise", "hypothesis"}


def test_texts_are_encoded_once():
    class Counting:
        calls = []

        def extract(self, texts, prefix=""):
            self.calls.append((list(texts), prefix))
            return np.array([[len(prefix + text)] for text in texts], dtype=float)

    remembering = Remembering(Counting())
    assert remembering.extract(["a", "bb", "a"]).ravel().tolist() == [1, 2, 1]
    assert remembering.extract(["bb", "ccc"]).ravel().tolist() == [2, 3]
    assert remembering.extract(["bb"], "x").ravel().tolist() == [3]
    assert Counting.calls == [(["a", "bb"], ""), (["ccc"], ""), (["bb"], "x")]


def test_missing_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass --data-dir"):
        Split(SETS["sst2"], tmp_path, 4, 4)
