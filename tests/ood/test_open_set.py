# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A classifier of scikit-learn that refuses what is none of its classes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from peft_ext.ood import OpenSetClassifier, TextFeatures
from peft_ext.ood.classifier import PooledClassifier
from tests.tiny.tokenizers import tiny_tokenizer


ONE_MORE = "predict_proba has a column for unknown, and predict may answer it, which y doesn't have"
EXPECTED = {
    "check_classifiers_train": ONE_MORE,
    "check_classifiers_classes": ONE_MORE,
}


@parametrize_with_checks([OpenSetClassifier()], expected_failed_checks=lambda estimator: EXPECTED)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def blobs(count=200, seed=0):
    """Three classes, and far away from them what is none."""
    X, y = make_blobs(count, centers=[[0, 0, 0], [6, 0, 0], [0, 6, 0]], random_state=seed)
    outside = make_blobs(40, centers=[[12, 12, 12]], random_state=seed)[0]
    return X, np.array(["a", "b", "c"])[y], outside


PLAIN = {"name": "mahalanobis", "normalize": False}


@pytest.mark.parametrize("thresholds", ["common", "per-class"])
def test_accepts_what_it_knows_and_refuses_the_rest(thresholds):
    X, y, outside = blobs()
    model = OpenSetClassifier(detector=PLAIN, thresholds=thresholds).fit(X, y)
    assert model.classes_.tolist() == ["a", "b", "c", "unknown"]
    fresh, truth, _ = blobs(seed=1)
    answers = model.predict(fresh)
    assert 0.9 <= (answers != "unknown").mean() <= 0.99 and (answers == truth).mean() > 0.88
    assert (model.predict(outside) == "unknown").all() and (model.predict_known(outside) != "unknown").all()
    assert model.out_of_fold_["accepted"] == pytest.approx(0.95, abs=0.03)
    everything = np.concatenate([fresh, outside])
    proba = model.predict_proba(everything)
    np.testing.assert_allclose(proba.sum(1), 1)
    assert (model.classes_[proba.argmax(1)] == model.predict(everything)).all()
    refused = model.score_samples(everything) < model.thresholds_.of(model.head_.predict(everything))
    assert (refused == (model.predict(everything) == "unknown")).all()


def test_examples_from_outside_choose_the_threshold_alone():
    X, y, _ = blobs()
    near = np.random.default_rng(0).normal([3, 3, 0], 1.5, size=(60, 3))
    labels = np.concatenate([y, np.full(30, "unknown")])
    both = np.concatenate([X, near[:30]])
    with pytest.raises(ValueError, match="unknown='unknown' if these are examples from outside"):
        OpenSetClassifier(detector=PLAIN).fit(both, labels)
    plain = OpenSetClassifier(detector=PLAIN, id_recall=0.99).fit(X, y)
    told = OpenSetClassifier(detector=PLAIN, unknown="unknown").fit(both, labels)
    wary = OpenSetClassifier(detector=PLAIN, unknown="unknown", outside_share=0.95).fit(both, labels)
    for fitted in (told, wary):
        np.testing.assert_array_equal(fitted.score_samples(X), plain.score_samples(X))

    def right(model):
        fresh, truth, _ = blobs(seed=1)
        return (model.predict(fresh) == truth).mean() / 2 + (model.predict(near[30:]) == "unknown").mean() / 2

    assert right(told) > right(plain)
    assert wary.thresholds_.common > told.thresholds_.common
    assert (wary.predict(near[30:]) == "unknown").mean() >= (told.predict(near[30:]) == "unknown").mean()


def test_labels_that_are_numbers():
    X, y, outside = blobs()
    numbers = np.unique(y, return_inverse=True)[1]
    model = OpenSetClassifier(detector=PLAIN).fit(X, numbers)
    assert model.classes_.tolist() == [0, 1, 2, -1] and (model.predict(outside) == -1).all()
    assert OpenSetClassifier(detector=PLAIN, unknown=99).fit(X, numbers).predict(outside).tolist() == [99] * 40
    truths = OpenSetClassifier(detector=PLAIN).fit(X, y == "a")
    assert truths.classes_.tolist() == [False, True, "unknown"] and (truths.predict(outside) == "unknown").all()


