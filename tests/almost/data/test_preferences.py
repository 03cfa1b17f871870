# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Preference data in every format that TRL's documentation names, and in the two that are most used, give the same pairs."""

from __future__ import annotations

import pytest

from trl_ext.almost.data.preferences import preference_pairs


ASK = [{"role": "user", "content": "Is it blue?"}]
TALK = [*ASK, {"role": "assistant", "content": "Ask again."}, {"role": "user", "content": "Is it?"}]
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Is it blue?", "chosen": "Yes.", "rejected": "No."}, "Is it blue?", "Yes.", "No."),
        ({"prompt": ASK, "chosen": [YES], "rejected": [NO]}, ASK, [YES], [NO]),
        ({"chosen": [*ASK, YES], "rejected": [*ASK, NO]}, ASK, [YES], [NO]),
        ({"chosen": [*TALK, YES], "rejected": [*TALK, NO]}, TALK, [YES], [NO]),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", " blue.", " green."),
        (
            {
                "chosen": "\n\nHuman: Is it blue?\n\nAssistant: Yes.",
                "rejected": "\n\nHuman: Is it blue?\n\nAssistant: No.",
            },
            ASK,
            [YES],
            [NO],
        ),
        ({"prompt": "Is it blue?", "chosen": [*ASK, YES], "rejected": [*ASK, NO]}, "Is it blue?", [YES], [NO]),
        ({"chosen": [*ASK, YES], "rejected": [*ASK, YES]}, ASK, [YES], [YES]),
    ],
    ids=[
        "texts",
        "conversations",
        "implicit prompt",
        "several turns",
        "implicit prompt of texts",
        "hh-rlhf",
        "UltraFeedback",
        "a tie",
    ],
)
def test_formats(row, prompt, chosen, rejected):
    (pair,) = preference_pairs([{**row, "score": 3}])
    assert pair == {"prompt": prompt, "chosen": chosen, "rejected": rejected, "score": 3}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 1 has no 'rejected', only .'chosen', 'prompt'"),
        ({"chosen": "b", "rejected": [NO]}, "row 1: 'chosen' and 'rejected' must both"),
        ({"chosen": "b", "rejected": "c"}, "row 1 has no 'prompt', and"),
        ({"chosen": [*ASK, YES], "rejected": [*TALK, NO]}, "row 1: 'rejected' doesn't end in one turn"),
        ({"chosen": [YES], "rejected": [NO]}, "row 1 has no 'prompt', and"),
    ],
)
def test_what_is_no_pair_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        preference_pairs([{"prompt": "a", "chosen": "b", "rejected": "c"}, row])
