# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PALP's data sets: their templates, a pool that all draws of demonstrations and training texts come from, and a part of
the test split; and an extractor that remembers what it has encoded."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Protocol, Union

import numpy as np

from benchmarks.core.run import data_folder
from generation_ext.in_context import Task
from generation_ext.probing.feature_file import digest_of_texts
from peft_ext.files import write_json
from peft_ext.rows import read_rows


Text = Union[str, dict[str, str]]
SINGLE, SENTIMENT, PAIR = (
    "Sentence 1: {text}\nLabel:",
    "Sentence 1: {text}\nSentiment:",
    "Premise: {premise}\nHypothesis: {hypothesis}\nLabel:",
)
PLAIN = {SINGLE: "{text}", SENTIMENT: "{text}", PAIR: "{premise}\n{hypothesis}"}


@dataclass(frozen=True)
class Set:
    """A data set.

    Args:
        name: Its folder.
        template: PALP-T's.
        words: Label -> words in demonstrations; the label itself where there are none.
        test: The split that is measured on.
        left_out: A label that is no class.
        demonstrations: Whether a demonstration of each class fits before a text.
    """

    name: str
    template: str = SINGLE
    words: dict[str, str] = field(default_factory=dict)
    test: str = "test"
    left_out: str = ""
    demonstrations: bool = True

    def word(self, label: str) -> str:
        """The label in a demonstration, with the space before it."""
        return " " + self.words.get(label, label)


SETS = {
    each.name: each
    for each in (
        Set("sst2", SENTIMENT),
        Set(
            "sst5",
            SENTIMENT,
            {"very negative": "terrible", "negative": "bad", "neutral": "okay", "positive": "good"}
            | {"very positive": "great"},
        ),
        Set("ag_news", words={"Sci/Tech": "Technology"}),
        Set("snips"),
        Set("rte", PAIR, {"entailment": "True", "not_entailment": "False"}, "validation"),
        Set("cb", PAIR, {"entailment": "True", "contradiction": "False", "neutral": "Neither"}, "validation"),
        Set("banking77", demonstrations=False),
        Set("clinc150", left_out="oos", demonstrations=False),
    )
}


class Split:
    """A set's texts: `pool` to learn from, `test` to measure on.

    Args:
        source: The set.
        pool: Most texts to learn from, as many of each class as there are.
        test: Most texts to measure on.
        seed: Of the choice.
    """

    def __init__(self, source: Set, pool: int, test: int, seed: int = 0) -> None:
        self.source = source
        training = self._read("train", seed)
        by_class: dict[str, list[Text]] = defaultdict(list)
        for text, label in training:
            by_class[label].append(text)
        self.labels = sorted(by_class)
        share = max(1, -(-pool // len(self.labels)))
        chosen = [(text, label) for label in self.labels for text in by_class[label][:share]]
        random.Random(seed).shuffle(chosen)
        self.pool: tuple[list[Text], np.ndarray] = _columns(chosen)
        self.test: tuple[list[Text], np.ndarray] = _columns(self._read(source.test, seed)[:test])

    @property
    def task(self) -> Task:
        """For in-context learning."""
        return Task(
            self.source.template, {label: self.source.word(label) for label in self.labels}, name=self.source.name
        )

    def draw(self, shots: int, seed: int) -> np.ndarray:
        """Indices into the pool: so many of each class, or all that there are."""
        labels, rng = self.pool[1], random.Random(seed)
        found: list[int] = []
        for label in self.labels:
            own = np.flatnonzero(labels == label).tolist()
            found += rng.sample(own, min(shots, len(own)))
        return np.array(found)

    def _read(self, split: str, seed: int) -> list[tuple[Text, str]]:
        pair = self.source.template == PAIR
        found: list[tuple[Text, str]] = [
            ({"premise": row["text_a"], "hypothesis": row["text_b"]} if pair else row["text"], row["label"])
            for row in read_rows(data_folder(self.source.name) / f"{split}.jsonl")
            if row["label"] != self.source.left_out
        ]
        random.Random(seed).shuffle(found)
        return found


class Extractor(Protocol):
    """As PALPClassifier wants it."""

    def extract(self, texts: Sequence[str], prefix: str = "") -> np.ndarray:
        """`[texts, size]`."""


class Remembering:
    """An extractor that keeps the features of texts without a prefix, which all draws of few shots share.

    Args:
        extractor: Whose features.
        folder: Where what [`learn`] extracts is kept for the next process; None: in memory.
    """

    def __init__(self, extractor: Extractor, folder: Optional[Path] = None) -> None:
        self.extractor, self.folder = extractor, folder
        self.known: dict[str, np.ndarray] = {}
        self.seconds: dict[str, float] = {}
        self.saved = 0.0  # CPU seconds that what was known already had taken
        self._kept: dict[str, tuple[np.ndarray, float]] = {}
        if hasattr(extractor, "blocks"):
            self.blocks = extractor.blocks
        if getattr(extractor, "writes", False):
            self.label_scores = extractor.label_scores  # type: ignore[attr-defined]
        for record in sorted(folder.glob("*.texts.json")) if folder is not None else ():
            stored = json.loads(record.read_text(encoding="utf-8"))
            features = np.load(record.with_name(record.name.replace(".texts.json", ".npy")), mmap_mode="r")
            self._kept.update({key: (row, stored["seconds"]) for key, row in zip(stored["texts"], features)})

    def learn(self, texts: Sequence[str]) -> list[str]:
        """Extract the features of texts, or find them in the folder, with the CPU seconds that each took; returns those
        that nothing was known of."""
        new = []
        for text in dict.fromkeys(texts):
            key = digest_of_texts([text])
            if text not in self.known and key in self._kept:
                self.known[text], self.seconds[text] = self._kept[key]
            elif text not in self.known:
                new.append(text)
        if not new:
            return []
        start = time.process_time()
        if self.folder is None:
            features = self.extractor.extract(new)
        else:
            path = self.folder / f"{digest_of_texts(new)[:32]}.npy"
            features = self.extractor.extract(new, "", path)  # type: ignore[call-arg]
        seconds = (time.process_time() - start) / len(new)
        if self.folder is not None:
            keys = [digest_of_texts([text]) for text in new]
            write_json(path.with_suffix(".texts.json"), {"texts": keys, "seconds": seconds})
        self.known.update(zip(new, features))
        self.seconds.update(dict.fromkeys(new, seconds))
        return new

    def extract(self, texts: Sequence[str], prefix: str = "") -> np.ndarray:
        """As `PALPClassifier` asks for them."""
        if prefix:
            return self.extractor.extract(texts, prefix)
        unique = dict.fromkeys(texts)
        new = set(self.learn(list(unique)))
        self.saved += sum(self.seconds[text] for text in unique if text not in new)
        return np.stack([self.known[text] for text in texts])


def _columns(pairs: Sequence[tuple[Any, str]]) -> tuple[list[Any], np.ndarray]:
    return [text for text, _ in pairs], np.array([label for _, label in pairs])
