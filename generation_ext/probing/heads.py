# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Classifiers on features. scikit-learn fits them; what is kept are plain arrays, which safetensors can hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Optional

import numpy as np

from generation_ext.probing.ridge import PENALTIES, Ridges
from peft_ext.file_formats import Tensor


_FLOATS = ("F64", "F32")
# In the place of what is to be chosen.
AUTO = "auto"


class Head:
    """A fitted classifier: arrays, and scores from them.

    Args:
        arrays: What `fit` found.

    Attributes:
        name: As users say it.
        defaults: For scikit-learn's class.
        grid: The C that are tried where it is to be chosen; empty for a head that has none.
    """

    name: str
    defaults: Mapping[str, Any]
    grid: tuple[float, ...] = ()

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)

    @classmethod
    def tensors(cls, names: Collection[str]) -> dict[str, Tensor]:
        """What a file holds of the head; `n`: size of the features.

        Args:
            names: The tensors that are there, which tell the depth of a network.
        """
        return {
            "weight": Tensor(_FLOATS, ("classes", "n"), note="of the linear function"),
            "bias": Tensor(_FLOATS, ("classes",)),
        }

    def check(self, classes: int, where: str) -> None:
        """Refuse arrays of a file whose numbers don't go together; raises ValueError that begins with `where`."""

    @classmethod
    def fit(
        cls, features: np.ndarray, codes: np.ndarray, classes: int, params: Mapping[str, Any], seed: Optional[int]
    ) -> Head:
        """Fit to standardised features.

        Args:
            features: `[samples, size]`.
            codes: Classes as integers from 0, `[samples]`.
            classes: How many.
            params: Beside `defaults`, for scikit-learn's class.
            seed: Of what is random.
        """
        raise TypeError(f"{cls.__name__} is the base of heads.")

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Logits `[samples, classes]`: their softmax is `predict_proba`."""
        return features @ self.arrays["weight"].T + self.arrays["bias"]


class Logistic(Head):
    """Logistic regression."""

    name = "logistic"
    defaults: Mapping[str, Any] = {"C": 0.1, "max_iter": 1000}
    grid = (1e-3, 1e-2, 1e-1, 1.0, 10.0)

    @classmethod
    def fit(
        cls, features: np.ndarray, codes: np.ndarray, classes: int, params: Mapping[str, Any], seed: Optional[int]
    ) -> Head:
        from sklearn.linear_model import LogisticRegression

        fitted = LogisticRegression(**{**cls.defaults, "random_state": seed, **params}).fit(features, codes)
        return cls(_linear(fitted.coef_, fitted.intercept_, two=(0.0, 1.0)))


class Ridge(Head):
    """Ridge regression on the classes: a mean over penalties, and over factors that make logits of it, each weighted by how
    likely it finds texts that it wasn't fitted on. Nothing is left to tune."""

    name = "ridge"
    defaults: Mapping[str, Any] = {"penalties": PENALTIES}

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        codes: np.ndarray,
        classes: int,
        params: Mapping[str, Any],
        seed: Optional[int],
        forms: int = 1,
        known: bool = False,
        silent: Collection[int] = (),
    ) -> Ridge:
        """Fit to standardised features.

        Args:
            features, codes, classes, seed: See [`Head.fit`]; nothing is random.
            params: `penalties` over the mean eigenvalue of the features, positive numbers.
            forms: Rows that each text has, see [`Ridges`].
            known: Whether the last columns, as many as classes, are scores that are known beforehand: they are added in
                one share, which is weighted as the penalties are.
            silent: Indices of texts that don't weight them: demonstrations, whose class stands before them.
        """
        penalties = list(np.atleast_1d({**cls.defaults, **params}["penalties"]))
        unknown = sorted(set(params) - set(cls.defaults))
        if unknown or not penalties or not all(isinstance(each, (int, float)) and each > 0 for each in penalties):
            raise ValueError(
                f"head_params={dict(params)}: head='ridge' takes penalties, positive numbers, alone; C is for "
                "head='logistic'."
            )
        size, texts = features.shape[1] - classes * known, len(features) // forms
        ridges = Ridges(features[:, :size], codes[:texts], classes, forms, penalties)
        found = ridges.weighted(features[:texts, size:] if known else None, silent)
        weight = found.weight
        if known:
            weight = np.concatenate([weight, found.share * np.eye(classes, dtype=weight.dtype)], 1)
        return cls({"weight": weight, "bias": found.bias})


class SVM(Head):
    """A linear support vector machine, one class against the rest; its margins count as logits, uncalibrated."""

    name = "svm"
    defaults: Mapping[str, Any] = {"C": 1e-3, "max_iter": 10000}
    grid = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

    @classmethod
    def fit(
        cls, features: np.ndarray, codes: np.ndarray, classes: int, params: Mapping[str, Any], seed: Optional[int]
    ) -> Head:
        from sklearn.svm import LinearSVC

        fitted = LinearSVC(**{**cls.defaults, "random_state": seed, **params}).fit(features, codes)
        return cls(_linear(fitted.coef_, fitted.intercept_, two=(-1.0, 1.0)))


