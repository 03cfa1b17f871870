# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Answers of the generators."""

from __future__ import annotations

import pytest

from peft_ext.rows import read_rows
from tests.almost.writers import Writer, sentence
from trl_ext.almost.config import ResponsesConfig
from trl_ext.almost.data.responses import write_responses


GENERATORS = [
    "prompt=faithful,shots=3",
    "prompt=hhh,shots=5",
    "prompt=hhh,shots=1,bits=3",
    "prompt=hhh,shots=0,bits=3",
]
QUERIES = [{"id": number, "query": f"What is {number}?"} for number in range(10)]


def loader(loaded, write=lambda key, n: f" {sentence(key)}\n\nHuman: more"):
    def load(generator):
        loaded.append(generator.name)
        return Writer(write)

    return load


def test_every_generator_answers_every_query(tmp_path):
    loaded, config = [], ResponsesConfig(generators=GENERATORS, batch_size=4)
    counts = write_responses(loader(loaded), config, QUERIES, tmp_path / "r.jsonl")
    rows = read_rows(tmp_path / "r.jsonl")
    assert [(row["query_id"], row["rung"]) for row in rows] == [(q, r) for q in range(10) for r in range(4)]
    assert rows[5]["response"] == sentence("responses/1/1") and rows[5]["query"] == "What is 1?"
    assert len(loaded) == 2, "a model is loaded once for generators beside each other"
    assert counts == {"responses": 40, "empty": 0}
    write_responses(loader(loaded), config, QUERIES, tmp_path / "r.jsonl")
    assert len(loaded) == 2, "nothing is missing, so nothing is loaded"


def test_answers_go_on_after_an_interruption(tmp_path):
    config, path = ResponsesConfig(generators=GENERATORS, batch_size=4), tmp_path / "r.jsonl"

    def interrupted(key, number):
        if key == "responses/2/6":
            raise KeyboardInterrupt
        return sentence(key)

    with pytest.raises(KeyboardInterrupt):
        write_responses(loader([], interrupted), config, QUERIES, path)
    assert len(read_rows(path)) == 24, "whole batches stay"
    loaded = []
    write_responses(loader(loaded, lambda key, n: sentence(key)), config, QUERIES, path)
    assert loaded == ["the model, 3 bits, hhh 1-shot"], "finished generators aren't loaded"
    write_responses(loader([], lambda key, n: sentence(key)), config, QUERIES, tmp_path / "whole.jsonl")
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
