# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PALPClassifier is an estimator of scikit-learn, and does what the paper does."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model


pytest.importorskip("sklearn", reason="PALPClassifier is an estimator of scikit-learn")
from sklearn.base import clone  # noqa: E402
from sklearn.ensemble import VotingClassifier  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import Pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from generation_ext.probing import FeatureExtractor, PALPClassifier, choice  # noqa: E402
from generation_ext.probing.heads import HEADS  # noqa: E402
from generation_ext.probing.ridge import PENALTIES  # noqa: E402
from peft_ext import PeqaConfig, models  # noqa: E402
from tests.tiny.byte_models import adapted, model  # noqa: E402
from tests.tiny.folders import save_tiny_model  # noqa: E402
from tests.tiny.tokenizers import tokenizer_for  # noqa: E402


TEMPLATE = "Review: {text}\nSentiment:"
GOOD = ["fine film", "great fun", "good, good", "a joy", "so fine", "great joy"]
BAD = ["bad film", "poor bore", "bad, bad", "a waste", "so poor", "bore, waste"]
EARLIER = {"layer": -1, "pooling": "last", "head_params": {"C": 0.1}}  # of versions that chose nothing
TEXTS, LABELS = GOOD + BAD, ["good"] * len(GOOD) + ["bad"] * len(BAD)


class Letters:
    """Counts letters: a stub encoder, that remembers what it was asked for."""

    def __init__(self):
        self.calls = []

    def __repr__(self):  # without an address, which would be another one in each worker of pytest-xdist
        return "Letters()"

    def extract(self, texts, prefix=""):
        self.calls.append((list(texts), prefix))
        return np.array([[float((prefix + text).count(letter)) for letter in "abcdefghijklmno"] for text in texts])


def palp(name="llama", **options):
    return PALPClassifier(model(name), tokenizer_for(name), **{"template": TEMPLATE, "random_state": 0, **options})


