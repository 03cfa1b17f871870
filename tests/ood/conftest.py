# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Tiny models with tokenizers in folders, and corpora in which a word tells the class."""

from __future__ import annotations

import json
import random

import pytest

from tests.tiny.folders import save_word_model


DOMAINS = {"bank": ["pay", "card"], "travel": ["fly", "stay"], "home": ["cook", "clean"]}
LABELS = sorted(label for labels in DOMAINS.values() for label in labels)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    return save_word_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    return save_word_model("llama", tmp_path_factory.mktemp("llama"))


def texts_of(number: int, count: int, generator: random.Random) -> list[str]:
    """Texts of class `number`: three of its own ten words, and one of those that all share."""
    own = [f"w{3 + 10 * number + i}" for i in range(10)]
    shared = [f"w{90 + i}" for i in range(10)]
    return [
        " ".join(generator.sample(own, 3) + generator.sample(shared, generator.choice([1, 2]))) for _ in range(count)
    ]


def write_corpus(folder, labels: list[str], outside: bool, first: int = 0, validation: bool = True) -> None:
    """`labels` get the words from class `first` on; with `outside`, out-of-scope texts of words that no class has."""
    folder.mkdir(parents=True)
    generator = random.Random(first)
    for split, count in (("train", 10), ("validation", 4), ("test", 6)):
        if split == "validation" and not validation:
            continue
        rows = [
            {"text": text, "label": label}
            for number, label in enumerate(labels)
            for text in texts_of(first + number, count, generator)
        ]
        if outside:
            rows += [{"text": text, "label": "oos"} for text in texts_of(8, count, generator)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "clinc150", LABELS, outside=True)
    (folder / "clinc150" / "domains.json").write_text(json.dumps(DOMAINS))
    write_corpus(folder / "banking77", ["lost", "top", "fee", "rate"], outside=False, first=4, validation=False)
    write_corpus(folder / "snips", ["music", "book", "rain"], outside=False, first=2)
    return str(folder)
