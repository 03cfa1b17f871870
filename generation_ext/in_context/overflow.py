# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What happens to a text that is too long for the model: an error, fewer demonstrations, or a shorter input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

from generation_ext.in_context.encoding import TextEncoder
from generation_ext.in_context.prompts import Example, Task


ERROR, DROP, TRUNCATE = OVERFLOW = ("error", "drop_demonstrations", "truncate_input")


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
        shown = demonstrations[index]
        if max_tokens is None or len(tokens) <= max_tokens:
            fitted.append(Fitted(tokens, shown))
        elif overflow == DROP:
            fitted.append(_drop(encode, examples[index], shown, max_tokens, index))
        elif overflow == TRUNCATE:
            fitted.append(_truncate(task, encode, examples[index], shown, max_tokens, index))
        else:
            raise ValueError(
                f"{_what(index, shown)} takes {len(tokens)} tokens, but {max_tokens} fit before the labels; use fewer "
                f"demonstrations, a model with a longer context, or overflow={DROP!r} or {TRUNCATE!r}."
            )
    return fitted


def _drop(
    encode: Callable[[Example, Sequence[tuple[Example, str]]], list[int]],
    example: Example,
    shown: Sequence[tuple[Example, str]],
    max_tokens: int,
    index: int,
) -> Fitted:
    """The most demonstrations, counted from the last, that fit."""
    fewest, most, best = 0, len(shown) - 1, None
    while fewest <= most:
        kept = (fewest + most) // 2
        tokens = encode(example, shown[len(shown) - kept :])
        if len(tokens) <= max_tokens:
            fewest, best = kept + 1, Fitted(tokens, shown[len(shown) - kept :], len(shown) - kept)
        else:
            most = kept - 1
    if best is None:
        raise ValueError(
            f"input {index} takes more than {max_tokens} tokens even without demonstrations; use "
            f"overflow={TRUNCATE!r}, or shorten it."
        )
    return best


def _truncate(
    task: Task,
    encode: Callable[[Example, Sequence[tuple[Example, str]]], list[int]],
    example: Example,
    shown: Sequence[tuple[Example, str]],
    max_tokens: int,
    index: int,
) -> Fitted:
    """The input with its fields cut to the most characters that fit; the longest field is cut first."""
    values = task.values(example)
    fewest, most, best = 0, max(map(len, values.values())), None
    while fewest <= most:
        room = (fewest + most) // 2
        shorter = {name: value[:room] for name, value in values.items()}
        tokens = encode(shorter, shown)
        if len(tokens) <= max_tokens:
            cut = sum(map(len, values.values())) - sum(map(len, shorter.values()))
            fewest, best = room + 1, Fitted(tokens, shown, truncated=cut)
        else:
            most = room - 1
    if best is None:
        raise ValueError(
            f"{_what(index, shown)} doesn't fit into {max_tokens} tokens even if nothing is left of the input; use "
            f"fewer demonstrations, or overflow={DROP!r}."
        )
    return best


def _what(index: int, shown: Sequence[tuple[Example, str]]) -> str:
    return f"input {index} with its {len(shown)} demonstrations" if shown else f"input {index}"


def _cut_end(text: str, characters: int) -> str:
    return text[:-characters] if characters else text
