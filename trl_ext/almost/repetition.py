# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Texts that go round in circles: the share of repeated word 3-grams, and a reward that it lowers, in TRL's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Union

from peft_ext.ngrams import repetition
from trl_ext.almost.data.rouge import words_of
from trl_ext.almost.prompts.chat import Messages


N = 3


def repeated_share(text: str, n: int = N) -> float:
    """Share of a text's n-grams of words that stood in it before, 0 to 1; 0 for a text of fewer than n words.

    Words are lower-case words and numbers; a script without spaces has a word for each character. Punctuation doesn't
    count.
    """
    words = words_of(text)
    return repetition([words], n) if len(words) >= n else 0.0


class RepetitionPenalty:
    """Less the share of repeated n-grams of words: a reward function for TRL's trainers, 0 for a text that never repeats
    itself and -1 at the worst.

    Beside a reward model, `reward_weights` says how much it counts: `reward_funcs=[reward_model, RepetitionPenalty()]`,
    `reward_weights=[1.0, 2.0]`.

    Args:
        n: Words in an n-gram.

    Raises:
        ValueError: If `n` isn't positive.

    Example:

    ```py
    >>> RepetitionPenalty()(["Why?"], ["It is so. It is so. It is so."])
    [-0.5714285714285714]
    ```
    """

    def __init__(self, n: int = N) -> None:
        if n < 1:
            raise ValueError(f"n={n} must be at least 1.")
        self.n = n
        self.__name__ = "repetition_penalty"  # what TRL calls it in its logs

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Union[str, Messages]], **columns: Any
    ) -> list[float]:
        """Rewards, as TRL's trainers ask for them; `prompts` and `columns` are ignored."""
        return [-repeated_share(_text(completion), self.n) for completion in completions]


def _text(completion: Union[str, Messages]) -> str:
    """What the assistant said: a text, or all messages of a completion together."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion if isinstance(message.get("content"), str))
