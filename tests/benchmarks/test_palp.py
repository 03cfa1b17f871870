# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PALP's benchmark runs from end to end on tiny random models and made-up data, and goes on where it was stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest


pytest.importorskip("sklearn", reason="PALPClassifier is an estimator of scikit-learn")

from benchmarks.palp_data import SETS, Remembering, Split  # noqa: E402


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """Two sets of made-up rows."""
    monkeypatch.setenv("PEFT_EXT_DATA", str(tmp_path / "data"))
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
        (tmp_path / "data" / name).mkdir(parents=True)
        for split in ("train", SETS[name].test):
            path = tmp_path / "data" / name / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in each))


def test_from_end_to_end(smoke, tmp_path):
    found = smoke("palp")
    for title in ("PALP-D, 16 a class", "In-context learning, 4 a class", "LoRA, full pool"):
        assert f"| {title} |" in found.shown
    for title in (
        "MiniLM, linear probing, full pool",
        "TF-IDF, logistic regression, 4 a class",
        "PALP-D, joined, 8 a class",
    ):
        assert f"| {title} |" in found.shown
    assert "not measured" not in found.shown
    chosen = [row for row in found.rows["accuracy"] if row["key"]["method"].endswith(", chosen")]
    assert chosen and all(row["result"]["pooling"] in ("last", "mean") for row in chosen)
    joined = [row for row in found.rows["accuracy"] if row["key"]["method"].endswith(", joined")]
    assert joined and all(row["key"]["head"] == "ridge" and row["result"]["blocks"] > 1 for row in joined)
    assert "demonstrations encoded once, over with every text" in found.shown
    assert "LoRA above PALP-D, full pool" in found.shown
    assert (tmp_path / "palp" / "accuracy.png").stat().st_size > 5000
    (timing,) = found.rows["prefix"]
    assert timing["result"]["difference"] < 0.05 and timing["result"]["texts"] == 24


def test_draws_have_the_wanted_shots():
    split = Split(SETS["cb"], pool=30, test=5)
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


def test_what_was_encoded_is_found_by_the_next_process(tmp_path):
    class Writing:
        def extract(self, texts, prefix="", output=None):
            features = np.array([[len(text)] for text in texts], dtype=np.float32)
            np.save(output, features)
            return features

    first = Remembering(Writing(), tmp_path)
    first.learn(["a", "bb", "a"])
    again = Remembering(None, tmp_path)
    assert again.extract(["bb", "a"]).ravel().tolist() == [2, 1] and again.seconds == first.seconds
    assert again.saved == sum(first.seconds.values())
