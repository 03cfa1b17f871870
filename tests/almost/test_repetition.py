# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The share of repeated 3-grams in several scripts, and the reward that it lowers, in TRL's shape."""

from __future__ import annotations

import pytest

from trl_ext.almost import RepetitionPenalty, repeated_share


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("It is so. It is so, it is SO!", 4 / 7),  # 3 different of 7
        ("Water boils at a hundred degrees.", 0),
        ("so so so so", 1 / 2),
        ("so so", 0),
        ("", 0),
        ("вода кипит тут вода кипит тут", 1 / 4),
        ("水很好水很好", 1 / 4),  # a word for each character
    ],
)
def test_repeated_share(text, share):
    assert repeated_share(text) == pytest.approx(share)


def test_words_of_an_n_gram():
    assert repeated_share("so so so", 1) == pytest.approx(2 / 3) and repeated_share("so so so", 2) == 1 / 2
    with pytest.raises(ValueError, match="n=0"):
        RepetitionPenalty(0)


def test_the_penalty_is_a_reward_function_of_trl():
    """Called with keywords, on texts and on messages."""
    penalty, circles = RepetitionPenalty(), "so so so so"
    said = [{"role": "assistant", "content": circles}]
    assert penalty(prompts=["Why?"] * 3, completions=[circles, "so", ""], completion_ids=[[1]] * 3) == [-0.5, 0, 0]
    assert penalty([said], [said]) == [-0.5]
    assert penalty.__name__ == "repetition_penalty"
