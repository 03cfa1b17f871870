# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Heads give scikit-learn's answers from plain arrays."""

from __future__ import annotations

import numpy as np
import pytest


pytest.importorskip("sklearn", reason="heads are fitted by scikit-learn")
from sklearn.covariance import LedoitWolf  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402
from sklearn.neural_network import MLPClassifier  # noqa: E402
from sklearn.svm import LinearSVC  # noqa: E402

from generation_ext.probing.heads import HEADS  # noqa: E402


def data(classes, size=6, count=40):
    rng = np.random.default_rng(classes)
    codes = np.arange(count) % classes
    features = rng.normal(size=(count, size)) + 1.5 * rng.normal(size=(classes, size))[codes]
    return features, codes, rng.normal(size=(50, size)) * 2


def softmax(scores):
    odds = np.exp(scores - scores.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize(
    "name, theirs",
    [
        ("logistic", lambda: LogisticRegression(C=0.3, max_iter=1000)),
        ("mlp", lambda: MLPClassifier((8, 4), alpha=0.1, max_iter=50, random_state=3)),
    ],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_probabilities_are_scikit_learns(name, theirs, classes):
    features, codes, other = data(classes)
    fitted = theirs()
    params = {name: fitted.get_params()[name] for name in ("C", "max_iter", "alpha") if hasattr(fitted, name)}
    if name == "mlp":
        params["hidden_layer_sizes"] = (8, 4)
    ours = HEADS[name].fit(features, codes, classes, params, 3)
    np.testing.assert_allclose(
        softmax(ours.scores(other)), fitted.fit(features, codes).predict_proba(other), atol=1e-6
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_svm_has_scikit_learns_margins(classes):
    features, codes, other = data(classes)
    ours = HEADS["svm"].fit(features, codes, classes, {"C": 0.1}, 0).scores(other)
    theirs = LinearSVC(C=0.1, max_iter=10000, random_state=0).fit(features, codes)
    margins = theirs.decision_function(other)
    np.testing.assert_allclose(ours[:, 1] if classes == 2 else ours, margins, atol=1e-9)
    assert (ours.argmax(1) == theirs.predict(other)).all()


@pytest.mark.parametrize("classes", [2, 4])
def test_knn_votes_as_scikit_learn(classes):
    features, codes, other = data(classes)
    head = HEADS["knn"].fit(features, codes, classes, {"n_neighbors": 5}, None)
    theirs = KNeighborsClassifier(5).fit(features, codes).predict_proba(other)
    np.testing.assert_allclose(softmax(head.scores(other)), theirs, atol=2e-3)


def test_gda_is_the_nearest_mean_under_the_shared_covariance():
    features, codes, other = data(3)
    means = [features[codes == code].mean(0) for code in range(3)]
    inverse = LedoitWolf(assume_centered=True).fit(np.concatenate([features[codes == c] - means[c] for c in range(3)]))
    inverse = inverse.precision_
    head = HEADS["gda"].fit(features, codes, 3, {}, None)
    for row, scores in zip(other, head.scores(other)):
        distances = np.array([(row - mean) @ inverse @ (row - mean) for mean in means])
        np.testing.assert_allclose(softmax(scores[None])[0], softmax(-distances[None] / 2)[0], atol=1e-6)


def test_gda_with_one_sample_a_class_is_the_nearest_mean():
    features = np.array([[0.0, 0.0], [4.0, 0.0]])
    head = HEADS["gda"].fit(features, np.array([0, 1]), 2, {}, None)
    assert head.scores(np.array([[1.0, 5.0], [3.0, -5.0]])).argmax(1).tolist() == [0, 1]


def test_knn_refuses_what_it_does_not_know():
    features, codes, _ = data(2)
    for params in ({"n_neighbors": 0}, {"weights": "distance"}):
        with pytest.raises(ValueError, match="n_neighbors"):
            HEADS["knn"].fit(features, codes, 2, params, None)
