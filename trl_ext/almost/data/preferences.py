# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Preference data in any of TRL's formats as pairs: a prompt, and what follows it in either answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trl import extract_prompt

from trl_ext.almost.prompts.chat import ASSISTANT, HUMAN, as_messages, dialogue


_SIDES = ("chosen", "rejected")


def preference_pairs(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with `prompt`, `chosen` and `rejected`, each a string or messages; the answers without the prompt.

    A prompt that is implicit, being the beginning of both answers, is told from them: of conversations by their turns, of
    texts in Anthropic's format ("\\n\\nHuman: ...\\n\\nAssistant: ...", hh-rlhf) likewise, of other texts by TRL's
    `extract_prompt`. Answers that are whole conversations beside a prompt of their own (UltraFeedback) lose it.

    Args:
        rows: With `chosen` and `rejected`, and perhaps `prompt`; other columns stay.

    Raises:
        ValueError: If a column is missing, or the two answers don't belong to one prompt; names row and column.
    """
    return [_pair(row, number) for number, row in enumerate(rows)]


def _pair(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    for side in _SIDES:
        if row.get(side) is None:
            raise ValueError(f"row {number} has no {side!r}, only {sorted(row)}; pairs have 'chosen' and 'rejected'.")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"row {number}: 'chosen' and 'rejected' must both be texts, or both be messages.")
    prompt = row.get("prompt")
    if isinstance(chosen, str):
        if prompt:
            return dict(row)
        if HUMAN not in chosen and ASSISTANT not in chosen:
            return _nonempty({**row, **extract_prompt({"chosen": chosen, "rejected": rejected})}, number)
        chosen, rejected = dialogue(chosen), dialogue(rejected)
    return _of_conversations(row, number, prompt, chosen, rejected)


def _of_conversations(
    row: Mapping[str, Any], number: int, prompt: Any, chosen: list[Any], rejected: list[Any]
) -> dict[str, Any]:
    if not prompt:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt = chosen[:shared]
    begun = as_messages(prompt) if prompt else []
    answers = [
        side[len(begun) :] if len(side) > 1 and list(side[: len(begun)]) == begun else side
        for side in (chosen, rejected)
    ]
    for side, answer in zip(_SIDES, answers):
        if len(answer) != 1 or answer[0].get("role") != "assistant":
            raise ValueError(
                f"row {number}: {side!r} doesn't end in one turn of the assistant after a prompt that both answers share; "
                f"it has the roles {[message.get('role') for message in answer]} behind {len(begun)} shared turns."
            )
    return _nonempty({**row, "prompt": prompt, "chosen": answers[0], "rejected": answers[1]}, number)


def _nonempty(pair: dict[str, Any], number: int) -> dict[str, Any]:
    if not pair["prompt"]:
        raise ValueError(
            f"row {number} has no 'prompt', and 'chosen' and 'rejected' don't begin alike, so there is none in them."
        )
    return pair
