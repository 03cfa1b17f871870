# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Prompts, styles of one's own, seeds."""

from __future__ import annotations

import json

import pytest

from peft_ext.rows import write_rows
from tests.tiny.tokenizers import byte_tokenizer
from trl_ext.almost.prompts.chat import request_text
from trl_ext.almost.prompts.roles import (
    STYLES,
    USER_STOPS,
    assistant_prompt,
    chosen_prompt,
    clean_turn,
    load_style,
    mining_prompt,
    seed_queries,
    user_prompt,
    uses_chat,
    whole_sentences,
)


CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def plain():
    return byte_tokenizer()


@pytest.fixture
def chat():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def test_demonstrations_stand_before_the_query(plain, chat):
    style = STYLES["hhh"]
    text = assistant_prompt(plain, "Why?", style, 2)
    assert text.startswith(style.preamble) and text.endswith("\n\n-----\n\nHuman: Why?\n\nAssistant:")
    assert text.count("Human:") == 3 and style.demonstrations[1][1] in text and style.demonstrations[2][0] not in text
    text = assistant_prompt(chat, "Why?", style, 2)
    assert text.startswith(f"<system>{style.preamble}</><user>{style.demonstrations[0][0]}</><assistant>")
    assert text.endswith("<user>Why?</><assistant>") and text.count("<user>") == 3
    assert "Human:" in assistant_prompt(chat, "Why?", style, 1, "plain")
    with pytest.raises(ValueError, match="shots=9"):
        assistant_prompt(plain, "Why?", style, 9)


def test_a_model_is_asked_in_its_own_format_as_it_is_in_use(plain, chat):
    text = assistant_prompt(chat, "Why?", load_style("own"), 0)
    assert text == request_text(chat, "Why?") == "<user>Why?</><assistant>"
    with pytest.raises(ValueError, match="prompt='own' needs a chat template"):
        assistant_prompt(plain, "Why?", load_style("own"), 0)
    with pytest.raises(ValueError, match="prompt='own' needs a chat template"):
        assistant_prompt(chat, "Why?", load_style("own"), 0, "plain")


def test_the_prompt_is_chosen_by_what_the_model_has(plain, chat):
    assert chosen_prompt(chat, "auto") == ("own", 0)
    assert chosen_prompt(plain, "auto") == ("faithful", 3)
    assert chosen_prompt(chat, "auto", None, "plain") == ("faithful", 3)
    # whoever asks for shots wants demonstrations, as before
    assert chosen_prompt(chat, "auto", 2) == ("faithful", 2) and chosen_prompt(chat, "auto", 0) == ("faithful", 0)
    assert chosen_prompt(chat, "hhh") == ("hhh", 3) and chosen_prompt(chat, "own") == ("own", 0)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("It boils. It then", "It boils."),
        ("It boils.", "It boils."),
        ('He said "It boils." And th', 'He said "It boils."'),
        ("Boil it!\n\n1. Take a pot.\n2. Fi", "Boil it!\n\n1. Take a pot."),  # not behind the number of an item
        ("It is 3.5 degrees at the", "It is 3.5 degrees at the"),
        ("no end at all", "no end at all"),
        ("水开了。然后", "水开了。"),
        ("", ""),
    ],
)
def test_an_unfinished_sentence_is_left_out(text, whole):
    assert whole_sentences(text) == whole


def test_prompts_of_a_stage_share_their_beginning(plain, chat):
    for tokenizer in (plain, chat):
        one, two = (assistant_prompt(tokenizer, query, STYLES["faithful"], 3) for query in ("Why?", "How?"))
        assert one[: one.rindex("Why?")] == two[: two.rindex("How?")]


def test_the_person_s_role_is_flipped(plain, chat):
    talk = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]
    assert user_prompt(chat, talk).endswith("<assistant>Q1</><user>A1</><assistant>")
    assert user_prompt(plain, talk).endswith("\n\n-----\n\nHuman: Q1\n\nAssistant: A1\n\nHuman:")


def test_formats(plain, chat):
    assert uses_chat(chat) and not uses_chat(plain) and not uses_chat(chat, "plain")
    with pytest.raises(ValueError, match="needs a chat template"):
        uses_chat(plain, "chat")
    with pytest.raises(ValueError, match="chat_format='other'"):
        uses_chat(plain, "other")


def test_a_turn_ends_where_another_begins():
    assert clean_turn(" Yes.\n\nHuman: and\n-----") == "Yes."
    assert clean_turn("Tell me more.\n\nAssistant: Gladly", USER_STOPS) == "Tell me more."
    assert clean_turn("\n\n-----\nx") == ""


def test_a_style_of_one_s_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"preamble": "P", "demonstrations": [["q", "a"]]}))
    assert load_style(str(path)).demonstrations == (("q", "a"),)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a preamble"):
        load_style(str(path))
    with pytest.raises(ValueError, match="prompt='rude' is unknown"):
        load_style("rude")


def test_seeds_and_mining(tmp_path):
    seeds = seed_queries()
    assert len(seeds) >= 40 and len(set(seeds)) == len(seeds) and all(len(seed) <= 250 for seed in seeds)
    assert mining_prompt(["a\nb", "c"]).endswith("\n\nQuery: a b\nQuery: c\nQuery:")
    path = tmp_path / "seeds.jsonl"
    path.write_text('{"instruction": "Do  it.", "input": ""}\n{"instruction": "With", "input": "x"}\n{"query": "Q"}\n')
    assert seed_queries(str(path)) == ["Do it.", "Q"]
    path.write_text('{"text": 1}\n')
    with pytest.raises(ValueError, match="row 1 has neither"):
        seed_queries(str(path))
    with pytest.raises(FileNotFoundError):
        seed_queries(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_a_seed_may_hold_what_ends_lines_elsewhere(tmp_path, mark):
    write_rows(tmp_path / "seeds.jsonl", [{"query": f"One{mark}two?"}, {"instruction": "Three."}])
    assert seed_queries(str(tmp_path / "seeds.jsonl")) == ["One two?", "Three."]
