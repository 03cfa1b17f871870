# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Generators and their ranks: whoever has the better rank is assumed to answer better, which is what replaces human
labels."""

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
class Generator:
    """Who answers: a model, as it is or quantised, and what it is shown.

    Args:
        model: A hub id, a folder or `"smollm2-135m-instruct"`; None: the recipe's own model.
        shots: Demonstrations before the query.
        prompt: `"hhh"`, `"faithful"`, or a JSON file with a preamble and demonstrations.
        bits: Width of its weights, quantised with PEQA: 2, 3, 4 or 8; None: as loaded. Fewer bits make a weaker speaker
            of the same model.
        rank: 0 best; equal ranks are not compared. None: its place in the list.
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


def parse_generators(values: Sequence[Union[Generator, str, Mapping[str, Any]]]) -> list[Generator]:
    """Generators, best first.

    Args:
        values: Mappings of [`Generator`]'s fields, as in YAML, or strings of them, as in a flag:
            `"prompt=hhh,shots=1,bits=2"`.

    Returns:
        Generators that all have a rank.

    Raises:
        ValueError: If there are fewer than two ranks, a generator occurs twice, or a field is unknown.
    """
    generators = [_generator(value, number) for number, value in enumerate(values)]
    if len({generator.rank for generator in generators}) < 2:
        raise ValueError(f"generators: {len(generators)} of one rank; a comparison needs at least two ranks.")
    unranked = [dataclasses.replace(generator, rank=None) for generator in generators]
    for number, generator in enumerate(unranked):
        first = unranked.index(generator)
        if first < number:
            raise ValueError(f"generators: {first} and {number} are the same ({generator.name}); leave one out.")
    _warn_of_order(generators)
    return generators


def _generator(value: Union[Generator, str, Mapping[str, Any]], number: int) -> Generator:
    if isinstance(value, Generator):
        return value if value.rank is not None else dataclasses.replace(value, rank=number)
    fields: dict[str, Any] = dict(_assignments(value) if isinstance(value, str) else value)
    names = [field.name for field in dataclasses.fields(Generator)]
    unknown = [name for name in fields if name not in names]
    if unknown:
        raise ValueError(f"generators: generator {number} has a field {unknown[0]!r}; the fields are {names}.")
    if fields.get("rank") is None:
        fields["rank"] = number
    try:
        return Generator(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"generators: generator {number}: {error}") from error


def _assignments(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for part in text.split(","):
        name, sign, value = part.strip().partition("=")
        if not sign:
            raise ValueError(f"generators: {text!r} must look like 'prompt=hhh,shots=1,bits=2'.")
        fields[name] = value if name in ("model", "prompt") else int(value) if value.lstrip("-").isdigit() else value
    return fields


def _warn_of_order(generators: Sequence[Generator]) -> None:
    """More shots of one prompt, or more bits, are better (the paper's rules); say where the ranks have it otherwise."""
    for better in generators:
        for worse in generators:
            if (better.rank or 0) >= (worse.rank or 0) or better.model != worse.model or better.prompt != worse.prompt:
                continue
            if better.shots <= worse.shots and (better.bits or 16) <= (worse.bits or 16):
                logger.warning(
                    "generators: %s ranks above %s, which has as many shots and bits.", better.name, worse.name
                )
