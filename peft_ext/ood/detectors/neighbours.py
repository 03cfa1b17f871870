# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Detectors that look for the nearest training examples: maximum cosine and k-th neighbour."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from peft_ext.file_formats import Tensor, truth, whole
from peft_ext.ood.detectors.base import Detector
from peft_ext.ood.detectors.gaussian import unit_length


_BLOCK_EXAMPLES = 8192  # of the training set, at a time


class KNN(Detector):
    """The negative distance to the k-th nearest training example (Sun et al. 2022,
    https://huggingface.co/papers/2204.06507), by exact search.

    Args:
        k: Which neighbour.
        normalize: Scale features to length 1 first, as in the paper.
    """

    name = "knn"
    needs_logits = False
    params = {"k": whole(1), "normalize": truth()}
    tensors = {"examples": Tensor(("F64",), ("examples", "n"), note="features of the training set")}

    def __init__(self, k: int = 10, normalize: bool = True) -> None:
        self.k, self.normalize = k, normalize

    def _check_params(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k={self.k!r} must be a whole number of at least 1.")

    def _check_sizes(self, sizes: Mapping[str, int], where: str) -> None:
        if self.k > sizes["examples"]:
            raise ValueError(
                f"{where}: examples has {sizes['examples']} rows, fewer than k={self.k}; fit and save the detector again."
            )

    def _fit(self, features, logits, labels) -> dict[str, np.ndarray]:
        if self.k > len(features):
            raise ValueError(
                f"k={self.k} neighbours of {len(features)} training examples don't exist; choose a smaller k."
            )
        return {"examples": unit_length(features) if self.normalize else features}

    def _score(self, features, logits) -> np.ndarray:
        if self.normalize:
            features = unit_length(features)
        squares = (features**2).sum(axis=1, keepdims=True)
        nearest = np.empty((len(features), 0))
        for start in range(0, len(self.state_["examples"]), _BLOCK_EXAMPLES):
            examples = self.state_["examples"][start : start + _BLOCK_EXAMPLES]
            distances = squares - 2 * (features @ examples.T) + (examples**2).sum(axis=1)
            nearest = np.concatenate([nearest, _smallest(distances, self.k)], axis=1)
        return -np.sqrt(np.maximum(_smallest(nearest, self.k).max(axis=1), 0.0))


class MaxCosine(Detector):
    """The largest cosine to a training example, as in the study."""

    name = "cosine"
    needs_logits = False
    tensors = {"examples": Tensor(("F64",), ("examples", "n"), note="features of the training set, of length 1")}

    def _fit(self, features, logits, labels) -> dict[str, np.ndarray]:
        return {"examples": unit_length(features)}

    def _score(self, features, logits) -> np.ndarray:
        features, best = unit_length(features), np.full(len(features), -np.inf)
        for start in range(0, len(self.state_["examples"]), _BLOCK_EXAMPLES):
            cosines = features @ self.state_["examples"][start : start + _BLOCK_EXAMPLES].T
            best = np.maximum(best, cosines.max(axis=1))
        return best


def _smallest(distances: np.ndarray, k: int) -> np.ndarray:
    """The k smallest numbers of each row, or all if there are fewer; in any order."""
    if distances.shape[1] <= k:
        return distances
    # several times faster than np.partition
    return torch.topk(torch.from_numpy(distances), k, dim=1, largest=False, sorted=False).values.numpy()
