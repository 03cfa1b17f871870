# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What happens to a text that is too long for the model: an error, fewer demonstrations, or a shorter input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional, TypeVar

from generation_ext.prompts import Example
from generation_ext.shared_prefix.encoding import LabelEncoder, LabelTokens


ERROR, DROP, TRUNCATE, BOTH = OVERFLOW = ("error", "drop_demonstrations", "truncate_input", "drop_then_truncate")
Demonstration = tuple[Example, str]
_Fitting = TypeVar("_Fitting")


class FittedText(NamedTuple):
    """A text that fits: its token ids, the labels that follow, the demonstrations in it, how many were dropped, characters
    that were cut."""

    tokens: list[int]
    labels: LabelTokens
    demonstrations: Sequence[Demonstration]
    dropped: int = 0
    truncated: int = 0


def fit(
    encoder: LabelEncoder,
    examples: Sequence[Example],
    demonstrations: Sequence[Sequence[Demonstration]],
    max_length: Optional[int],
    overflow: str,
) -> list[FittedText]:
    """Token ids of every example behind its demonstrations.

    Args:
        encoder: How examples are written, and what follows them.
        examples: The inputs.
        demonstrations: For each input.
        max_length: Most tokens of a text with its longest label; None: any number.
        overflow: What to do about a longer one.

    Raises:
        ValueError: If a text is too long and `overflow` is `"error"`, or that remedy isn't enough.
    """

    task = encoder.task

    def encode(*texts: tuple[Example, Sequence[Demonstration]]) -> list[tuple[list[int], LabelTokens]]:
        return encoder([encoder.context(*text) for text in texts])

    def fits(tokens: list[int], labels: LabelTokens) -> bool:
        return max_length is None or len(tokens) <= max_length - encoder.behind(labels)

    def dropped(example: Example, shown: Sequence[Demonstration]) -> Optional[FittedText]:
        """The most demonstrations, counted from the last, that fit; None if not even the input does."""

        def attempt(kept: int) -> Optional[FittedText]:
            rest = shown[len(shown) - kept :]
            (encoded,) = encode((example, rest))
            return FittedText(*encoded, rest, dropped=len(shown) - kept) if fits(*encoded) else None

        return largest_that_fits(attempt, max(len(shown) - 1, 0))

    def truncated(example: Example, shown: Sequence[Demonstration]) -> Optional[FittedText]:
        """The input with its fields cut to the most characters that fit, the longest field first; None if none do."""
        values = task.values(example)

        def attempt(characters: int) -> Optional[FittedText]:
            shorter = {name: value[:characters] for name, value in values.items()}
            (encoded,) = encode((shorter, shown))
            cut = sum(map(len, values.values())) - sum(map(len, shorter.values()))
            return FittedText(*encoded, shown, truncated=cut) if fits(*encoded) else None

        return largest_that_fits(attempt, max(map(len, values.values())))

    def shortened(example: Example, shown: Sequence[Demonstration]) -> Optional[FittedText]:
        if overflow == TRUNCATE:
            return truncated(example, shown)
        fitted = dropped(example, shown) if overflow in (DROP, BOTH) else None
        if fitted is None and overflow == BOTH:
            fitted = truncated(example, [])
            return fitted and fitted._replace(dropped=len(shown))
        return fitted

    texts = []
    for index, (tokens, labels) in enumerate(encode(*zip(examples, demonstrations))):
        if fits(tokens, labels):
            texts.append(FittedText(tokens, labels, demonstrations[index]))
            continue
        text = shortened(examples[index], demonstrations[index])
        if text is None:
            room = (max_length or 0) - encoder.behind(labels)
            raise ValueError(_refusal(index, demonstrations[index], len(tokens), room, overflow))
        texts.append(text)
    return texts


def largest_that_fits(attempt: Callable[[int], Optional[_Fitting]], most: int) -> Optional[_Fitting]:
    """What `attempt` gives for the largest size from 0 to `most` for which it gives something; None if for none."""
    best, fewest = None, 0
    while fewest <= most:
        size = (fewest + most) // 2
        fitting = attempt(size)
        if fitting is None:
            most = size - 1
        else:
            best, fewest = fitting, size + 1
    return best


def _refusal(index: int, shown: Sequence[Demonstration], tokens: int, max_tokens: int, overflow: str) -> str:
    what = f"input {index} with its {len(shown)} demonstrations" if shown else f"input {index}"
    ways = {
        ERROR: f"use fewer demonstrations, a model with a longer context, or overflow={DROP!r}, {TRUNCATE!r} or {BOTH!r}",
        DROP: f"it is too long even without demonstrations; shorten it, or use overflow={BOTH!r}",
        TRUNCATE: f"the rest is too long even without the input; use fewer demonstrations, or overflow={BOTH!r}",
        BOTH: "the template alone is too long; use a shorter one, or a model with a longer context",
    }
    return f"{what} takes {tokens} tokens, but {max_tokens} fit before the labels; {ways[overflow]}."
