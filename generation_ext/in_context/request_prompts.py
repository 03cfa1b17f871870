# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The prompts that ask a model for another text of a class, cut until they fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Optional

from generation_ext.in_context.overflow import BOTH, TRUNCATE, largest_that_fits
from generation_ext.in_context.scoring import LabelScorer
from generation_ext.prompts import Task
from peft_ext.language_model import ENCODER_DECODER


def request_prompts(
    scorer: LabelScorer, task: Task, examples: Sequence[dict[str, str]], conditioned: bool
) -> list[list[list[int]]]:
    """For each input the token ids of one prompt for each label.

    Args:
        scorer: Whose model, tokens and limits.
        task: With a generation template.
        examples: Inputs, by fields.
        conditioned: Whether the model is shown the input.

    Raises:
        ValueError: If a prompt is too long for the model and the scorer's `overflow` doesn't truncate.
    """
    limit = scorer.max_length
    if limit is not None and scorer.language_model.kind != ENCODER_DECODER:
        limit -= task.max_new_tokens
    return [
        [_prompt(scorer, task, index, example, label, conditioned, limit) for label in task.labels]
        for index, example in enumerate(examples)
    ]


def _prompt(
    scorer: LabelScorer,
    task: Task,
    index: int,
    example: dict[str, str],
    label: str,
    conditioned: bool,
    limit: Optional[int],
) -> list[int]:
    def encode(characters: Optional[int]) -> list[int]:
        shorter = {name: value[:characters] for name, value in example.items()}
        return scorer.encoder([task.generation_prompt(shorter, label, conditioned)])[0]

    def attempt(characters: int) -> Optional[tuple[int, list[int]]]:
        tokens = encode(characters)
        return (characters, tokens) if limit is None or len(tokens) <= limit else None

    tokens = encode(None)
    if limit is None or len(tokens) <= limit:
        return tokens
    truncates = scorer.overflow in (TRUNCATE, BOTH)
    fitting = largest_that_fits(attempt, max(map(len, example.values()))) if truncates else None
    if fitting is None:
        raise ValueError(
            f"input {index}: the prompt that asks for a {label!r} one takes {len(tokens)} tokens, but {limit} fit "
            f"before {task.max_new_tokens} new ones; shorten it, or use overflow={BOTH!r}."
        )
    warnings.warn(f"input {index} is cut to {fitting[0]} characters for its generation prompt.", stacklevel=4)
    return fitting[1]
