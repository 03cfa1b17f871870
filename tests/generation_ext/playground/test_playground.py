# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The playground on a tiny model: what it shows is made once, what its buttons do, and the page itself."""

from __future__ import annotations

import re

import pytest

from generation_ext.playground.answers import BASE, Answers, coloured
from generation_ext.playground.exhibits import ADAPTERS, INTENTS, Exhibits
from peft_ext import cli


pytest.importorskip("trl")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("playground")


@pytest.fixture(scope="module")
def answers(hub, folder):
    return Answers(Exhibits(MODEL, str(folder)))


def test_two_adapters_answer_in_one_batch(answers):
    alone, shouting = answers.beside_each_other("The for", BASE, "shouting")
    assert alone.startswith("The for") and shouting.startswith("The for")
    assert answers.beside_each_other("The for", "shouting", BASE) == (shouting, alone)


def test_tokens_have_the_colour_of_the_critics_value(answers):
    steered, plain = answers.steered("The food", 8.0)
    for text in (steered, plain):
        assert len(re.findall(r'title="V = [01]\.\d\d"', text)) > 8
    assert answers.steered("The food", 0.0)[0] == plain
    assert "&lt;b&gt;" in coloured(["<b>"], [0.5], "V")


def test_an_intent_or_none_of_them(answers):
    shown = answers.intent("play a song")
    assert "accepted from" in shown and any(name in shown for name in INTENTS)


def test_a_paraphrase_and_its_granularities(answers):
    other, picture = answers.paraphrased("How do I learn chess")
    assert other and "chess" in picture and 'title="z = ' in picture


def test_mistakes_are_a_line(answers, capsys):
    with pytest.raises(ValueError, match="the text is empty"):
        answers.intent("  ")
    assert cli.main(["playground", "--model", "./nowhere", "--prepare", "True"]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_what_is_made_is_kept(answers, folder):
    made = ("pool", "critic", "intents", "paraphraser")
    assert all(getattr(answers.exhibits, name) is not None for name in made)
    place = folder / "playground" / MODEL.replace("/", "--")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert sorted(path.name for path in place.iterdir()) == ["base", "critic", "intents", "paraphraser"]
    again = Exhibits(MODEL, str(folder))
    assert all(getattr(again, name) is not None for name in made) and sorted(again.pool.names) == sorted(ADAPTERS)
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*")}


def test_the_page_is_made(answers):
    gradio = pytest.importorskip("gradio")
    from generation_ext.playground.page import make_page

    page = make_page(answers)
    assert isinstance(page, gradio.Blocks)
    labels = [block.label for block in page.blocks.values() if isinstance(block, gradio.Tab)]
    assert labels == ["Two adapters", "Steer", "Not mine", "Paraphrase"]
