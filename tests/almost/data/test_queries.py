# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Mining: filters, what is shown, going on after a kill."""

from __future__ import annotations

import pytest

from peft_ext.rows import read_rows
from tests.almost.writers import Writer, sentence
from trl_ext.almost.config import QueriesConfig
from trl_ext.almost.data.queries import FILTERS, Miner, first_query, form_filter, mine_queries
from trl_ext.almost.data.rouge import rouge_l, words_of


CONFIG = QueriesConfig(count=30, batch_size=4, seed=1)
FORM = QueriesConfig(min_chars=10, max_chars=40)


@pytest.mark.parametrize(
    ("text", "query", "reason"),
    [
        (" What is  it good for? \nQuery: next", "What is it good for?", None),
        ("A long one without an end", "A long one without an end", None),
        ("Short", "Short", "short"),
        ("Short?", "Short?", None),
        ('"Quoted words here"', "Quoted words here", None),
        ("x" * 41, "x" * 41, "long"),
        ("", "", "empty"),
        ("\n\n", "", "empty"),
        ("12 34 56 78 90 12", "12 34 56 78 90 12", "format"),
        ("Do it. Human: what", "Do it. Human: what", "format"),
        ("One. Query: Two", "One.", None),
    ],
)
def test_form(text, query, reason):
    assert first_query(text) == query
    assert form_filter(query, FORM) == reason


def test_queries_are_new_and_as_many_as_asked_for(tmp_path):
    path = tmp_path / "queries.jsonl"
    writer = Writer(
        lambda key, n: sentence(key) if hash_of(key) % 3 else "How do I get a coffee stain out of a shirt?"
    )
    counts = mine_queries(writer, CONFIG, path)
    rows = read_rows(path)
    assert [row["id"] for row in rows] == list(range(30))
    words = [words_of(row["query"]) for row in rows]
    assert all(rouge_l(a, b) < 0.5 for place, a in enumerate(words) for b in words[:place])
    assert counts["similar"] > 0 and counts["accepted"] == 30
    assert counts["generated"] == counts["accepted"] + sum(counts[name] for name in FILTERS)
    prompts = list(writer.prompts.values())
    assert all(prompt.count("Query:") == 11 for prompt in prompts) and len(set(prompts)) == len(prompts)
    assert any(rows[0]["query"] in prompt for prompt in prompts), "mined queries are shown, too"


def hash_of(key: str) -> int:
    return sum(key.encode())


def test_another_run_s_queries_are_avoided(tmp_path):
    writer = Writer(lambda key, n: sentence(key))
    mine_queries(writer, CONFIG, tmp_path / "a.jsonl")
    avoid = [row["query"] for row in read_rows(tmp_path / "a.jsonl")]
    miner = Miner(CONFIG, avoid)
    miner.take([*avoid[:5], "Something that no other query has been about so far?"])
    assert miner.queries == ["Something that no other query has been about so far?"]
    assert miner.counts["similar"] == 5


def test_it_goes_on_after_an_interruption(tmp_path):
    whole, torn = Writer(lambda key, n: sentence(key)), Writer(lambda key, n: sentence(key))
    mine_queries(whole, CONFIG, tmp_path / "whole.jsonl")

    def interrupted(key, number):
        if key == "queries/3/2":
            raise KeyboardInterrupt
        return sentence(key)

    torn.write = interrupted
    with pytest.raises(KeyboardInterrupt):
        mine_queries(torn, CONFIG, tmp_path / "torn.jsonl")
    assert not (tmp_path / "torn.jsonl").exists()
    torn.write, torn.batches = (lambda key, n: sentence(key)), []
    mine_queries(torn, CONFIG, tmp_path / "torn.jsonl")
    assert torn.batches[0][0] == "queries/3/0", "earlier batches aren't made again"
    assert read_rows(tmp_path / "torn.jsonl") == read_rows(tmp_path / "whole.jsonl")


@pytest.mark.parametrize(("text", "reason"), [("", "empty"), ("How does compound interest work?", "similar")])
def test_a_model_that_finds_nothing_is_an_error_with_the_counts(tmp_path, text, reason):
    config = QueriesConfig(count=30, batch_size=4, patience=3)
    with pytest.raises(ValueError, match=rf"3 batches in a row.*0 of 30.*12 texts.*{reason} 1\d.*filter '{reason}'"):
        mine_queries(Writer(lambda key, n: text), config, tmp_path / "q.jsonl")


def test_several_texts_for_a_list(tmp_path):
    writer = Writer(sentence)
    config = QueriesConfig(count=10, batch_size=4, samples=2)
    counts = mine_queries(writer, config, tmp_path / "q.jsonl")
    assert len(writer.prompts) == 2 * len({key.split("/")[1] for key in writer.prompts})
    assert counts["generated"] <= 2 * len(writer.prompts) and len(read_rows(tmp_path / "q.jsonl")) == 10


def test_bad_config():
    for name in ("count", "shots", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            QueriesConfig(**{name: 0})
    with pytest.raises(ValueError, match="min_chars=9"):
        QueriesConfig(min_chars=9, max_chars=8)
