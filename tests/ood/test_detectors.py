# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Detectors against slow and obvious references, their files, blocks and errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from peft_ext.ood.detectors import (
    KNN,
    MSP,
    Detector,
    Energy,
    Mahalanobis,
    MahalanobisCosine,
    MaxCosine,
    RelativeMahalanobis,
    ViM,
    base,
    load_detector,
    make_detector,
)


SIZE, CLASSES = 8, 3
KINDS = {
    "msp": MSP(),
    "energy": Energy(temperature=2.0),
    "mahalanobis": Mahalanobis(),
    "mahalanobis-empirical": Mahalanobis(covariance="empirical", normalize=False),
    "relative_mahalanobis": RelativeMahalanobis(normalize=False),
    "cosine": MaxCosine(),
    "mahalanobis_cosine": MahalanobisCosine(shrinkage=0.3),
    "mahalanobis_cosine-identity": MahalanobisCosine(shrinkage=1),
    "knn": KNN(k=3),
    "knn-raw": KNN(k=1, normalize=False),
    "vim": ViM(dim=3),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def data():
    """Training and test features, the logits of an affine head, and labels."""
    generator = np.random.default_rng(0)
    labels = generator.integers(CLASSES, size=60)
    train = generator.normal(size=(60, SIZE)) + 3 * np.eye(SIZE)[labels]
    test = np.concatenate([train[:5] + 0.1, generator.normal(scale=4, size=(20, SIZE))])
    weight, bias = generator.normal(size=(CLASSES, SIZE)), generator.normal(size=CLASSES)
    return {
        "train": (train, train @ weight.T + bias, labels),
        "test": (test, test @ weight.T + bias),
        "head": (weight, bias),
    }


def fitted(kind: str, data) -> Detector:
    return make_detector({"name": KINDS[kind].name, **KINDS[kind].get_params()}).fit(*data["train"])


def _unit(row):
    return row / math.sqrt(sum(value * value for value in row))


def _mahalanobis(row, means, precision) -> float:
    return min(float((row - mean) @ precision @ (row - mean)) for mean in means)


def _gaussian(train, labels, estimator):
    means = [train[labels == label].mean(axis=0) for label in range(CLASSES)]
    centred = np.stack([row - means[label] for row, label in zip(train, labels)])
    if estimator is None:
        return means, np.linalg.inv(sum(np.outer(row, row) for row in centred) / len(centred))
    return means, np.linalg.inv(estimator.fit(centred).covariance_)


def reference(kind: str, data, row: int) -> float:
    """The score of one test example by the book."""
    (train, train_logits, labels), (test, test_logits), (weight, bias) = data["train"], data["test"], data["head"]
    x, logits = test[row], test_logits[row]
    exponentials = [math.exp(value) for value in logits]
    units = np.stack([_unit(example) for example in train])
    if kind == "msp":
        return max(exponentials) / sum(exponentials)
    if kind == "energy":
        return 2 * math.log(sum(math.exp(value / 2) for value in logits))
    if kind == "mahalanobis":
        means, precision = _gaussian(units, labels, LedoitWolf(assume_centered=True))
        return -_mahalanobis(_unit(x), means, precision)
    if kind == "mahalanobis-empirical":
        return -_mahalanobis(x, *_gaussian(train, labels, None))
    if kind == "relative_mahalanobis":
        means, precision = _gaussian(train, labels, LedoitWolf(assume_centered=True))
        background = np.linalg.inv(LedoitWolf().fit(train).covariance_)
        centre = x - train.mean(axis=0)
        return float(centre @ background @ centre) - _mahalanobis(x, means, precision)
    if kind == "cosine":
        return max(float(_unit(x) @ unit) for unit in units)
    if kind.startswith("mahalanobis_cosine"):
        means = [units[labels == label].mean(axis=0) for label in range(CLASSES)]
        centred = np.stack([row - means[label] for row, label in zip(units, labels)])
        covariance, share = centred.T @ centred / len(centred), 1.0 if kind.endswith("identity") else 0.3
        precision = np.linalg.inv((1 - share) * covariance + share * np.trace(covariance) / SIZE * np.eye(SIZE))
        point = _unit(x) - units.mean(axis=0)
        lines = [mean - units.mean(axis=0) for mean in means]
        return max(
            float(point @ precision @ line / math.sqrt((point @ precision @ point) * (line @ precision @ line)))
            for line in lines
        )
    if kind.startswith("knn"):
        k, rows, point = (3, units, _unit(x)) if kind == "knn" else (1, train, x)
        return -sorted(math.dist(point, row) for row in rows)[k - 1]
    # ViM, equations 1 to 6 of the paper
    origin = -np.linalg.pinv(weight) @ bias
    _, vectors = np.linalg.eigh(np.cov((train - origin).T, bias=True) + np.outer(*[(train - origin).mean(axis=0)] * 2))
    null_space = vectors[:, : SIZE - 3]
    alpha = train_logits.max(axis=1).sum() / sum(np.linalg.norm(null_space.T @ (row - origin)) for row in train)
    virtual = alpha * np.linalg.norm(null_space.T @ (x - origin))
    return math.log(sum(exponentials)) - virtual  # monotone in 1 - the virtual logit's probability, and ID is higher


@kinds
def test_scores_are_the_books(kind, data):
    found = fitted(kind, data).score(*data["test"])
    assert found.dtype == np.float64 and found.shape == (25,)
    np.testing.assert_allclose(found, [reference(kind, data, row) for row in range(25)], rtol=1e-8)


def test_knn_is_scikit_learns(data):
    (train, _, _), (test, _) = data["train"], data["test"]
    distances, _ = NearestNeighbors(n_neighbors=7).fit(train).kneighbors(test)
    np.testing.assert_allclose(KNN(k=7, normalize=False).fit(train).score(test), -distances[:, -1], rtol=1e-8)


@kinds
def test_far_examples_score_lower(kind, data):
    """Higher means more in-distribution, for features that are far from all classes and logits that say nothing."""
    train, logits, _ = data["train"]
    far = np.array([[-9.0, -8.0, -10.0, 3.0, -3.0, 3.0, -3.0, 3.0]])  # opposite to all class means
    # what lies far may have any logits (that is their weakness), so these are given no opinion
    scores = fitted(kind, data).score(far, np.zeros((1, CLASSES)) - 3)
    assert scores[0] < np.quantile(fitted(kind, data).score(train, logits), 0.2)


@kinds
def test_one_example_torch_and_half_precision(kind, data):
    detector, (test, logits) = fitted(kind, data), data["test"]
    scores = detector.score(test, logits)
    one = detector.score(test[3], logits[3])
    assert isinstance(one, float) and one == pytest.approx(scores[3], rel=1e-10)
    as_torch = detector.score(torch.tensor(test, requires_grad=True), torch.tensor(logits))
    np.testing.assert_array_equal(as_torch, scores)
    half = detector.score(torch.tensor(test).bfloat16(), torch.tensor(logits).bfloat16())
    np.testing.assert_allclose(half, scores, rtol=0.1, atol=0.1 * np.abs(scores).max())


@kinds
def test_blocks_change_nothing(kind, data, monkeypatch):
    detector = fitted(kind, data)
    scores = detector.score(*data["test"])
    monkeypatch.setattr(base, "BLOCK_ROWS", 4)
    monkeypatch.setattr("peft_ext.ood.detectors.neighbours._BLOCK_EXAMPLES", 7)
    np.testing.assert_allclose(detector.score(*data["test"]), scores, rtol=1e-9)
    assert detector.score(data["test"][0][:0], data["test"][1][:0]).shape == (0,)


@kinds
def test_round_trip(kind, data, tmp_path):
    detector = fitted(kind, data)
    detector.save_pretrained(tmp_path / "detector")
    assert sorted(path.name for path in (tmp_path / "detector").iterdir()) == ["detector.json", "detector.safetensors"]
    again = load_detector(tmp_path / "detector")
    assert type(again) is type(detector) and again.get_params() == detector.get_params()
    np.testing.assert_array_equal(again.score(*data["test"]), detector.score(*data["test"]))
    assert type(type(detector).from_pretrained(tmp_path / "detector")) is type(detector)


def test_files_of_another_kind(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"detector\.json"):
        load_detector(tmp_path)
    with pytest.raises(ValueError, match="isn't fitted"):
        MSP().save_pretrained(tmp_path)
    fitted("knn", data).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a KNN, not a MSP"):
        MSP.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "detector.json").read_text())
    for change, match in (
        ({"format": 2}, "later version"),
        ({"detector": "odin"}, "'odin'; it must be one of .*'knn'"),
    ):
        (tmp_path / "detector.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=match):
            load_detector(tmp_path)


def test_nearest_mean_classifies(data):
    train, logits, labels = data["train"]
    names = np.array(["b", "c", "a"])[labels]
    detector = Mahalanobis().fit(train, logits, names)
    assert (np.array(["a", "b", "c"])[detector.predict(train)] == names).mean() > 0.9


@kinds
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_named(kind, data, value):
    (train, train_logits, labels), (test, logits) = data["train"], data["test"]
    for features_too in (True, False):
        detector = fitted(kind, data)
        if not (detector.needs_features if features_too else detector.needs_logits):
            continue
        bad, bad_logits = test.copy(), logits.copy()
        (bad if features_too else bad_logits)[[4, 9], 1] = value
        what = "features" if features_too else "logits"
        with pytest.raises(ValueError, match=rf"{what} have NaN or infinity in rows \[4, 9\]"):
            detector.score(bad, bad_logits)
    train = train.copy()
    train[7] = value
    if KINDS[kind].needs_features:
        with pytest.raises(ValueError, match=r"features have NaN or infinity in rows \[7\]"):
            fitted(kind, {"train": (train, train_logits, labels)})


@kinds
def test_another_models_features(kind, data):
    (test, logits), detector = data["test"], fitted(kind, data)
    wrong = (test[:, :-1], logits) if detector.needs_features else (test, logits[:, :-1])
    with pytest.raises(ValueError, match="was fitted on .* of size"):
        detector.score(*wrong)
    with pytest.raises(ValueError, match="needs features|needs logits"):
        detector.score()
    with pytest.raises(ValueError, match="isn't fitted"):
        make_detector(detector.name).score(test, logits)


def test_a_class_with_one_example(data):
    train, logits, labels = data["train"]
    labels = labels.copy()
    labels[5] = 9
    with pytest.warns(UserWarning, match="1 classes have a single example, such as"):
        Mahalanobis().fit(train, logits, labels)
    with pytest.raises(ValueError, match="single example.*at least two"):
        Mahalanobis().fit(train, logits, np.arange(60))


def test_a_singular_covariance(data):
    train, logits, labels = data["train"]
    flat = np.concatenate([train, train[:, :2]], axis=1)
    with pytest.raises(ValueError, match="singular.*rank 8 of 10.*ledoit_wolf"):
        Mahalanobis(covariance="empirical", normalize=False).fit(flat, logits, labels)
    assert np.isfinite(Mahalanobis().fit(flat, logits, labels).score(flat)).all()
    with pytest.raises(ValueError, match="singular.*same features"):
        Mahalanobis().fit(np.ones((60, 4)), logits, labels)
    with pytest.raises(ValueError, match="same features"):
        MahalanobisCosine().fit(np.eye(3)[labels], logits, labels)
    assert np.isfinite(MahalanobisCosine().fit(flat, logits, labels).score(flat)).all()


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("odin", ValueError, "detector 'odin' is unknown.*'energy'"),
        ({"name": "knn", "neighbours": 3}, TypeError, "'neighbours'.*'k'"),
        ({"name": "knn", "k": 0}, ValueError, "k=0"),
        ({"name": "knn", "k": 61}, ValueError, "k=61.*60 training examples"),
        ({"name": "energy", "temperature": 0}, ValueError, "temperature=0"),
        ({"name": "mahalanobis", "covariance": "diagonal"}, ValueError, "covariance='diagonal'"),
        ({"name": "mahalanobis_cosine", "shrinkage": 0}, ValueError, "shrinkage=0"),
        ({"name": "mahalanobis_cosine", "shrinkage": 1.5}, ValueError, "shrinkage=1.5"),
        ({"name": "vim", "dim": SIZE}, ValueError, f"dim={SIZE}.*outside"),
        ({"name": "vim", "dim": 1.5}, ValueError, "dim=1.5"),
    ],
)
def test_bad_arguments(spec, error, match, data):
    with pytest.raises(error, match=match):
        make_detector(spec).fit(*data["train"])


def test_numbers_of_examples_that_differ(data):
    train, logits, labels = data["train"]
    with pytest.raises(ValueError, match="numbers of examples differ"):
        Mahalanobis().fit(train, logits, labels[:-1])
    with pytest.raises(ValueError, match="numbers of examples differ"):
        ViM(dim=3).fit(train, logits).score(train, logits[:-1])
    with pytest.raises(ValueError, match="needs labels"):
        Mahalanobis().fit(train, logits)
    with pytest.raises(ValueError, match="no examples"):
        KNN().fit(train[:0])
