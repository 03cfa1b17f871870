# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Pairs of `benchmarks.paraphrase`: how they are split, and the form in which they are measured."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from benchmarks.core.run import data_folder
from peft_ext.rows import read_rows


Pair = dict[str, str]

SETS = {"quora": "quora_paraphrase/train.jsonl", "twitter": "twitter_url/train_paraphrases.jsonl"}
TEST = {"quora": "quora_paraphrase/test.jsonl"}


def split_pairs(data: str, validation: int, test: int, seed: int) -> dict[str, list[Pair]]:
    """`train`, `validation` and `test` of a set; no text is in two of them.

    Both sets pair the same question or headline with many others (Twitter's 11,167 pairs are 2,482 clusters), so whole
    clusters are held out, in an order drawn by `seed`: validation, then test where the set has no test file. Where it has
    one, its first pairs are the test, and pairs that share a text with them are left out elsewhere.

    Args:
        data: A key of `SETS`.
        validation, test: How many pairs.
        seed: Of the drawing.
    """
    tested = _read(TEST[data])[:test] if data in TEST else []
    taken = {text for pair in tested for text in _texts(pair)}
    pairs = [pair for pair in _read(SETS[data]) if taken.isdisjoint(_texts(pair))]
    groups = clusters(pairs)
    random.Random(seed).shuffle(groups)
    found = {"validation": _take(groups, validation)}
    found["test"] = tested or _take(groups, test)
    found["train"] = [pair for group in groups for pair in group]
    random.Random(seed).shuffle(found["train"])
    return found


def clusters(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs that are linked by texts in common (case aside), in the order of their first pairs."""
    parents: dict[str, str] = {}

    def root(text: str) -> str:
        parents.setdefault(text, text)
        while parents[text] != text:
            parents[text] = parents[parents[text]]
            text = parents[text]
        return text

    for pair in pairs:
        one, other = map(root, _texts(pair))
        parents[one] = other
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(root(_texts(pair)[0]), []).append(pair)
    return list(found.values())


def as_decoded(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Texts as a model with this tokenizer would write them: lower case, cut to the tokenizer's length.

    The paper's code measures references in this form; a raw one can be longer than anything that a model says.
    """
    ids = tokenizer(list(texts), truncation=True)["input_ids"]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def _take(groups: list[list[Pair]], count: int) -> list[Pair]:
    """`count` pairs off the first groups, which are removed."""
    found: list[Pair] = []
    while groups and len(found) < count:
        found += groups.pop(0)
    return found[:count]


def _texts(pair: Pair) -> tuple[str, str]:
    return pair["source"].strip().lower(), pair["target"].strip().lower()


def _read(name: str) -> list[Pair]:
    folder, file = name.split("/")
    return read_rows(data_folder(folder) / file)
