# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""N-grams of a text's pieces (tokens or words): how many are different, and how many the text has said before."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Dist-n: different n-grams over all n-grams, of all texts together; NaN if there is none."""
    grams = [gram for pieces in texts for gram in ngrams(pieces, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(texts: Sequence[Sequence[Hashable]], n: int = 3) -> float:
    """Share of n-grams that stood in the same text before, of all texts together; NaN if there is no n-gram."""
    repeated = total = 0
    for pieces in texts:
        grams = ngrams(pieces, n)
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else math.nan


def ngrams(pieces: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All runs of n pieces, in order."""
    return [tuple(pieces[start : start + n]) for start in range(len(pieces) - n + 1)]
