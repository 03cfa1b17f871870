# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What happens to a text that is too long for the model: an error, fewer demonstrations, or a shorter input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

from generation_ext.prompts import Example, Task
from generation_ext.shared_prefix.encoding import TextEncoder


ERROR, DROP, TRUNCATE, BOTH = OVERFLOW = ("error", "drop_demonstrations", "truncate_input", "drop_then_truncate")


class Fitted(NamedTuple):
    """A text that fits: its token ids, the demonstrations in it, how many were dropped, characters that were cut."""

    tokens: list[int]
    demonstrations: Sequence[tuple[Example, str]]
    dropped: int = 0
    truncated: int = 0


def fit(
    task: Task,
    encoder: TextEncoder,
    examples: Sequence[Example],
    demonstrations: Sequence[Sequence[tuple[Example, str]]],
    max_tokens: Optional[int],
    overflow: str,
    moved: int = 0,
) -> list[Fitted]:
    """Token ids of every example behind its demonstrations.

    Args:
        task, encoder: How examples are written.
        examples: The inputs.
        demonstrations: For each input.
        max_tokens: Most tokens of a text; None: any number.
        overflow: What to do about a longer one.
        moved: Characters at the end of a text that are left to the label, see `LabelTokens`.

    Raises:
        ValueError: If a text is too long and `overflow` is `"error"`, or that remedy isn't enough.
    """

    def encode(example: Example, shown: Sequence[tuple[Example, str]]) -> list[int]:
        return encoder([_cut_end(task.context(example, shown), moved)])[0]

    wholes = encoder([_cut_end(task.context(*each), moved) for each in zip(examples, demonstrations)])
    fitted = []
    for index, tokens in enumerate(wholes):
        example, shown = examples[index], demonstrations[index]
        found: Optional[Fitted] = Fitted(tokens, shown)
        if max_tokens is not None and len(tokens) > max_tokens:
            found = _drop(encode, example, shown, max_tokens) if overflow in (DROP, BOTH) else None
            if overflow == BOTH and found is None:
                found = _truncate(task, encode, example, shown[len(shown) :], max_tokens)
                found = found and found._replace(dropped=len(shown))
            elif overflow == TRUNCATE:
                found = _truncate(task, encode, example, shown, max_tokens)
        if found is None:
            raise ValueError(_refusal(index, shown, len(tokens), max_tokens, overflow))
        fitted.append(found)
    return fitted


def _refusal(
    index: int, shown: Sequence[tuple[Example, str]], tokens: int, max_tokens: Optional[int], overflow: str
) -> str:
    what = f"input {index} with its {len(shown)} demonstrations" if shown else f"input {index}"
    ways = {
        ERROR: f"use fewer demonstrations, a model with a longer context, or overflow={DROP!r}, {TRUNCATE!r} or {BOTH!r}",
        DROP: f"it is too long even without demonstrations; shorten it, or use overflow={BOTH!r}",
        TRUNCATE: f"the rest is too long even without the input; use fewer demonstrations, or overflow={BOTH!r}",
        BOTH: "the template alone is too long; use a shorter one, or a model with a longer context",
    }
    return f"{what} takes {tokens} tokens, but {max_tokens} fit before the labels; {ways[overflow]}."


def _drop(
    encode: Callable[[Example, Sequence[tuple[Example, str]]], list[int]],
    example: Example,
    shown: Sequence[tuple[Example, str]],
    max_tokens: int,
) -> Optional[Fitted]:
    """The most demonstrations, counted from the last, that fit; None if not even the input does."""
    fewest, most = 0, max(len(shown) - 1, 0)
    best: Optional[Fitted] = None
    while fewest <= most:
        kept = (fewest + most) // 2
        tokens = encode(example, shown[len(shown) - kept :])
        if len(tokens) <= max_tokens:
            fewest, best = kept + 1, Fitted(tokens, shown[len(shown) - kept :], len(shown) - kept)
        else:
            most = kept - 1
    return best


def _truncate(
    task: Task,
    encode: Callable[[Example, Sequence[tuple[Example, str]]], list[int]],
    example: Example,
    shown: Sequence[tuple[Example, str]],
    max_tokens: int,
) -> Optional[Fitted]:
    """The input with its fields cut to the most characters that fit, the longest field first; None if none do."""
    values = task.values(example)
    fewest, most = 0, max(map(len, values.values()))
    best: Optional[Fitted] = None
    while fewest <= most:
        room = (fewest + most) // 2
        shorter = {name: value[:room] for name, value in values.items()}
        tokens = encode(shorter, shown)
        if len(tokens) <= max_tokens:
            cut = sum(map(len, values.values())) - sum(map(len, shorter.values()))
            fewest, best = room + 1, Fitted(tokens, shown, truncated=cut)
        else:
            most = room - 1
    return best


def _cut_end(text: str, characters: int) -> str:
    return text[:-characters] if characters else text
