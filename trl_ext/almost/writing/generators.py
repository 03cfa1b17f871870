# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A ladder of generators: whoever stands higher is assumed to answer better, which is what replaces human labels."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

from trl_ext.almost.prompts.roles import load_style


logger = logging.getLogger(__name__)
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Rung:
    """One generator of the ladder.

    Args:
        model: A hub id, a folder or `"smollm2-135m-instruct"`; None: the recipe's own model.
        shots: Demonstrations before the query.
        prompt: `"hhh"`, `"faithful"`, or a JSON file with a preamble and demonstrations.
        bits: Width of its weights, quantised with PEQA: 2, 3, 4 or 8; None: as loaded. Fewer bits make a weaker speaker
            of the same model.
        rank: Where it stands, 0 best; equal ranks are not compared. None: its place in the ladder.
        max_new_tokens: Most tokens of an answer; None: what the stage says.
        group_size: Inputs that share a scale where there are `bits`; -1: all of a channel's.

    Raises:
        ValueError: If a value is out of its range.
    """

    model: Optional[str] = None
    shots: int = 3
    prompt: str = "hhh"
    bits: Optional[int] = None
    rank: Optional[int] = None
    max_new_tokens: Optional[int] = None
    group_size: int = 64

    def __post_init__(self) -> None:
        style = load_style(self.prompt)
        if not 0 <= self.shots <= len(style.demonstrations):
            raise ValueError(
                f"shots={self.shots} must be between 0 and {len(style.demonstrations)}, the demonstrations of "
                f"prompt={self.prompt!r}."
            )
        if self.bits is not None and self.bits not in BITS:
            raise ValueError(f"bits={self.bits} must be one of {BITS}, or not be given.")
        if self.rank is not None and self.rank < 0:
            raise ValueError(f"rank={self.rank} must not be negative; 0 is the best.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be positive.")

    @property
    def name(self) -> str:
        """As tables show it."""
        bits = "" if self.bits is None else f", {self.bits} bits"
        return f"{self.model or 'the model'}{bits}, {self.prompt} {self.shots}-shot"


def parse_ladder(rungs: Sequence[Union[Rung, str, Mapping[str, Any]]]) -> list[Rung]:
    """A ladder, best first.

    Args:
        rungs: Mappings of [`Rung`]'s fields, as in YAML, or strings of them, as in a flag: `"prompt=hhh,shots=1,bits=2"`.

    Returns:
        Rungs that all have a rank.

    Raises:
        ValueError: If there are fewer than two ranks, a rung occurs twice, or a field is unknown.
    """
    ladder = [_rung(rung, place) for place, rung in enumerate(rungs)]
    if len({rung.rank for rung in ladder}) < 2:
        raise ValueError(f"ladder has {len(ladder)} rungs of one rank; a comparison needs at least two ranks.")
    bare = [dataclasses.replace(rung, rank=None) for rung in ladder]
    for place, rung in enumerate(bare):
        if rung in bare[:place]:
            raise ValueError(
                f"ladder: rungs {bare.index(rung)} and {place} are the same ({rung.name}); leave one out."
            )
    _warn_of_order(ladder)
    return ladder


def _rung(value: Union[Rung, str, Mapping[str, Any]], place: int) -> Rung:
    if isinstance(value, Rung):
        return value if value.rank is not None else dataclasses.replace(value, rank=place)
    fields: dict[str, Any] = dict(_assignments(value) if isinstance(value, str) else value)
    known = [field.name for field in dataclasses.fields(Rung)]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ValueError(f"ladder: rung {place} has a field {unknown[0]!r}; the fields are {known}.")
    if fields.get("rank") is None:
        fields["rank"] = place
    try:
        return Rung(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"ladder: rung {place}: {error}") from error


def _assignments(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for part in text.split(","):
        name, sign, value = part.strip().partition("=")
        if not sign:
            raise ValueError(f"ladder: rung {text!r} must look like 'prompt=hhh,shots=1,bits=2'.")
        fields[name] = value if name in ("model", "prompt") else int(value) if value.lstrip("-").isdigit() else value
    return fields


def _warn_of_order(ladder: Sequence[Rung]) -> None:
    """More shots of one prompt, or more bits, are better (the paper's rules); say where a ladder has it the other way."""
    for better in ladder:
        for worse in ladder:
            if (better.rank or 0) >= (worse.rank or 0) or better.model != worse.model or better.prompt != worse.prompt:
                continue
            if better.shots <= worse.shots and (better.bits or 16) <= (worse.bits or 16):
                logger.warning(
                    "ladder: %s stands above %s, which has as many shots and bits.", better.name, worse.name
                )
