# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What anybody would try first against texts from outside, on the study's own splits and with nothing tuned: TF-IDF or frozen
MiniLM under a logistic regression, and the nearest training text in frozen MiniLM's space.

Strengths of regularisation and the number of neighbours that vote are chosen by accuracy on in-distribution validation texts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.core.claims import markdown_table
from benchmarks.core.run import Run, data_folder, log
from benchmarks.core.task import Runs, Task
from benchmarks.fast_linear import fast_linear
from benchmarks.sentence_encoder import SentenceEncoder
from peft_ext.ood import metrics
from peft_ext.ood.study.data import Data, load_setting, make_setting


STRENGTHS = (1.0, 10.0, 100.0)
NEIGHBOURS = (1, 5, 10)
Encode = Callable[[Sequence[str]], Any]  # texts -> a matrix, sparse or not
# By name, what a table calls them.
TITLES = {
    "tfidf": "TF-IDF, logistic regression: MSP",
    "minilm_logistic": "frozen MiniLM, logistic regression: MSP",
    "minilm_neighbours": "frozen MiniLM, nearest neighbours: largest cosine",
}

SETS = {
    "clinc150_oos": "CLINC150, its own out-of-scope texts",
    "clinc150_near": "CLINC150, 40 intents against 110",
    "banking77_near": "Banking77, 19 intents against 58",
    "clinc150_quarter": "CLINC150, 110 intents against 40",
    "banking77_quarter": "Banking77, 58 intents against 19",
    "snips_leave_2_out": "SNIPS, 5 intents against 2",
    "clinc150_far": "CLINC150 against another corpus",
    "clinc150_oos_all": "its own out-of-scope texts, all training texts",
    "clinc150_near_all": "40 intents, all training texts",
}


def measure(run: Run) -> None:
    """A row for each set and baseline."""
    if run.smoke:
        data, folder = _smoke_data(), None
        for name in TITLES:
            run.add({"set": "smoke", "baseline": name}, baseline(name, data, run.resamples, _letters))
        return
    folder = data_folder("clinc150").parent
    for spec in run.sets:
        missing = [name for name in TITLES if run.find({"set": spec["name"], "baseline": name}) is None]
        data = load_setting(make_setting(spec), str(folder)) if missing else None
        for name in missing:
            with fast_linear():
                run.add({"set": spec["name"], "baseline": name}, baseline(name, data, run.resamples))
            log(f"measured: {spec['name']}, {name}")


def tables(runs: Runs) -> dict[str, str]:
    """A line for each baseline, a column for each set."""
    rows = [row for run in runs for row in run.rows]
    names = list(dict.fromkeys(row["key"]["set"] for row in rows))
    found = {(row["key"]["set"], row["key"]["baseline"]): row["result"] for row in rows}
    lines = [
        [title, *(None if (each := found.get((name, key))) is None else brief(each) for name in names)]
        for key, title in TITLES.items()
    ]
    headers = ["Nothing tuned: AUROC / passes at 95 % recall (ID accuracy)", *(SETS.get(name, name) for name in names)]
    return {"baselines": markdown_table(headers, lines)}


def brief(found: dict[str, Any]) -> str:
    """AUROC, what passes and the accuracy, in percent."""
    return f"{100 * found['auroc']:.1f} / {100 * found['fpr95']:.0f} ({100 * found['id_accuracy']:.1f})"


class _Answers(NamedTuple):
    """Of test texts, then of those from outside."""

    classes: np.ndarray
    inside: np.ndarray
    outside: np.ndarray
    setting: float


def baseline(name: str, data: Data, resamples: int = 300, encode: Any = None) -> dict[str, Any]:
    """Accuracy on the test texts, and the measures of the scores.

    Args:
        name: Of `TITLES`.
        data: The split.
        resamples: Of the bootstrap interval.
        encode: Texts to unit vectors; None: MiniLM.
    """
    found = _METHODS[name](data, encode)
    interval = metrics.bootstrap(metrics.auroc, found.inside, found.outside, resamples=resamples)
    return {
        "classes": len(data.labels),
        "examples": {"train": len(data.train[0]), "test": len(data.test[0]), "outside": len(data.outside)},
        "chosen": found.setting,
        "id_accuracy": metrics.id_accuracy(found.classes, data.test[1]),
        **{measure: value(found.inside, found.outside) for measure, value in metrics.MEASURES.items()},
        "auroc_interval": [interval.low, interval.high],
    }


def _tfidf(data: Data, encode: Any) -> _Answers:
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(data.train[0])
    return _logistic(data, vectorizer.transform)


def _minilm_logistic(data: Data, encode: Any) -> _Answers:
    return _logistic(data, encode or _minilm())


def _minilm_neighbours(data: Data, encode: Any) -> _Answers:
    encode = encode or _minilm()
    train, truth = encode(data.train[0]), data.train[1]
    validation = encode(data.validation[0])
    fitted = [
        KNeighborsClassifier(min(count, len(train)), weights="distance", metric="cosine").fit(train, truth)
        for count in NEIGHBOURS
    ]
    best = max(fitted, key=lambda model: model.score(validation, data.validation[1]))
    test, outside = encode(data.test[0]), encode(data.outside)
    nearest = [(each @ train.T).max(axis=1) for each in (test, outside)]
    return _Answers(best.predict(test), *nearest, setting=best.n_neighbors)


def _logistic(data: Data, encode: Encode) -> _Answers:
    """The largest probability of the regression with the best validation accuracy."""
    train, validation = encode(data.train[0]), encode(data.validation[0])
    fitted = [LogisticRegression(C=strength, max_iter=300).fit(train, data.train[1]) for strength in STRENGTHS]
    best = max(fitted, key=lambda model: model.score(validation, data.validation[1]))
    test, outside = (best.predict_proba(encode(texts)) for texts in (data.test[0], data.outside))
    return _Answers(best.classes_[test.argmax(axis=1)], test.max(axis=1), outside.max(axis=1), best.C)


@functools.cache
def _minilm() -> Encode:
    """MiniLM's unit vectors, of every text once."""
    encoder, known = SentenceEncoder(), {}

    def encode(texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, encoder(new)))
        return np.stack([known[text] for text in texts])

    return encode


_METHODS: dict[str, Callable[[Data, Any], _Answers]] = {
    "tfidf": _tfidf,
    "minilm_logistic": _minilm_logistic,
    "minilm_neighbours": _minilm_neighbours,
}


def _smoke_data() -> Data:
    words = {"one": "apple pear plum", "two": "dog cat cow"}
    texts = [f"{word} {other}" for each in words.values() for word in each.split() for other in each.split()]
    part = (texts, [0] * 9 + [1] * 9)
    return Data(list(words), part, part, part, ["seven mountains", "twelve rivers"])


def _letters(texts: Sequence[str]) -> np.ndarray:
    counts = np.array([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


TASK = Task(measure, tables)
