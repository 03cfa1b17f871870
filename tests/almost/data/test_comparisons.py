# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The heuristic filter, the pairing rule, the split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ext.rows import read_rows
from trl_ext.almost.config import ComparisonsConfig
from trl_ext.almost.data.comparisons import (
    build_comparisons,
    heuristic_filter,
    pair_up,
    write_comparisons,
)


GENERATORS = [
    "prompt=faithful,shots=3",
    "prompt=hhh,shots=5",
    "prompt=hhh,shots=1,bits=3",
    "prompt=hhh,shots=0,bits=3",
]
GOOD = "A sentence that is long enough to pass, and ends as it should."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        (GOOD[:-1] + "!", None),
        ("Too short.", "short"),
        (GOOD[:-1] + "?", "ends open"),
        (GOOD + " Such as:", "ends open"),
        ("Well, " + GOOD, "begins with well"),
        (GOOD[:-1], "no full stop"),
        ("I don't know, but " + GOOD, "does not know"),
        ("I do not know whether " + GOOD, "does not know"),
        (GOOD + " Human: and", "another turn"),
        ("<Image> " + GOOD, "image"),
    ],
)
def test_heuristic_filter(text, reason):
    assert heuristic_filter(text) == reason


def slow_pairs(ranks, lengths, everything, length_aware):
    """The rule, said another way: go through all pairs in the order of preference."""
    usual = np.mean(everything) - np.std(everything) / 2
    order = sorted(range(len(ranks)), key=lambda i: (ranks[i], i))
    pairs = []
    for i in order:
        options = [
            j
            for j in order
            if ranks[j] > ranks[i]
            and j not in {worse for _, worse in pairs}
            and (not length_aware or lengths[i] >= lengths[j] or lengths[i] >= usual)
        ]
        pairs += [(i, j) for j in options[:1]]
    return pairs


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 300)), min_size=1, max_size=7),
    st.lists(st.integers(1, 300), max_size=3),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_pairing_rule(answers, dropped, length_aware):
    ranks, lengths = [rank for rank, _ in answers], [length for _, length in answers]
    pairs = pair_up(ranks, lengths, [*lengths, *dropped], length_aware)
    assert [tuple(pair) for pair in pairs] == slow_pairs(ranks, lengths, [*lengths, *dropped], length_aware)
    assert all(ranks[better] < ranks[worse] for better, worse in pairs)
    assert len(pairs) <= max(len(ranks) - 1, 0)
    assert len({worse for _, worse in pairs}) == len({better for better, _ in pairs}) == len(pairs)


def test_pairing_by_hand():
    assert pair_up([0, 1, 2], [100, 50, 20], [100, 50, 20]) == [(0, 1), (1, 2)]
    # the best is short, and is preferred to what is shorter alone
    assert pair_up([0, 1, 2], [10, 200, 5], [10, 200, 5]) == [(0, 2)]
    assert pair_up([0, 1, 2], [10, 200, 5], [10, 200, 5], length_aware=False) == [(0, 1), (1, 2)]
    # equal ranks aren't compared, and share the ones below
    assert pair_up([0, 0, 1, 1], [9, 9, 9, 9], [9] * 4) == [(0, 2), (1, 3)]
    assert pair_up([], [], []) == []


def test_answers_of_too_different_lengths_are_not_compared():
    lengths = [100, 40, 80]
    assert pair_up([0, 1, 2], lengths, lengths) == [(0, 1)]
    # not the first, but the next that fits
    assert pair_up([0, 1, 2], lengths, lengths, max_length_ratio=2) == [(0, 2)]
    assert pair_up([0, 1, 2], lengths, lengths, length_aware=False, max_length_ratio=2) == [(0, 2)]
    assert pair_up([0, 1], [0, 0], [0, 0], max_length_ratio=1) == [(0, 1)], "two empty answers are of one length"
    assert pair_up([0, 1, 2], lengths, lengths, max_length_ratio=1.2) == []
    with pytest.raises(ValueError, match=r"max_length_ratio=0.5 must be a number of at least 1"):
        ComparisonsConfig(max_length_ratio=0.5)


