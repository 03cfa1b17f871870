# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Detectors that model features by Gaussians: Mahalanobis distance, relative Mahalanobis distance, and the angle that goes
with the first."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
from scipy.linalg import eigh
from sklearn.covariance import empirical_covariance, ledoit_wolf

from peft_ext.file_formats import Field, Tensor, number, text, truth
from peft_ext.ood.detectors.base import Detector


COVARIANCES = ("ledoit_wolf", "empirical")


class Mahalanobis(Detector):
    """The negative squared Mahalanobis distance to the nearest class mean, under one covariance that all classes share
    (Lee et al. 2018, https://huggingface.co/papers/1807.03888).

    Args:
        covariance: `"ledoit_wolf"` shrinks the covariance of the class-centred features, as the study did; `"empirical"`
            takes it as it is, which needs more examples than features.
        normalize: Scale features to length 1 first, as the study did.
    """

    name = "mahalanobis"
    needs_logits = False
    params: Mapping[str, Field] = {"covariance": text(*COVARIANCES), "normalize": truth()}
    tensors: Mapping[str, Tensor] = {
        "whitening": Tensor(("F64",), ("n", "n"), note="to features whose covariance is the identity"),
        "means": Tensor(("F64",), ("classes", "n"), note="the classes' means there"),
    }

    def __init__(self, covariance: str = "ledoit_wolf", normalize: bool = True) -> None:
        self.covariance, self.normalize = covariance, normalize

    def predict(self, features: Any) -> np.ndarray:
        """The index of the nearest class mean `[examples]`, in the sorted order of the labels: a classifier of its
        own."""
        if not hasattr(self, "state_"):
            raise ValueError(f"this {type(self).__name__} isn't fitted yet; call fit(features, logits, labels) first.")
        matrix = self._checked(features, "features", self.n_features_, single=False).astype(np.float64)
        return self._distances(matrix).argmin(axis=1)

    def _check_params(self) -> None:
        if self.covariance not in COVARIANCES:
            raise ValueError(f"covariance={self.covariance!r} is unknown; choose one of {COVARIANCES}.")

    def _fit(self, features, logits, labels) -> dict[str, np.ndarray]:
        features = self._prepared(features)
        means, centred = _class_means(features, labels)
        whitening = _whitening(centred, self.covariance, "the class-centred features")
        return {"whitening": whitening, "means": means @ whitening}

    def _score(self, features, logits) -> np.ndarray:
        return -self._distances(features).min(axis=1)

    def _distances(self, features: np.ndarray) -> np.ndarray:
        """Squared distances to all means `[rows, classes]`."""
        return _squared(self._prepared(features) @ self.state_["whitening"], self.state_["means"])

    def _prepared(self, features: np.ndarray) -> np.ndarray:
        return unit_length(features) if self.normalize else features


class RelativeMahalanobis(Mahalanobis):
    """The Mahalanobis distance to the nearest class less that to all training data, negative (Ren et al. 2021,
    https://huggingface.co/papers/2106.09022): what is unusual for every class alike no longer counts.

    Args:
        covariance, normalize: As [`Mahalanobis`].
    """

    name = "relative_mahalanobis"
    tensors = {
        **Mahalanobis.tensors,
        "background_whitening": Tensor(("F64",), ("n", "n"), note="the same for all examples together"),
        "background_mean": Tensor(("F64",), (1, "n")),
    }

    def _fit(self, features, logits, labels) -> dict[str, np.ndarray]:
        state = super()._fit(features, logits, labels)
        features = self._prepared(features)
        mean = features.mean(axis=0, keepdims=True)
        background = _whitening(features - mean, self.covariance, "the features")
        return {**state, "background_whitening": background, "background_mean": mean @ background}

    def _score(self, features, logits) -> np.ndarray:
        prepared = self._prepared(features)
        background = _squared(prepared @ self.state_["background_whitening"], self.state_["background_mean"])
        return background[:, 0] - self._distances(features).min(axis=1)


