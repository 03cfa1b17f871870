# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`OpenSetClassifier` on CLINC150 and its out-of-scope texts: one threshold or one for each intent, with and without
examples from outside, on MiniLM's frozen states and on TF-IDF.

Thresholds are chosen on out-of-fold training texts, and on the validation texts from outside where a row says so; test
texts judge. Nothing but the head is trained.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, data_folder, log
from benchmarks.core.task import Runs, Task, tables_of_each
from benchmarks.sentence_encoder import encoder_path
from peft_ext.ood import OpenSetClassifier, TextFeatures
from peft_ext.rows import read_rows


OUTSIDE = "oos"
MINILM, TFIDF = "MiniLM", "TF-IDF"
WORST = 0.1  # of the intents, by how many of their texts are accepted


def measure(run: Run) -> None:
    """A row for each way."""
    data: dict[str, Any] = {}
    for key in run.ways:
        if run.find(key) is None:
            data = data or _data(run)
            run.add(key, judged(key, data))
            log(f"measured: {key}")


def judged(key: dict[str, Any], data: dict[str, Any]) -> dict[str, float]:
    """Fit one way and judge it on the test texts."""
    encoded = data[key["encoder"]]
    X, y = encoded["train"], np.asarray(data["train"])
    if key["outside"]:
        X = [*X, *encoded["validation"]] if isinstance(X, list) else np.concatenate([X, encoded["validation"]])
        y = np.append(y, [OUTSIDE] * len(encoded["validation"]))
    encoder = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True) if key["encoder"] == TFIDF else None
    model = OpenSetClassifier(encoder, detector=key["detector"], thresholds=key["thresholds"], unknown=OUTSIDE).fit(
        X, y
    )
    answers, truth = model.predict(encoded["test"]), np.asarray(data["test"])
    inside = truth != OUTSIDE
    accepted = answers != OUTSIDE
    recalls = np.array([accepted[truth == name].mean() for name in np.unique(truth[inside])])
    return {
        "accepted": float(accepted[inside].mean()),
        "worst": float(np.sort(recalls)[: max(1, round(WORST * len(recalls)))].mean()),
        "outside_accepted": float(accepted[~inside].mean()),
        "right_inside": float((answers == truth)[inside].mean()),
        "right": float(((answers == truth)[inside].mean() + (answers == truth)[~inside].mean()) / 2),
    }


def tables(run: Run) -> dict[str, str]:
    """Each way and what it answers."""
    lines = []
    for key in run.ways:
        result = run.find(key)
        if result is not None:
            shown = [
                f"{100 * result[name]:.1f}"
                for name in ("accepted", "worst", "outside_accepted", "right_inside", "right")
            ]
            known = "with examples from outside" if key["outside"] else "95 % recall"
            lines.append([f"{key['encoder']}, {key['detector']}", f"{key['thresholds']}, {known}", *shown])
    headers = [
        "Encoder, detector",
        "threshold",
        "of the intents' texts accepted, %",
        "of the worst tenth of intents",
        "outside texts accepted, %",
        "right among the intents' texts, %",
        "right of half and half, %",
    ]
    return {"thresholds": markdown_table(headers, lines)}


def _found(runs: Runs, **wanted: Any) -> dict[str, float]:
    for run in runs:
        for key in run.ways:
            if all(key[name] == value for name, value in wanted.items()):
                return run.find(key) or {}
    return {}


def claims(runs: Runs) -> list[Claim]:
    """What the thresholds are for."""
    plain = {"encoder": MINILM, "detector": "mahalanobis_cosine", "outside": False}
    common, own = (_found(runs, **plain, thresholds=kind) for kind in ("common", "per-class"))
    told = _found(runs, **{**plain, "outside": True}, thresholds="common")
    gain = 100 * (own["worst"] - common["worst"]) if own and common else None
    better = 100 * (told["right"] - common["right"]) if told and common else None
    missed = 100 * abs(own["accepted"] - 0.95) if own else None
    return [
        Claim("points that thresholds per intent gain the worst tenth of intents", gain, 0.0, at_least=True),
        Claim("points between recall asked for and had, per intent", missed, 2.0),
        Claim("points more right answers with examples from outside", better, 0.0, at_least=True),
    ]


def headlines(runs: Runs) -> list[Headline]:
    """The default, and what examples from outside add."""
    plain = {"encoder": MINILM, "detector": "mahalanobis_cosine", "thresholds": "common"}
    alone, told = (_found(runs, **plain, outside=known) for known in (False, True))
    if not alone or not told:
        return []
    shown = f"{100 * alone['right']:.1f} %; with 100 examples from outside {100 * told['right']:.1f} %"
    wanted = unless(told["right"] >= alone["right"], "more with examples")
    what = "Right answers, half intents and half out-of-scope texts (CLINC150), frozen MiniLM"
    return [Headline("Reading", what, shown, wanted, "../benchmarks/ood_study.md#a-classifier-that-refuses")]


def _data(run: Run) -> dict[str, Any]:
    folder = data_folder("clinc150")
    rows = {split: read_rows(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    counts: dict[str, int] = {}
    train = []
    for row in rows["train"]:
        counts[row["label"]] = counts.get(row["label"], 0) + 1
        if row["label"] != OUTSIDE and counts[row["label"]] <= run.texts_a_class:
            train.append(row)
    texts = {
        "train": [row["text"] for row in train],
        "validation": [row["text"] for row in rows["validation"] if row["label"] == OUTSIDE],
        "test": [row["text"] for row in rows["test"]],
    }
    data: dict[str, Any] = {"train": [row["label"] for row in train], "test": [row["label"] for row in rows["test"]]}
    data[TFIDF] = texts
    if any(key["encoder"] == MINILM for key in run.ways):
        encoder = TextFeatures(encoder_path())
        data[MINILM] = {split: encoder.transform(each) for split, each in texts.items()}
    return data


TASK = Task(measure, tables_of_each(tables), claims, headlines)
