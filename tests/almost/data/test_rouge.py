# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""ROUGE-L against the reference package, the index against all pairs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext.almost.data.rouge import RougeIndex, rouge_l, words_of


TEXTS = st.lists(st.sampled_from("the what how a cat dog runs fast very".split()), max_size=9).map(" ".join)


@given(TEXTS, TEXTS)
@settings(max_examples=80, deadline=None)
def test_rouge_l_is_the_reference_s(text, other):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    assert rouge_l(words_of(text), words_of(other)) == pytest.approx(scorer.score(text, other)["rougeL"].fmeasure)


def slow_f(text: str, other: str) -> float:
    a, b = text.lower().split(), other.lower().split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, word in enumerate(a):
        for j, another in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if word == another else max(table[i][j + 1], table[i + 1][j])
    return 2 * table[-1][-1] / (len(a) + len(b)) if a and b else 0.0


@given(st.lists(TEXTS, max_size=25), TEXTS, st.sampled_from([0.2, 0.5, 2 / 3, 0.7, 1.0]))
@settings(max_examples=150, deadline=None)
def test_the_index_is_all_pairs(texts, query, threshold):
    expected = any(slow_f(query, text) >= threshold - 1e-12 for text in texts)
    assert RougeIndex(threshold, texts).has_similar(query) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop_now: C3-PO!", ["don", "t", "stop", "now", "c3", "po"]),
        ("Как мне научиться?", ["как", "мне", "научиться"]),
        ("où est l'E\u0301te\u0301", ["où", "est", "l", "été"]),
        ("मैं कैसे सीखूँ", ["मैं", "कैसे", "सीखूँ"]),
        ("我怎么游泳 in 3", ["我", "怎", "么", "游", "泳", "in", "3"]),
    ],
)
def test_words_of_any_script(text, words):
    """(rouge_score's tokenizer, and ours before, had no word for a Russian query: none was ever similar to another.)"""
    assert words_of(text) == words
    assert RougeIndex(0.7, [text]).has_similar(text)


def test_it_grows_while_it_is_asked():
    index = RougeIndex(0.5)
    assert not index.has_similar("how do bees make honey")
    index.add("How do bees make honey?")
    assert len(index) == 1 and index.has_similar("how do wasps make honey") and not index.has_similar("make how")
    with pytest.raises(ValueError, match="threshold=0"):
        RougeIndex(0)