@parametrize_with_checks([PALPClassifier(Letters(), head=head) for head in HEADS])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("demonstrations", ["none", "per-class"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_fits_predicts_and_comes_back_from_its_folder(head, demonstrations, tmp_path):
    fitted = palp(head=head, demonstrations=demonstrations).fit(TEXTS, LABELS)
    assert fitted.classes_.tolist() == ["bad", "good"]
    probabilities = fitted.predict_proba(TEXTS)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert head == "knn" or fitted.score(TEXTS, LABELS) > 0.5  # neighbours in a random model mean little
    assert (fitted.predict(TEXTS) == fitted.classes_[probabilities.argmax(1)]).all()
    fitted.save_pretrained(tmp_path / "palp")
    assert sorted(path.name for path in (tmp_path / "palp").iterdir()) == [
        "README.md",
        "head.safetensors",
        "palp.json",
    ]
    back = PALPClassifier.from_pretrained(tmp_path / "palp", model("llama"), tokenizer_for("llama"))
    np.testing.assert_array_equal(back.predict_proba(TEXTS), probabilities)
    np.testing.assert_array_equal(back.predict(TEXTS), fitted.predict(TEXTS))


@pytest.mark.parametrize("labels", [[1, 2], [True, False], [0.0, 1.0]], ids=str)
def test_classes_keep_their_type(labels, tmp_path):
    y = [labels[0]] * len(GOOD) + [labels[1]] * len(BAD)
    fitted = palp(demonstrations="per-class").fit(TEXTS, y)
    fitted.save_pretrained(tmp_path / "palp")
    back = PALPClassifier.from_pretrained(tmp_path / "palp", model("llama"), tokenizer_for("llama"))
    for each in (fitted, back):
        found = each.predict(TEXTS)
        assert found.dtype == np.array(y).dtype and set(found) <= set(labels)


# ---- the method


def test_the_template_alone_gives_the_extractors_features():
    fitted = palp(layer=-1, pooling="last", label_scores=False).fit(TEXTS, LABELS)
    extractor = FeatureExtractor(model("llama"), tokenizer_for("llama"))
    expected = extractor.extract([f"Review: {text}\nSentiment:" for text in TEXTS])
    np.testing.assert_allclose(fitted.transform(TEXTS), expected, atol=1e-5)
    assert fitted.demonstrations_ == [] and fitted.prefix_ == ""


def test_demonstrations_are_the_samples_nearest_to_their_class_means():
    stub = Letters()
    fitted = PALPClassifier(stub, template=TEMPLATE, demonstrations="per-class", permutations=20).fit(TEXTS, LABELS)
    features = Letters().extract([f"Review: {text}\nSentiment:" for text in TEXTS])
    nearest = {}
    for name in ("bad", "good"):
        own = [index for index, label in enumerate(LABELS) if label == name]
        mean = sum(features[index] for index in own) / len(own)
        nearest[name] = TEXTS[min(own, key=lambda index: float(((features[index] - mean) ** 2).sum()))]
    assert fitted.demonstrations_ == [(nearest["bad"], "bad"), (nearest["good"], "good")]
    shown = {name: f"Review: {text}\nSentiment: {name}\n" for name, text in nearest.items()}
    # training texts behind both orders, the identity first; texts to predict behind the identity
    assert [prefix for _, prefix in stub.calls] == ["", shown["bad"] + shown["good"], shown["good"] + shown["bad"]]
    stub.calls.clear()
    fitted.predict(["x"])
    assert stub.calls == [(["Review: x\nSentiment:"], shown["bad"] + shown["good"])]


@pytest.mark.parametrize(
    "classes, permutations, orders", [(2, 20, 2), (3, 20, 6), (4, 20, 20), (4, 24, 24), (5, 3, 3)]
)
def test_as_many_orders_as_the_paper(classes, permutations, orders):
    stub = Letters()
    texts, labels = list("abcdefghij"), [index % classes for index in range(10)]
    PALPClassifier(stub, demonstrations="per-class", permutations=permutations, random_state=1).fit(texts, labels)
    prefixes = [prefix for _, prefix in stub.calls[1:]]
    assert len(prefixes) == len(set(prefixes)) == orders
    assert prefixes[0] == "".join(f"{text} {label}\n" for text, label in _shown(prefixes[0]))
    assert [label for _, label in _shown(prefixes[0])] == [str(each) for each in range(classes)]


def _shown(prefix):
    return [line.rsplit(" ", 1) for line in prefix.splitlines()]


def test_label_words_stand_in_demonstrations_only():
    words = {"good": " great", "bad": " terrible"}
    fitted = palp(demonstrations="per-class", label_words=words).fit(TEXTS, LABELS)
    assert "Sentiment: terrible\nReview:" in fitted.prefix_ and fitted.prefix_.endswith("Sentiment: great\n")
    assert set(fitted.predict(TEXTS)) <= {"good", "bad"}


@pytest.mark.parametrize("kind", ["mappings", "frame", "array"])
def test_pairs_of_texts(kind):
    template = "Premise: {premise}\nHypothesis: {hypothesis}\nLabel:"
    rows = [{"premise": one, "hypothesis": two} for one, two in zip(TEXTS, reversed(TEXTS))]
    X = rows
    if kind == "frame":
        X = pytest.importorskip("pandas").DataFrame(rows)
    elif kind == "array":
        X = np.array([list(row.values()) for row in rows])
    fitted = palp(template=template, demonstrations="per-class").fit(X, LABELS)
    expected = palp(template=template, demonstrations="per-class").fit(rows, LABELS)
    np.testing.assert_array_equal(fitted.predict_proba(X), expected.predict_proba(rows))
    assert all(set(text) == {"premise", "hypothesis"} for text, _ in expected.demonstrations_)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "bert", "t5"])
def test_models_of_all_kinds(name):
    fitted = palp(name, demonstrations="per-class", head_params={"C": 0.1}).fit(TEXTS, LABELS)
    assert fitted.score(TEXTS, LABELS) > 0.7
    read = FeatureExtractor(model(name), tokenizer_for(name), layer=fitted.layer_, pooling=fitted.pooling_)
    texts = [f"Review: {text}\nSentiment:" for text in TEXTS]
    np.testing.assert_allclose(fitted.transform(TEXTS), read.extract(texts, fitted.prefix_), atol=1e-5)


@pytest.mark.parametrize("bits", [4, 3])
def test_packed_and_adapted_models(bits, tmp_path):
    from peft import get_peft_model

    tuned = get_peft_model(copy.deepcopy(model("llama")), PeqaConfig(bits=bits, task_type="CAUSAL_LM"))
    merged = copy.deepcopy(tuned).merge_and_unload()
    found = []
    for each in (tuned, merged):
        fitted = PALPClassifier(each.eval(), tokenizer_for("llama"), template=TEMPLATE, **EARLIER).fit(TEXTS, LABELS)
        found.append(fitted.predict_proba(TEXTS))
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


