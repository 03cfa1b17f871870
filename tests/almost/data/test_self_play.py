# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Self-play: the best of N at each turn, ends of conversations, going on after a kill."""

from __future__ import annotations

import math

import pytest

from peft_ext.rows import read_rows
from tests.almost.writers import Writer, sentence
from tests.tiny.tokenizers import chat_tokenizer
from trl_ext.almost.config import SelfPlayConfig
from trl_ext.almost.data.self_play import reward_statistics, self_play
from trl_ext.almost.prompts.chat import request_text
from trl_ext.almost.prompts.roles import STYLES
from trl_ext.almost.repetition import repeated_share


QUERIES = [{"id": number, "query": "What is it? " + "x" * number} for number in range(9)]
CONFIG = SelfPlayConfig(samples=3, max_turns=2, batch_size=4, shots=1)


def length(prompts, responses):
    """A reward that is easy to check, and a check that conversations arrive as messages."""
    assert all(prompt[-1]["role"] == "user" for prompt in prompts) and len(prompts) == len(responses)
    return [float(len(response)) for response in responses]


def write(key, number):
    return (
        sentence(key, number, words=4 + 3 * number) + "\n\nHuman: x" if key.startswith("assistant") else sentence(key)
    )


def test_the_best_answer_is_kept_at_each_turn(tmp_path):
    counts = self_play(Writer(write), CONFIG, QUERIES, tmp_path / "d.jsonl", length)
    rows = read_rows(tmp_path / "d.jsonl")
    assert [row["id"] for row in rows] == list(range(9))
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 2
        assert row["messages"][0]["content"] == QUERIES[row["id"]]["query"]
        for turn, rewards in enumerate(row["rewards"]):
            expected = [sentence(f"assistant/{row['id']}/{turn}", n, words=4 + 3 * n) for n in range(3)]
            assert rewards == [len(text) for text in expected]
            assert row["messages"][2 * turn + 1]["content"] == max(expected, key=len)
        assert row["messages"][2]["content"] == sentence(f"user/{row['id']}/1")
    assert counts["conversations"] == 9 and counts["answers"] == 18 and counts["without an answer"] == 0
    assert counts["best of"] == reward_statistics(rows)


def test_reward_statistics():
    rows = [{"rewards": [[1, 3, 2], [4, 0, 6]]}, {"rewards": [[2, 2, 2]]}]
    statistics = reward_statistics(rows)
    assert [statistics[n]["mean"] for n in "123"] == [7 / 3, 9 / 3, 11 / 3]
    assert statistics["3"]["gain"] == pytest.approx(4 / 3) and statistics["1"]["gain"] == 0
    assert statistics["2"]["standard_error"] == pytest.approx(1 / math.sqrt(3))  # of 3, 4, 2
    assert reward_statistics([{"rewards": [[None]]}]) == {}


def test_conversations_end_early(tmp_path):
    def write_few(key, number):
        kind, talk, turn = key.split("/")
        if kind == "user":
            return {"0": "", "1": "What is it? x", "2": "y" * 600}.get(talk, "And then?\n\nSo what?")
        return "" if talk == "3" or (talk == "4" and turn == "1") else f"Answer {number}."

    counts = self_play(Writer(write_few), CONFIG, QUERIES[:6], tmp_path / "d.jsonl", length)
    turns = {row["id"]: [message["content"] for message in row["messages"]] for row in read_rows(tmp_path / "d.jsonl")}
    assert {talk: len(texts) for talk, texts in turns.items()} == {0: 2, 1: 2, 2: 2, 4: 2, 5: 4}
    assert turns[5][2] == "And then?", "the first paragraph"
    assert counts["without an answer"] == 1
    writer = Writer(write_few)
    self_play(writer, CONFIG, QUERIES[:6], tmp_path / "d.jsonl", length)
    assert not writer.batches, "what came to nothing isn't tried again"


def test_one_sample_needs_no_reward(tmp_path):
    config = SelfPlayConfig(samples=1, max_turns=1, batch_size=4, shots=0, count=3)
    counts = self_play(Writer(write), config, QUERIES, tmp_path / "d.jsonl")
    assert counts["conversations"] == 3 and counts["best of"] == {}
    with pytest.raises(ValueError, match="samples=3 needs a reward model"):
        self_play(Writer(write), CONFIG, QUERIES, tmp_path / "e.jsonl")


def test_empty_answers_never_win(tmp_path):
    writer = Writer(lambda key, n: "" if n == 0 and key.startswith("assistant") else "Some words." if n == 1 else "w")
    self_play(writer, CONFIG, QUERIES[:2], tmp_path / "d.jsonl", lambda p, r: [-5.0] * len(r))
    (row, _) = read_rows(tmp_path / "d.jsonl")
    assert row["messages"][1]["content"] == "Some words." and row["rewards"][0] == [None, -5.0, -5.0]