def texts_and_intents():
    ways = {"book": ["book a table for {}", "a table for {} please"], "play": ["play some {}", "put on {} now"]}
    fill = ["two", "three", "four", "jazz", "rock", "mozart", "six", "eight"]
    rows = [(way.format(what), intent) for intent in ways for way in ways[intent] for what in fill]
    return [text for text, _ in rows], [intent for _, intent in rows]


def test_texts_through_encoders_of_scikit_learn():
    """TF-IDF learns words, so it is fitted in each fold anew; hashing learns nothing and runs once."""
    texts, intents = texts_and_intents()
    fitted = []

    class Counting(TfidfVectorizer):
        def fit(self, X, y=None):
            fitted.append(len(X))
            return super().fit(X, y)

    model = OpenSetClassifier(Counting(), detector="msp", cv=4).fit(texts, intents)
    assert sorted(fitted) == [24, 24, 24, 24, 32]
    assert model.predict(["book a table for seven", "zebra"]).tolist() == ["book", "unknown"]
    assert OpenSetClassifier(HashingVectorizer(n_features=64), detector="energy").fit(texts, intents).predict(
        ["play some techno"]
    ).tolist() == ["play"]
    with pytest.raises(ValueError, match="needs dense features.*detector='energy'"):
        OpenSetClassifier(TfidfVectorizer()).fit(texts, intents)


def test_texts_through_a_model(bert_folder):
    texts, intents = texts_and_intents()
    model = OpenSetClassifier(TextFeatures(bert_folder)).fit(texts, intents)
    again = pickle.loads(pickle.dumps(model))
    assert "_loaded" not in vars(again.encoder_)
    np.testing.assert_array_equal(again.predict_proba(texts[:3]), model.predict_proba(texts[:3]))
    classifier = PooledClassifier.from_backbone(bert_folder, 2)
    encoder = TextFeatures(classifier, tiny_tokenizer())
    assert clone(encoder).model is classifier
    np.testing.assert_allclose(
        encoder.fit_transform(texts), TextFeatures(bert_folder).fit_transform(texts), rtol=1e-5, atol=1e-6
    )
    search = GridSearchCV(
        OpenSetClassifier(TextFeatures(bert_folder)), {"detector": ["msp", "mahalanobis"]}, cv=2
    ).fit(texts, intents)
    assert set(search.cv_results_["param_detector"]) == {"msp", "mahalanobis"}


def test_classes_with_few_examples():
    """A class of one example is never left out, and its threshold is the common one."""
    X, y, _ = blobs(61)
    y = y.astype(object)
    y[0] = "alone"
    model = OpenSetClassifier(detector=PLAIN, thresholds="per-class").fit(X, y)
    assert model.thresholds_.offsets[model.classes_.tolist().index("alone")] == 0
    with pytest.raises(ValueError, match="no class with two examples"):
        OpenSetClassifier(detector=PLAIN).fit(X[:3], ["a", "b", "c"])


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"thresholds": "each"}, "thresholds='each' is unknown"),
        ({"detector": "nearest"}, "detector 'nearest' is unknown"),
        ({"cv": 1}, "cv=1 must be at least 2"),
        ({"id_recall": 2}, "recall=2 must be"),
        ({"head": LinearSVC()}, "LinearSVC has no predict_proba"),
        ({"encoder": object()}, "object, without transform"),
        ({"unknown": "c", "outside_share": 1.0}, "outside_share=1.0"),
    ],
)
def test_wrong_arguments_are_named(settings, match):
    X, y, _ = blobs(60)
    with pytest.raises((ValueError, TypeError), match=match):
        OpenSetClassifier(**settings).fit(X, y)


def test_wrong_arguments_of_text_features(bert_folder):
    with pytest.raises(ValueError, match="tokenizer is missing"):
        TextFeatures(PooledClassifier.from_backbone(bert_folder, 2)).fit()
    with pytest.raises(ValueError, match="pooling='max'"):
        TextFeatures(bert_folder, pooling="max").fit()
    with pytest.raises(TypeError, match="single one"):
        TextFeatures(bert_folder).transform("w5")
    with pytest.raises(TypeError, match="None, a NoneType"):
        TextFeatures(bert_folder).transform(["w5", None])
