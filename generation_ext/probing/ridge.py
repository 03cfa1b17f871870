# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Ridge regressions on classes under several penalties: what each says of a text that it wasn't fitted on, in closed form, and
their mean by how well they say it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Optional

import numpy as np


# Over the mean eigenvalue.
PENALTIES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
# From a regression's scores to logits.
FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
# What scores that are known beforehand may be multiplied with, before they are added.
_SHARES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
# From here on, a prediction is its own target.
_SATURATED = 0.999
# Up to this size, eigenvalues are computed in double precision: it costs nothing.
_SMALL = 512


class Weighted(NamedTuple):
    """A mean of linear classifiers, which is one.

    Attributes:
        weight: `[classes, size]`.
        bias: `[classes]`.
        share: Of scores that were known beforehand.
        log_probability: Of the right class by the best of them, mean over texts that were left out.
    """

    weight: np.ndarray
    bias: np.ndarray
    share: float
    log_probability: float


class Ridges:
    """Ridge regressions of classes on features, one for each penalty; one eigendecomposition for all.

    Args:
        features: `[forms * texts, size]`, of mean 0: all texts in the first form (behind one order of demonstrations), then
            in the second.
        codes: Classes as integers from 0, `[texts]`.
        classes: How many.
        forms: Rows that a text has; what is left out is a text in all its forms.
        penalties: Over the mean eigenvalue.
    """

    def __init__(
        self,
        features: np.ndarray,
        codes: np.ndarray,
        classes: int,
        forms: int = 1,
        penalties: Sequence[float] = PENALTIES,
    ) -> None:
        self._features = np.asarray(features, np.float32)
        self._codes, self._forms = codes, forms
        rows, size = self._features.shape
        self._targets = np.eye(classes)[np.tile(codes, forms)]
        self._means = self._targets.mean(0)
        self._directions: Optional[np.ndarray] = None
        if rows <= size:
            values, vectors = _eigen(self._features @ self._features.T)
        else:
            values, self._directions = _eigen(self._features.T @ self._features)
            # the same state in all texts (the embedding of a template's last token) has no direction
            floor = max(1e-9 * values[-1], 1e-30)
            vectors = self._features @ self._directions / np.sqrt(np.maximum(values, floor))
        self._values, self._vectors = np.maximum(values, 0).astype(np.float64), vectors.astype(np.float64)
        self._inner = self._vectors.T @ (self._targets - self._means)
        self._levels = np.asarray(penalties, np.float64) * self._values.sum() / rows + 1e-300

    def left_out(self) -> np.ndarray:
        """Scores of each text, in its first form, by regressions on all others, `[penalties, texts, classes]`."""
        return np.array([self._left_out(self._values / (self._values + level)) for level in self._levels])

    def _left_out(self, shrunk: np.ndarray) -> np.ndarray:
        texts, forms = len(self._codes), self._forms
        wrong = self._targets - self._vectors @ (shrunk[:, None] * self._inner) - self._means
        targets = self._targets[:texts]
        if forms == 1:
            own = (self._vectors * self._vectors) @ shrunk + 1 / texts
            held = wrong / np.maximum(1 - own, 1 - _SATURATED)[:, None]
        else:
            by_form = self._vectors.reshape(forms, texts, -1).transpose(1, 0, 2)
            inside = (by_form * shrunk) @ by_form.transpose(0, 2, 1) + 1 / len(self._targets)
            own = np.linalg.eigvalsh(inside)[:, -1]
            kept = np.eye(forms) * np.maximum(1.0, own + 1 - _SATURATED)[:, None, None] - inside
            held = np.linalg.solve(kept, wrong.reshape(forms, texts, -1).transpose(1, 0, 2))[:, 0]
        # a text whose prediction is its own target says nothing
        return np.where((own > _SATURATED)[:, None], self._means, targets - held)

    def solution(self, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weight `[classes, size]` and bias `[classes]` of the sum of all regressions, each times its factor."""
        factors = np.asarray(factors, np.float64)
        inverse = (factors[:, None] / (self._values + self._levels[:, None])).sum(0)[:, None]
        if self._directions is None:
            weight = self._features.T @ (self._vectors @ (inverse * self._inner)).astype(np.float32)
        else:
            scaled = inverse * np.sqrt(self._values)[:, None] * self._inner
            weight = self._directions @ scaled.astype(np.float32)
        return np.ascontiguousarray(weight.T), factors.sum() * self._means

    def weighted(self, known: Optional[np.ndarray] = None, silent: Collection[int] = ()) -> Weighted:
        """The mean of all regressions, factors to logits and shares of known scores, each weighted by the likelihood of the
        texts that it wasn't fitted on: of few texts many have a part, of many texts the best one.

        Args:
            known: Scores that don't come of the classes, `[texts, classes]`, which are added in some share.
            silent: Indices of texts whose likelihood says nothing, because their class stands before them.
        """
        judged = np.setdiff1d(np.arange(len(self._codes)), list(silent))
        if len(set(self._codes[judged].tolist())) < len(self._means):
            judged = np.arange(len(self._codes))
        codes = self._codes[judged]
        left_out = self.left_out()
        shares = (0.0,) if known is None else _SHARES
        found = np.empty((len(left_out), len(FACTORS), len(shares)))
        for place, share in enumerate(shares):
            beside = 0.0 if known is None or not share else share * known
            for penalty, scores in enumerate(left_out):
                for number, factor in enumerate(FACTORS):
                    found[penalty, number, place] = log_probability((factor * scores + beside)[judged], codes)
        weights = np.exp(len(judged) * (found - found.max()))
        weights /= weights.sum()
        weight, bias = self.solution((weights.sum(2) * FACTORS).sum(1))
        return Weighted(weight, bias, float((weights.sum((0, 1)) * shares).sum()), float(found.max()))


def log_probability(scores: np.ndarray, codes: np.ndarray) -> float:
    """Of the right class, mean over texts, where `scores` `[texts, classes]` are logits."""
    scores = scores - scores.max(1, keepdims=True)
    return float((scores[np.arange(len(codes)), codes] - np.log(np.exp(scores).sum(1))).mean())


def _eigen(product: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.linalg.eigh(product.astype(np.float64) if len(product) <= _SMALL else product)