def test_the_model_s_own_format_is_the_default_where_it_has_one(tmp_path):
    """The fault: a tuned model's answers behind demonstrations were no better than what it says when it is asked."""
    config, writer = SelfPlayConfig(samples=1, max_turns=1, count=2), Writer(lambda key, n: "So.\n-----\nAnd so.")
    writer.tokenizer = chat_tokenizer()
    assert self_play(writer, config, QUERIES, tmp_path / "own.jsonl")["prompt"] == "own"
    assert writer.prompts["assistant/1/0"] == request_text(writer.tokenizer, QUERIES[1]["query"])
    assert read_rows(tmp_path / "own.jsonl")[0]["messages"][1]["content"] == "So.\n-----\nAnd so.", "a rule is no stop"
    plain = Writer(lambda key, n: "So.\n-----\nAnd so.")
    assert self_play(plain, config, QUERIES, tmp_path / "plain.jsonl")["prompt"] == "faithful"
    assert STYLES["faithful"].demonstrations[2][0] in plain.prompts["assistant/1/0"]
    assert read_rows(tmp_path / "plain.jsonl")[0]["messages"][1]["content"] == "So."
    with pytest.raises(ValueError, match="shots=2: prompt='own'"):
        SelfPlayConfig(prompt="own", shots=2)
    with pytest.raises(ValueError, match="prompt='rude' is unknown"):
        SelfPlayConfig(prompt="rude")


CIRCLES, PLAIN, OPEN = (
    "It is so. " * 6,
    "Water boils at a hundred degrees at the level of the sea.",
    "Water boils at a hundred",
)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [({}, CIRCLES), ({"repetition_weight": 2.0}, OPEN), ({"repetition_weight": 2.0, "heuristic_filter": True}, PLAIN)],
)
def test_answers_that_go_in_circles_or_break_off_lose(tmp_path, settings, chosen):
    rewards = {CIRCLES.strip(): 1.5, PLAIN: 0.5, OPEN: 1.0}
    config = SelfPlayConfig(samples=3, max_turns=1, shots=1, **settings)
    writer = Writer(lambda key, n: [CIRCLES, PLAIN, OPEN][n])
    counts = self_play(writer, config, QUERIES[:1], tmp_path / "d.jsonl", lambda p, r: [rewards[text] for text in r])
    (row,) = read_rows(tmp_path / "d.jsonl")
    assert row["messages"][1]["content"] == chosen.strip()
    share, weight = repeated_share(CIRCLES), settings.get("repetition_weight", 0)
    assert row["rewards"] == [[1.5 - weight * share, 0.5, 1.0]] and share > 0.5
    assert counts["repeated 3-grams"] == (share if chosen == CIRCLES else 0)


def test_an_answer_that_breaks_off_is_scored_and_kept_without_its_last_sentence(tmp_path):
    config = SelfPlayConfig(samples=2, max_turns=1, shots=1, whole_sentences=True)
    seen, writer = [], Writer(lambda key, n: ["It boils. And the", "It."][n])
    self_play(
        writer, config, QUERIES[:1], tmp_path / "d.jsonl", lambda p, r: seen.extend(r) or [float(len(t)) for t in r]
    )
    assert seen == ["It boils.", "It."]
    assert read_rows(tmp_path / "d.jsonl")[0]["messages"][1]["content"] == "It boils."


def test_faults(tmp_path):
    with pytest.raises(ValueError, match="NaN for conversation 3"):
        self_play(Writer(write), CONFIG, QUERIES[:4], tmp_path / "d.jsonl", lambda p, r: [math.nan] * len(r))
    assert not (tmp_path / "d.jsonl").exists()
    with pytest.raises(ValueError, match="none of 4 conversations has an answer"):
        self_play(Writer(lambda key, n: " "), CONFIG, QUERIES[:4], tmp_path / "e.jsonl", length)
    for name in ("samples", "max_turns", "user_max_new_tokens", "count"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            SelfPlayConfig(**{name: 0})
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="repetition_weight="):
            SelfPlayConfig(repetition_weight=weight)


def test_it_goes_on_after_an_interruption(tmp_path):
    def interrupted(key, number):
        if key == "user/2/1":
            raise KeyboardInterrupt
        return write(key, number)

    with pytest.raises(KeyboardInterrupt):
        self_play(Writer(interrupted), CONFIG, QUERIES, tmp_path / "d.jsonl", length)
    assert len(read_rows(tmp_path / "d.jsonl")) == 4
    writer = Writer(write)
    counts = self_play(writer, CONFIG, QUERIES, tmp_path / "d.jsonl", length)
    assert writer.batches[0] == [f"assistant/{number}/0" for number in (4, 3, 2, 1)]
    assert counts == self_play(Writer(write), CONFIG, QUERIES, tmp_path / "whole.jsonl", length)
    assert (tmp_path / "d.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