class GDA(Head):
    """Gaussians with a mean for each class, one covariance (Ledoit-Wolf) and equal priors."""

    name = "gda"
    defaults: Mapping[str, Any] = {}

    @classmethod
    def fit(
        cls, features: np.ndarray, codes: np.ndarray, classes: int, params: Mapping[str, Any], seed: Optional[int]
    ) -> Head:
        from sklearn.covariance import LedoitWolf

        means = np.stack([features[codes == code].mean(0) for code in range(classes)])
        centred = features - means[codes]
        # one sample a class leaves nothing to estimate: the nearest mean
        inverse = np.eye(features.shape[1])
        if np.abs(centred).max() > 1e-9:
            inverse = LedoitWolf(**{**params, "assume_centered": True}).fit(centred).precision_
        weight = means @ inverse
        return cls({"weight": weight, "bias": -0.5 * (weight * means).sum(1)})


class KNN(Head):
    """Nearest neighbours; a probability is the share of votes, with a little of one for each class."""

    name = "knn"
    defaults: Mapping[str, Any] = {"n_neighbors": 3}

    @classmethod
    def tensors(cls, names: Collection[str]) -> dict[str, Tensor]:
        return {
            "features": Tensor(_FLOATS, ("samples", "n"), note="of the training samples"),
            "codes": Tensor(("I64",), ("samples",), least=0, note="their classes"),
            "sizes": Tensor(("I64",), (2,), least=1, note="number of neighbours, and of classes"),
        }

    def check(self, classes: int, where: str) -> None:
        stored, largest = int(self.arrays["sizes"][1]), int(self.arrays["codes"].max())
        if stored != classes or largest >= classes:
            raise ValueError(
                f"{where}: head.sizes says {stored} classes and head.codes goes up to {largest}, but there are {classes}; "
                "fit and save the classifier again."
            )

    @classmethod
    def fit(
        cls, features: np.ndarray, codes: np.ndarray, classes: int, params: Mapping[str, Any], seed: Optional[int]
    ) -> Head:
        neighbors = {**cls.defaults, **params}["n_neighbors"]
        unknown = sorted(set(params) - set(cls.defaults))
        if unknown or not isinstance(neighbors, int) or neighbors < 1:
            raise ValueError(f"head_params={dict(params)}: head='knn' takes n_neighbors, a positive integer, alone.")
        sizes = np.array([neighbors, classes])
        return cls({"features": features, "codes": codes.astype(np.int64), "sizes": sizes})

    def scores(self, features: np.ndarray) -> np.ndarray:
        from sklearn.neighbors import NearestNeighbors

        known, (neighbors, classes) = self.arrays["codes"], self.arrays["sizes"]
        finder = NearestNeighbors(n_neighbors=min(int(neighbors), len(known))).fit(self.arrays["features"])
        distances, nearest = finder.kneighbors(features)
        votes = np.full((len(features), classes), 1e-3)
        for row, each in zip(votes, known[nearest]):
            np.add.at(row, each, 1.0)
        # of equal votes, the nearest neighbour's
        votes[np.arange(len(votes)), known[nearest[:, 0]]] += 1e-6
        return np.log(votes)


class MLP(Head):
    """A network of one hidden layer."""

    name = "mlp"
    defaults: Mapping[str, Any] = {"hidden_layer_sizes": (128,), "alpha": 10.0, "max_iter": 300}

    @classmethod
    def tensors(cls, names: Collection[str]) -> dict[str, Tensor]:
        depth = max(1, *(sum(name.startswith(part) for name in names) for part in ("weight.", "bias.")))
        sizes = ["n", *(f"h{i}" for i in range(1, depth)), "classes"]
        described: dict[str, Tensor] = {}
        for i in range(depth):
            described[f"weight.{i}"] = Tensor(_FLOATS, (sizes[i + 1], sizes[i]), note=f"of layer {i}")
            described[f"bias.{i}"] = Tensor(_FLOATS, (sizes[i + 1],))
        return described

    @classmethod
    def fit(
        cls, features: np.ndarray, codes: np.ndarray, classes: int, params: Mapping[str, Any], seed: Optional[int]
    ) -> Head:
        from sklearn.neural_network import MLPClassifier

        settings = {**cls.defaults, "random_state": seed, **params}
        if settings.get("activation", "relu") != "relu":
            raise ValueError(f"head_params: activation={settings['activation']!r} is not kept here; leave it out.")
        fitted = MLPClassifier(**settings).fit(features, codes)
        arrays = {f"weight.{i}": weight.T for i, weight in enumerate(fitted.coefs_)}
        arrays.update({f"bias.{i}": bias for i, bias in enumerate(fitted.intercepts_)})
        last = len(fitted.coefs_) - 1
        if classes == 2:
            ends = _linear(arrays[f"weight.{last}"], arrays[f"bias.{last}"], two=(0.0, 1.0))
            arrays[f"weight.{last}"], arrays[f"bias.{last}"] = ends["weight"], ends["bias"]
        return cls(arrays)

    def scores(self, features: np.ndarray) -> np.ndarray:
        layers = len(self.arrays) // 2
        for i in range(layers):
            features = features @ self.arrays[f"weight.{i}"].T + self.arrays[f"bias.{i}"]
            features = np.maximum(features, 0) if i < layers - 1 else features
        return features


HEADS: dict[str, type[Head]] = {head.name: head for head in (Ridge, Logistic, SVM, GDA, KNN, MLP)}


def _linear(weight: np.ndarray, bias: np.ndarray, two: tuple[float, float]) -> dict[str, np.ndarray]:
    """A row for each class; scikit-learn has one row for two classes."""
    if len(weight) == 1:
        weight, bias = (np.outer(two, weight[0]), np.multiply(two, bias[0]))
    return {"weight": weight, "bias": bias}
