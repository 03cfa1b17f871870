# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which layer's states, which pooling and which C: chosen by cross-validation on the training texts alone.

A block is what one layer and pooling give. Blocks are compared by ridge regression on the classes, whose leave-one-out
predictions have a closed form: one eigendecomposition a block, no head is fitted. The head's own C is then chosen by
stratified folds on the block that was taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from generation_ext.probing.heads import Head


Block = tuple[int, str]
# Texts that blocks are compared on, and bytes that their states may take; of more, as many of each class as there is room for.
MOST_TEXTS, MOST_BYTES = 1500, 2**30
# Penalties of the ridge regression, over the mean eigenvalue, and factors from its scores to logits.
_PENALTIES = np.array([0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0])
_FACTORS = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
# The C that are tried, of features of unit variance.
GRIDS = {"logistic": (1e-4, 1e-3, 1e-2, 1e-1, 1.0), "svm": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)}
_FOLDS = 5


def sample(codes: np.ndarray, size: int, itemsize: int = 4) -> np.ndarray:
    """Indices of the texts that blocks are compared on, in their order: all, or an equal share of each class.

    Args:
        codes: Classes as integers from 0, `[texts]`.
        size: Numbers of all blocks of a text.
        itemsize: Bytes of a number.
    """
    room = max(2, min(MOST_TEXTS, MOST_BYTES // (size * itemsize)))
    if len(codes) <= room:
        return np.arange(len(codes))
    own = [np.flatnonzero(codes == code) for code in range(int(codes.max()) + 1)]
    # round after round, a text of each class that has one left
    order = sorted((turn, index) for indices in own for turn, index in enumerate(indices.tolist()))
    return np.sort([index for _, index in order[:room]])


def leave_one_out(features: np.ndarray, codes: np.ndarray, classes: int) -> np.ndarray:
    """Scores of each text by ridge regressions on all others, `[penalties, texts, classes]`.

    Args:
        features: `[texts, size]`; standardised in here.
        codes: Classes as integers from 0, `[texts]`.
        classes: How many.
    """
    features = standardised(features)
    count, size = features.shape
    targets = np.eye(classes)[codes]
    means = targets.mean(0)
    if count <= size:
        values, vectors = np.linalg.eigh(features @ features.T)
    else:
        values, directions = np.linalg.eigh(features.T @ features)
        vectors = features @ directions / np.sqrt(np.maximum(values, 1e-9 * values[-1]))
    values, vectors = np.maximum(values, 0).astype(np.float64), vectors.astype(np.float64)
    inner, squares = vectors.T @ (targets - means), vectors * vectors
    found = []
    for penalty in _PENALTIES:
        shrunk = values / (values + penalty * values.sum() / count + 1e-300)
        fitted = vectors @ (shrunk[:, None] * inner) + means
        # of its own target in each prediction; a text whose prediction is its own target says nothing
        own = np.minimum(squares @ shrunk + 1 / count, 0.999)[:, None]
        found.append((fitted - own * targets) / (1 - own))
    return np.array(found)


def standardised(features: np.ndarray) -> np.ndarray:
    """Of mean 0 and deviation 1, float32."""
    features = np.asarray(features, np.float32)
    scale = features.std(0, dtype=np.float64).astype(np.float32)
    scale[scale < 1e-8] = 1.0
    return (features - features.mean(0, dtype=np.float64).astype(np.float32)) / scale