# ---- what is read


class Blocks:
    """Six blocks of noise; in one of them the text's class is seen. `asked`: what was read, call by call."""

    def __init__(self, told_by=(2, "mean"), noise=0.3):
        self.told_by, self.noise, self.asked = told_by, noise, []

    def blocks(self):
        keys = [(layer, pooling) for layer in range(3) for pooling in ("last", "mean")]
        return {key: slice(5 * i, 5 * i + 5) for i, key in enumerate(keys)}

    def extract(self, texts, prefix=""):
        self.asked.append((len(texts), prefix))
        found = np.array([np.random.default_rng([ord(c) for c in t]).normal(size=30) for t in texts])
        for row, text in zip(found, texts):
            row[self.blocks()[self.told_by].start] = self.noise * row[0] + ("fun" in text)
        return found


def _tell(count):
    return [f"{i} {'fun' if i % 2 else 'bore'}" for i in range(count)], [
        "good" if i % 2 else "bad" for i in range(count)
    ]


@pytest.mark.parametrize("told_by", [(0, "last"), (2, "mean")])
@pytest.mark.parametrize("demonstrations", ["none", "per-class"])
def test_the_block_that_tells_is_chosen(told_by, demonstrations):
    texts, labels = _tell(60)
    options = {"template": "{text} is", "demonstrations": demonstrations, "random_state": 0, "head": "logistic"}
    fitted = PALPClassifier(Blocks(told_by), **options).fit(texts[:40], labels[:40])
    assert (fitted.layer_, fitted.pooling_) == told_by and fitted.C_ in fitted.C_scores_
    assert max(fitted.layer_scores_, key=fitted.layer_scores_.get) == told_by and len(fitted.layer_scores_) == 6
    assert fitted.score(texts[40:], labels[40:]) > 0.9 and fitted.transform(texts).shape == (60, 5)
    other = PALPClassifier(Blocks(told_by), layer=1, pooling="last", **options).fit(texts[:40], labels[:40])
    assert other.score(texts[40:], labels[40:]) < 0.8 and (other.layer_, other.layer_scores_) == (1, {})
    assert PALPClassifier(Blocks(told_by), layer=-1, **options).fit(texts, labels).layer_ == 2
    with pytest.raises(ValueError, match="layer=7, pooling='auto': the extractor has only"):
        PALPClassifier(Blocks(), layer=7).fit(texts, labels)


@pytest.mark.parametrize(
    "template, expected", [("{text}", "mean"), ("Review: {text}\n", "mean"), ("{text}\nSentiment:", "last")]
)
def test_texts_that_tell_nothing_leave_what_is_expected(template, expected):
    """One text a class, and no block better than the others."""
    stub = Blocks((0, "last"), noise=0)
    fitted = PALPClassifier(stub, template=template, head="logistic").fit(["a", "b"], ["x", "y"])
    assert (fitted.pooling_, fitted.C_, fitted.C_scores_) == (expected, 0.1, {})


def test_more_texts_than_blocks_are_compared_on(monkeypatch):
    monkeypatch.setattr(choice, "MOST_TEXTS", 40)
    texts, labels = _tell(60)
    stub = Blocks()
    fitted = PALPClassifier(stub, layer="best", random_state=0).fit(texts, labels)
    assert (fitted.layer_, fitted.pooling_) == (2, "mean") and [count for count, _ in stub.asked] == [40, 20]
    np.testing.assert_array_equal(fitted.transform(texts), Blocks().extract(texts)[:, 25:])
    np.testing.assert_allclose(fitted.mean_, Blocks().extract(texts)[:, 25:].mean(0))
    rows = choice.sample(np.array([0] * 60 + [1] * 8), 30)
    assert len(rows) == 40 and (rows >= 60).sum() == 8, "as many of each class as there are"