class MahalanobisCosine(Detector):
    """The largest cosine to a class's mean where the covariance that all classes share is the identity, angles seen from the
    mean of all training examples: the angle that goes with the Mahalanobis distance.

    A few directions that carry most of the variance (of causal models' states they do) are divided by it, as in the distance;
    what only makes an example longer no longer counts. Features are scaled to length 1 first.

    Args:
        shrinkage: How far the covariance is drawn to a multiple of the identity, above 0 up to 1, which is the identity. The
            default was chosen on validation texts of CLINC150, for MiniLM tuned and as it is, and SmolLM2: more of it
            is better on the one, less on the other, by half a point each.
    """

    name = "mahalanobis_cosine"
    needs_logits = False
    params: Mapping[str, Field] = {"shrinkage": number(above=0, most=1)}
    tensors: Mapping[str, Tensor] = {
        "centre": Tensor(("F64",), (1, "n"), note="the mean of all examples"),
        "whitening": Tensor(("F64",), ("n", "n"), note="to features whose shrunk covariance is the identity"),
        "means": Tensor(("F64",), ("classes", "n"), note="the classes' directions there, of length 1"),
    }

    def __init__(self, shrinkage: float = 0.6) -> None:
        self.shrinkage = shrinkage

    def _check_params(self) -> None:
        if isinstance(self.shrinkage, bool) or not 0 < self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage!r} must be greater than 0 and at most 1.")

    def _fit(self, features, logits, labels) -> dict[str, np.ndarray]:
        features = unit_length(features)
        means, centred = _class_means(features, labels)
        centre = features.mean(axis=0, keepdims=True)
        values, vectors = eigh(empirical_covariance(centred, assume_centered=True))
        if values[-1] <= 0:
            raise ValueError("all examples of a class have the same features, so nothing tells how classes spread.")
        shrunk = (1 - self.shrinkage) * np.maximum(values, 0) + self.shrinkage * values.mean()
        whitening = vectors / np.sqrt(shrunk)
        return {"centre": centre, "whitening": whitening, "means": unit_length((means - centre) @ whitening)}

    def _score(self, features, logits) -> np.ndarray:
        whitened = (unit_length(features) - self.state_["centre"]) @ self.state_["whitening"]
        return (unit_length(whitened) @ self.state_["means"].T).max(axis=1)


def unit_length(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays one."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norms == 0, 1.0, norms)


def _class_means(features: np.ndarray, labels: Optional[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Means `[classes, size]` in the labels' sorted order, and the features less their class's mean."""
    if labels is None:
        raise ValueError("this detector needs labels; pass labels=... .")
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) == len(features):
        raise ValueError(
            f"every one of the {len(classes)} classes has a single example, so nothing tells how classes spread; pass at "
            "least two examples of some class."
        )
    single = classes[counts == 1]
    if len(single):
        warnings.warn(
            f"{len(single)} classes have a single example, such as {single[0]!r}: it is their mean, and adds nothing to "
            "the covariance.",
            stacklevel=5,
        )
    means = np.zeros((len(classes), features.shape[1]))
    np.add.at(means, index, features)
    means /= counts[:, None]
    return means, features - means[index]


def _whitening(centred: np.ndarray, covariance: str, what: str) -> np.ndarray:
    """W `[size, rank]` with `|x W|^2 = x^T P x`, P the precision.

    Raises:
        ValueError: If the covariance is singular.
    """
    if covariance == "ledoit_wolf":
        matrix = ledoit_wolf(centred, assume_centered=True)[0]
    else:
        matrix = empirical_covariance(centred, assume_centered=True)
    values, vectors = eigh(matrix)
    rank = int((values > values[-1] * len(values) * np.finfo(np.float64).eps).sum()) if values[-1] > 0 else 0
    if rank < len(values):
        advice = (
            "all examples of a class have the same features"
            if rank == 0
            else "pass covariance='ledoit_wolf', or more examples than features"
        )
        raise ValueError(f"the covariance of {what} is singular (rank {rank} of {len(values)}): {advice}.")
    return vectors / np.sqrt(values)


def _squared(points: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances `[points, means]`."""
    products = (points**2).sum(axis=1, keepdims=True) - 2 * points @ means.T + (means**2).sum(axis=1)
    return np.maximum(products, 0.0)
