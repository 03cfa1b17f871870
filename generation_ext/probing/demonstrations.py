# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which training texts stand before the others as demonstrations, and in which orders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from generation_ext.probing.features import FeatureExtractor
from generation_ext.prompts import Task


NONE, PER_CLASS = DEMONSTRATIONS = ("none", "per-class")


def nearest_to_means(features: np.ndarray, codes: np.ndarray) -> list[int]:
    """Of each class the sample nearest to its mean; their indices, class by class."""
    found = []
    for code in range(int(codes.max()) + 1):
        own = np.flatnonzero(codes == code)
        distances = ((features[own] - features[own].mean(0)) ** 2).sum(1)
        found.append(int(own[distances.argmin()]))
    return found


def prefix_of(task: Task, shown: Sequence[tuple[Any, Any]]) -> str:
    """Texts with their classes, as they stand before another text."""
    return "".join(task.demonstration(*each) + task.separator for each in shown)


def check_room(extractor: Any, prefix: str, classes: int) -> None:
    """Refuse demonstrations that leave no room for a text.

    Raises:
        ValueError: Says how many tokens there are, and what to do.
    """
    if not isinstance(extractor, FeatureExtractor) or extractor.max_length is None:
        return
    taken = len(extractor.encoder([prefix])[0])
    if taken >= extractor.max_length:
        raise ValueError(
            f"the demonstrations of {classes} classes take {taken} tokens, but the model takes {extractor.max_length}, "
            "texts included; use demonstrations='none', or shorter texts."
        )


def orders(count: int, most: int, rng: Any) -> list[Sequence[int]]:
    """The identity first, then others at random; all of them if there are at most `most`."""
    if count <= 8 and math.factorial(count) <= most:
        return list(itertools.permutations(range(count)))
    found: dict[tuple[int, ...], None] = {tuple(range(count)): None}
    while len(found) < most:
        found[tuple(rng.permutation(count).tolist())] = None
    return list(found)