def test_the_longest_ratio_is_counted_among_what_length_drops():
    rows = answers([[GOOD * 3, GOOD], [GOOD, GOOD]])
    pairs, counts = build_comparisons(rows, GENERATORS, ComparisonsConfig(max_length_ratio=2))
    assert [pair["query_id"] for pair in pairs] == [1] and counts["pairs that length dropped"] == 1


def answers(texts):
    return [
        {"id": f"{q}/{r}", "query_id": q, "rung": r, "query": f"What is {q}?", "response": text}
        for q, row in enumerate(texts)
        for r, text in enumerate(row)
    ]


def test_comparisons_are_trl_s():
    rows, counts = build_comparisons(
        answers([[GOOD, GOOD[::1] + " More.", "", "short"]]), GENERATORS, ComparisonsConfig()
    )
    assert rows == [
        {
            "id": "0/0>1",
            "query_id": 0,
            "prompt": [{"role": "user", "content": "What is 0?"}],
            "chosen": [{"role": "assistant", "content": GOOD}],
            "rejected": [{"role": "assistant", "content": GOOD + " More."}],
            "rungs": [0, 1],
        }
    ]
    assert counts == {
        "responses": 4,
        "bad: empty": 1,
        "bad: short": 1,
        "pairs that length dropped": 0,
        "pairs": 1,
        "comparisons": 1,
    }
    plain, _ = build_comparisons(answers([[GOOD, GOOD]]), GENERATORS, ComparisonsConfig(conversational=False))
    assert plain[0]["prompt"] == "What is 0?" and plain[0]["chosen"] == GOOD
    unfiltered, _ = build_comparisons(answers([["short", "x"]]), GENERATORS, ComparisonsConfig(heuristic_filter=False))
    assert unfiltered[0]["rungs"] == [0, 1]


def test_the_as_is_reward_model_has_to_agree():
    texts = [[GOOD + " Best.", GOOD + " Last."], [GOOD + " Last.", GOOD + " Best."]]

    def reward(prompts, responses):
        assert len(prompts) == len(responses) == 4
        return [float("Best" in response) for response in responses]

    rows, counts = build_comparisons(answers(texts), GENERATORS, ComparisonsConfig(), reward)
    assert [row["query_id"] for row in rows] == [0]
    assert counts["pairs"] == 2 and counts["pairs that the as-is reward model dropped"] == 1
    with pytest.raises(ValueError, match="as-is reward model dropped 2.*Most fell to"):
        build_comparisons(answers(texts), GENERATORS, ComparisonsConfig(), lambda p, r: [0.0] * len(r))


def test_nothing_left_says_which_filter_did_it():
    with pytest.raises(
        ValueError, match=r"no comparison is left of 4 answers.*bad: empty 3.*Most fell to 'bad: empty'"
    ):
        build_comparisons(answers([["", "", "", GOOD]]), GENERATORS, ComparisonsConfig())
    with pytest.raises(ValueError, match=r"bad: no full stop 2"):
        build_comparisons(answers([[GOOD[:-1], GOOD[:-1]]]), GENERATORS, ComparisonsConfig())


def test_the_split_is_by_query(tmp_path):
    rows, _ = build_comparisons(answers([[GOOD] * 4] * 20), GENERATORS, ComparisonsConfig())
    counts = write_comparisons(rows, tmp_path, ComparisonsConfig(heldout_share=0.25, seed=3))
    train, heldout = read_rows(tmp_path / "comparisons.jsonl"), read_rows(tmp_path / "comparisons.heldout.jsonl")
    assert len({row["query_id"] for row in heldout}) == 5
    assert not {row["query_id"] for row in heldout} & {row["query_id"] for row in train}
    assert sorted(row["id"] for row in [*train, *heldout]) == sorted(row["id"] for row in rows)
    assert counts == {"comparisons.heldout.jsonl": len(heldout), "comparisons.jsonl": len(train)}
    with pytest.raises(ValueError, match="too few to hold out heldout_share=0.1"):
        write_comparisons(rows[:1], tmp_path, ComparisonsConfig())
    with pytest.raises(ValueError, match="heldout_share=1"):
        ComparisonsConfig(heldout_share=1)