def test_one_forward_pass_has_all_layers(monkeypatch):
    read, run = [], FeatureExtractor._run
    monkeypatch.setattr(
        FeatureExtractor,
        "_run",
        lambda self, trees, *rest: read.extend([self.layer] * len(trees)) or run(self, trees, *rest),
    )
    fitted = palp(layer="best").fit(TEXTS, LABELS)
    assert read == [[-3, -2, -1]] * len(TEXTS)
    read.clear()
    fitted.predict(TEXTS)
    assert read == [fitted.layer_ - 3] * len(TEXTS)
    read.clear()
    palp().fit(TEXTS, LABELS).predict(TEXTS)
    assert read == [[-3, -2, -1]] * (2 * len(TEXTS))


@pytest.mark.parametrize("count", [4, 40])
def test_a_block_that_is_the_same_in_all_texts(count):
    """(Layer 0's last token behind a template.)"""
    rng, codes = np.random.default_rng(0), np.arange(count) % 2
    features = np.concatenate([np.ones((count, 5)), rng.normal(size=(count, 5)) + codes[:, None]], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = choice.scores_of(features, {(0, "last"): slice(0, 5), (1, "last"): slice(5, 10)}, codes, 2)
    assert -1 < found[0, "last"] < found[1, "last"] and choice.best(found, count) == (1, "last")


def test_leave_one_out_is_what_leaving_one_out_gives():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    for size in (5, 40):
        features, codes = rng.normal(size=(20, size)).astype(np.float32), np.arange(20) % 3
        found = choice.leave_one_out(features, codes, 3)
        scaled = choice.standardised(features).astype(np.float64)
        penalty = PENALTIES[3] * (scaled**2).sum() / 20
        # the mean of all targets, and not of the others, is the constant: so is ours but for its own share
        for left in (0, 7):
            rest = np.arange(20) != left
            naive = Ridge(penalty).fit(scaled[rest], np.eye(3)[codes[rest]]).predict(scaled[left : left + 1])[0]
            np.testing.assert_allclose(found[3, left], naive, atol=0.02)


def test_what_was_chosen_is_said_and_kept(tmp_path, capsys):
    fitted = palp(verbose=True, demonstrations="per-class", layer="best", head="logistic").fit(TEXTS, LABELS)
    line = capsys.readouterr().out
    assert line == f"[PALPClassifier] {fitted.chosen}\n" and f"layer {fitted.layer_}, {fitted.pooling_} (" in line
    fitted.save_pretrained(tmp_path / "palp")
    stored = json.loads((tmp_path / "palp" / "palp.json").read_text())
    assert stored["chosen"]["layer"] == fitted.layer_ and stored["params"]["layer"] == "best"
    back = PALPClassifier.from_pretrained(tmp_path / "palp", model("llama"), tokenizer_for("llama"))
    for name in ("layer_", "pooling_", "C_", "layer_scores_", "C_scores_", "chosen"):
        assert getattr(back, name) == getattr(fitted, name)
    np.testing.assert_array_equal(back.predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    del stored["chosen"], stored["state"]
    (tmp_path / "palp" / "palp.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="leaves layer or pooling open, and chosen is missing"):
        PALPClassifier.from_pretrained(tmp_path / "palp", model("llama"), tokenizer_for("llama"))


def test_the_earlier_settings():
    fitted = palp(**EARLIER).fit(TEXTS, LABELS)
    assert (fitted.layer_, fitted.pooling_, fitted.C_, fitted.layer_scores_, fitted.C_scores_) == (
        2,
        "last",
        0.1,
        {},
        {},
    )


# ---- several layers together, and what the model itself says


class Writes(Blocks):
    """Blocks of an extractor that has opinions of its own: `says` times what is true, for the class "good"."""

    def __init__(self, says, **options):
        super().__init__(**options)
        self.says = says

    def extract(self, texts, prefix=""):
        found = super().extract(texts, prefix)
        found[:, self.blocks()[2, "last"].start] = [1.0 if "fun" in text else -1.0 for text in texts]
        return found

    def label_scores(self, states, words):
        assert words == [" bad", " good"] and states.shape[1] == 5
        return np.outer(states[:, 0] * self.says, [0.0, 1.0])


def test_layers_are_joined_with_the_models_own_scores():
    texts, labels = _tell(60)
    options = {"template": "{text}\nIs:", "random_state": 0}
    fitted = PALPClassifier(Writes(3.0), **options).fit(texts[:10], labels[:10])
    assert fitted.blocks_ == [(0, "mean"), (1, "mean"), (2, "mean"), (2, "last")]
    assert (fitted.layer_, fitted.pooling_, fitted.C_, fitted.layer_scores_) == (None, None, None, {})
    assert fitted.label_weight_ > 0.2 and fitted.transform(texts).shape == (60, 22)
    own = fitted.transform(texts)[:, 20:]
    np.testing.assert_allclose(np.exp(own).sum(1), 1)
    assert "means of layers 0, 1, 2, the last token of layer 2, the model's own scores" in fitted.chosen
    wrong = PALPClassifier(Writes(-3.0), **options).fit(texts[:40], labels[:40])
    assert wrong.score(texts[40:], labels[40:]) > 0.9
    for more in ({"label_scores": False}, {"pooling": "mean"}, {"head": "logistic"}, {"template": "{text}"}):
        other = PALPClassifier(Writes(3.0), **{**options, **more}).fit(texts[:40], labels[:40])
        assert other.label_weight_ is None
    numbers = PALPClassifier(Writes(3.0), **options).fit(texts, [int(name == "good") for name in labels])
    assert numbers.label_weight_ is None, "no names, nothing to write"


def test_label_scores_are_the_models_logits():
    lm, words = model("llama"), tokenizer_for("llama")
    fitted = palp(label_words={"good": " A", "bad": " B"}).fit(TEXTS, LABELS)
    found = fitted.transform(TEXTS)[:, -2:]
    for text, scores in zip(TEXTS[:3], found):
        ids = words(f"Review: {text}\nSentiment:", return_tensors="pt").input_ids
        with torch.inference_mode():
            logits = lm(ids).logits[0, -1]
        # of a word of several tokens: their mean, all behind the text
        own = [logits[words(word, add_special_tokens=False).input_ids].mean() for word in (" B", " A")]
        np.testing.assert_allclose(scores, torch.stack(own).log_softmax(0).numpy(), atol=1e-5)
    assert not FeatureExtractor(model("bert"), tokenizer_for("bert")).writes
    assert not FeatureExtractor(model("llama").model, words).writes
    with pytest.raises(TypeError, match="writes no text"):
        FeatureExtractor(model("llama").model, words).label_scores(np.zeros((1, 16)), [" A"])


@pytest.mark.parametrize("demonstrations", ["none", "per-class"])
def test_joined_layers_come_back(demonstrations, tmp_path):
    fitted = palp(demonstrations=demonstrations).fit(TEXTS, LABELS)
    assert len(fitted.blocks_) == 4 and fitted.head_.name == "ridge" and fitted.label_weight_ is not None
    fitted.save_pretrained(tmp_path / "palp")
    back = PALPClassifier.from_pretrained(tmp_path / "palp", model("llama"), tokenizer_for("llama"))
    np.testing.assert_array_equal(back.predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    for name in ("blocks_", "label_weight_", "chosen", "layer_", "C_"):
        assert getattr(back, name) == getattr(fitted, name)
    path = tmp_path / "palp" / "palp.json"
    stored = json.loads(path.read_text())
    del stored["chosen"]["head"], stored["state"]
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="leaves the head open, and chosen.head is missing"):
        PALPClassifier.from_pretrained(tmp_path / "palp", model("llama"), tokenizer_for("llama"))


def test_too_many_rows_to_join_read_the_best_layer(monkeypatch):
    monkeypatch.setattr(choice, "MOST_ROWS", 39)
    texts, labels = _tell(60)
    fitted = PALPClassifier(Blocks()).fit(texts[:40], labels[:40])
    assert (fitted.layer_, fitted.pooling_) == (2, "mean") and fitted.head_.name == "ridge"
    assert len(PALPClassifier(Blocks()).fit(texts[:39], labels[:39]).blocks_) == 3
    shown = PALPClassifier(Blocks(), demonstrations="per-class").fit(texts[:39], labels[:39])
    assert len(shown.blocks_) == 1, "two rows a text"


def test_head_params_of_earlier_versions_name_the_logistic_head():
    assert palp(head_params={"C": 0.1}).fit(TEXTS, LABELS).head_.name == "logistic"
    assert palp(head_params={"penalties": [1.0]}).fit(TEXTS, LABELS).head_.name == "ridge"


# ---- scikit-learn's company


def test_a_clone_shares_the_model_and_nothing_that_was_fitted():
    fitted = palp(head="svm", head_params={"C": 0.5}).fit(TEXTS, LABELS)
    other = clone(fitted)
    assert other.model is fitted.model and other.get_params() == fitted.get_params()
    assert other.head_params is not fitted.head_params
    with pytest.raises(NotFittedError):
        other.predict(TEXTS)


def test_pipeline_and_grid_search():
    steps = [("lower", FunctionTransformer(lambda texts: [text.lower() for text in texts])), ("palp", palp())]
    grid = {"palp__head": ["logistic", "knn"], "palp__layer": ["auto", -1], "palp__head_params": [None]}
    search = GridSearchCV(Pipeline(steps), grid, cv=2).fit(TEXTS, LABELS)
    assert search.best_params_["palp__head"] in ("logistic", "knn")
    assert search.best_estimator_.named_steps["palp"].model is model("llama")
    assert set(search.predict(["GREAT FUN"])) <= {"good", "bad"}
    assert len(cross_val_score(palp(), TEXTS, LABELS, cv=3)) == 3


def test_each_adapter_has_features_of_its_own(tmp_path):
    """Adapters of one name on one base; each is fitted on what it gives, not on what the memory has of the other."""
    means = []
    for seed in (1, 2):
        lm, options = adapted(seed), {"template": TEMPLATE, "random_state": 0, **EARLIER}
        kept = PALPClassifier(lm, tokenizer_for("llama"), memory=tmp_path / "features", **options).fit(TEXTS, LABELS)
        alone = PALPClassifier(lm, tokenizer_for("llama"), **options).fit(TEXTS, LABELS)
        np.testing.assert_array_equal(kept.mean_, alone.mean_)
        means.append(kept.mean_)
    assert not np.allclose(*means)


def test_features_are_kept_between_fits(tmp_path, monkeypatch):
    first = palp(memory=tmp_path / "features", demonstrations="per-class").fit(TEXTS, LABELS)
    expected = first.predict_proba(TEXTS)
    monkeypatch.setattr(FeatureExtractor, "_fill", lambda *args: pytest.fail("encoded again"))
    again = palp(memory=tmp_path / "features", demonstrations="per-class").fit(TEXTS, LABELS)
    np.testing.assert_array_equal(again.predict_proba(TEXTS), expected)


def test_the_same_seed_gives_the_same_classifier():
    found = [
        palp(head="mlp", demonstrations="per-class", head_params={"max_iter": 5})
        .fit(TEXTS, LABELS)
        .predict_proba(TEXTS)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*found)


# ---- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"template": "no slot"}, "has no slot"),
        ({"demonstrations": "all"}, "demonstrations='all' is unknown"),
        ({"head": "forest"}, "head='forest' is unknown"),
        ({"permutations": 0}, "permutations=0"),
        ({"layer": 99}, "layer=99"),
        ({"pooling": "first"}, "pooling='first' is unknown"),
        ({"layer": "worst"}, "layer='worst' must be an integer, 'auto' or 'best'"),
        ({"layer": 1.5}, "layer=1.5 must be an integer"),
        ({"label_words": {"good": " great"}}, "no words for the class 'bad'"),
        ({"label_words": {"good": " great", "bad": " "}}, "must be a text"),
        ({"label_words": {"good": " great", "bad": " great"}}, "have the same word"),
        (
            {"label_words": {"good": " +", "bad": " -", "so-so": " 0"}, "demonstrations": "per-class"},
            "no sample of it",
        ),
        ({"head": "knn", "head_params": {"p": 1}}, "n_neighbors"),
        ({"head": "ridge", "head_params": {"C": 1}}, "head='ridge' takes penalties, positive numbers, alone"),
        ({"head_params": {"penalties": [1, 0]}}, "positive numbers"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        palp(**options).fit(TEXTS, LABELS)


@pytest.mark.parametrize(
    "X, y, error, message",
    [
        (TEXTS, ["good"] * len(TEXTS), ValueError, "one class alone"),
        (TEXTS, LABELS[:-1], ValueError, "X has 12 texts, but y 11"),
        ([], [], ValueError, "one class alone|0 samples"),
        ("one text", LABELS, TypeError, "single one"),
        ([*TEXTS[:-1], 3], LABELS, TypeError, "must be a string or a mapping"),
        (TEXTS, np.random.default_rng(0).normal(size=len(TEXTS)), ValueError, "Unknown label type|continuous"),
        (TEXTS, None, ValueError, "y is missing"),
    ],
)
def test_bad_data(X, y, error, message):
    with pytest.raises(error, match=message):
        palp().fit(X, y)


def test_demonstrations_that_do_not_fit():
    texts = [f"{'word ' * 60}{index}" for index in range(8)]
    with pytest.raises(ValueError, match="demonstrations of 4 classes take .* use demonstrations='none'"):
        palp(demonstrations="per-class").fit(texts, [index % 4 for index in range(8)])


def test_long_and_empty_texts():
    texts = ["", "x" * 100_000, *TEXTS]
    labels = ["good", "bad", *LABELS]
    with pytest.raises(ValueError, match="text 1 takes .* tokens"):
        palp().fit(texts, labels)
    with pytest.warns(UserWarning, match="1 of 14 texts are cut"):
        fitted = palp(overflow="truncate_start").fit(texts, labels)
    with pytest.warns(UserWarning, match="are cut"):
        assert len(fitted.predict(texts)) == len(texts)


def test_a_model_or_tokenizer_that_is_missing():
    with pytest.raises(ValueError, match="model is missing"):
        PALPClassifier().fit(TEXTS, LABELS)
    with pytest.raises(ValueError, match="tokenizer is missing"):
        PALPClassifier(model("llama")).fit(TEXTS, LABELS)
    with pytest.raises(TypeError, match="model is a int"):
        PALPClassifier(3).fit(TEXTS, LABELS)


def test_features_that_are_not_numbers():
    class Broken(Letters):
        def extract(self, texts, prefix=""):
            found = super().extract(texts, prefix)
            found[2, 1] = np.nan
            return found

    with pytest.raises(ValueError, match="features of text 2"):
        PALPClassifier(Broken()).fit(TEXTS, LABELS)


def test_another_model_is_refused(tmp_path):
    palp().fit(TEXTS, LABELS).save_pretrained(tmp_path / "palp")
    other = copy.deepcopy(model("llama"))
    with torch.no_grad():
        other.get_input_embeddings().weight.neg_()
    with pytest.raises(ValueError, match="was fitted on .* pass the model it was fitted on"):
        PALPClassifier.from_pretrained(tmp_path / "palp", other, tokenizer_for("llama"))


def test_another_adapter_is_said(tmp_path):
    def adapted(seed):
        torch.manual_seed(seed)
        tuned = get_peft_model(copy.deepcopy(model("llama")), LoraConfig(r=2, target_modules="all-linear"))
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        return tuned

    words = tokenizer_for("llama")
    fitted = PALPClassifier(adapted(0), words, template=TEMPLATE).fit(TEXTS, LABELS)
    fitted.save_pretrained(tmp_path / "palp")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        back = PALPClassifier.from_pretrained(tmp_path / "palp", adapted(0), words)
    np.testing.assert_array_equal(back.predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    with pytest.warns(UserWarning, match="made with the adapter weights .* but this model has the adapter weights"):
        PALPClassifier.from_pretrained(tmp_path / "palp", adapted(1), words)
    path = tmp_path / "palp" / "palp.json"
    content = json.loads(path.read_text())
    model("llama").save_pretrained(tmp_path / "lm")
    words.save_pretrained(tmp_path / "lm")
    content["base_model"]["name"] = str(tmp_path / "lm")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="but this model has no adapter.* Pass model= with that adapter"):
        PALPClassifier.from_pretrained(tmp_path / "palp")  # by name, which the adapter isn't part of
    del content["base_model"]["adapters"]  # as earlier versions saved it
    path.write_text(json.dumps(content))
    PALPClassifier.from_pretrained(tmp_path / "palp")


def test_damaged_and_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no palp.json"):
        PALPClassifier.from_pretrained(tmp_path, model("llama"), tokenizer_for("llama"))
    fitted = palp().fit(TEXTS, LABELS)
    fitted.save_pretrained(tmp_path / "palp")
    content = json.loads((tmp_path / "palp" / "palp.json").read_text())
    (tmp_path / "palp" / "palp.json").write_text(json.dumps({**content, "format": 9}))
    with pytest.raises(ValueError, match="format is 9"):
        PALPClassifier.from_pretrained(tmp_path / "palp", model("llama"), tokenizer_for("llama"))
    content["demonstrations"] = [[{"text": ""}, "good"]]
    (tmp_path / "palp" / "palp.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"palp\.json': params, classes, words, demonstrations, chosen aren't all as they were"
    ):
        PALPClassifier.from_pretrained(tmp_path / "palp", model("llama"), tokenizer_for("llama"))
    del content["state"]
    (tmp_path / "palp" / "palp.json").write_text(json.dumps(content))
    PALPClassifier.from_pretrained(tmp_path / "palp", model("llama"), tokenizer_for("llama"))
    (tmp_path / "palp" / "palp.json").write_text(json.dumps({key: content[key] for key in content if key != "files"}))
    (tmp_path / "palp" / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"head\.safetensors' is truncated, damaged"):
        PALPClassifier.from_pretrained(tmp_path / "palp", model("llama"), tokenizer_for("llama"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        fitted.save_pretrained(tmp_path / "full")


def test_loads_its_model_by_name(tmp_path):
    lm, words = copy.deepcopy(model("llama")), tokenizer_for("llama")
    lm.save_pretrained(tmp_path / "lm")
    words.save_pretrained(tmp_path / "lm")
    lm.config._name_or_path = str(tmp_path / "lm")
    fitted = PALPClassifier(lm, words, template=TEMPLATE).fit(TEXTS, LABELS)
    fitted.save_pretrained(tmp_path / "palp")
    back = PALPClassifier.from_pretrained(tmp_path / "palp")
    np.testing.assert_allclose(back.predict_proba(TEXTS), fitted.predict_proba(TEXTS), atol=1e-6)


def test_unfitted():
    for method in ("predict", "predict_proba", "transform"):
        with pytest.raises(NotFittedError):
            getattr(palp(), method)(TEXTS)


def test_finds_the_default_model_again(tmp_path, monkeypatch):
    """It lies in a package, so its name is none of a folder or of the hub."""
    folder = save_tiny_model(tmp_path / "package")
    monkeypatch.setattr(models, "_default_source", lambda: models.ModelSource(str(folder)))
    fitted = PALPClassifier(models.load(), models.load_tokenizer(), template=TEMPLATE, random_state=0).fit(
        TEXTS, LABELS
    )
    fitted.save_pretrained(tmp_path / "palp")
    back = PALPClassifier.from_pretrained(tmp_path / "palp")
    np.testing.assert_array_equal(back.predict_proba(TEXTS), fitted.predict_proba(TEXTS))


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_workers_are_given_inner_layers(name):
    """(transformers' own hooks can't be pickled, and stay in the model once hidden states were asked for.)"""
    lm = copy.deepcopy(model(name))
    (lm.get_encoder() if name == "t5" else lm)(torch.tensor([[5, 6]]), output_hidden_states=True)  # somebody's pass
    fitted = PALPClassifier(lm, tokenizer_for(name)).fit(TEXTS, LABELS)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).transform(TEXTS), fitted.transform(TEXTS))
    if name == "llama":  # workers take a while to start
        alone = cross_val_score(fitted, TEXTS, LABELS, cv=2)
        np.testing.assert_array_equal(cross_val_score(fitted, TEXTS, LABELS, cv=2, n_jobs=2), alone)


def test_label_words_in_an_ensemble():
    """It numbers the classes, in sorted order."""
    words = {"good": " good", "bad": " bad"}
    options = {"template": "In: {text}\nOut:", "demonstrations": "per-class", "label_words": words, "random_state": 0}
    single = PALPClassifier(model("llama"), tokenizer_for("llama"), **options)
    with pytest.warns(
        UserWarning, match=r"y has the classes \[0, 1\], label_words \['bad', 'good'\]: taken in this order"
    ):
        voting = VotingClassifier([("palp", single)], voting="soft").fit(TEXTS, LABELS)
    assert voting.estimators_[0].task_.labels == {0: " bad", 1: " good"}
    np.testing.assert_array_equal(voting.predict(TEXTS), single.fit(TEXTS, LABELS).predict(TEXTS))
    with pytest.raises(ValueError, match="no words for the class 'new'"):
        single.fit(TEXTS, ["new" if name == "bad" else name for name in LABELS])
