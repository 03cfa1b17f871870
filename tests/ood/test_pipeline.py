# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A classifier with a detector behind it: predictions, thresholds, one folder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from transformers.utils import hub

from peft_ext import BottleneckConfig, PeqaConfig
from peft_ext.models import DEFAULT_MODEL, ModelSource
from peft_ext.ood.classifier import PooledClassifier
from peft_ext.ood.detectors import MSP, Mahalanobis
from peft_ext.ood.pipeline import OODPipeline
from peft_ext.ood.study.data import load_setting, make_setting
from peft_ext.ood.study.training import TrainingOptions, train
from peft_ext.ood.thresholds import best_threshold
from tests.ood.conftest import LABELS
from tests.tiny.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def data(data_dir):
    return load_setting(make_setting("clinc150_oos"), data_dir)


def _pipeline(model, data, detector="mahalanobis", **kwargs) -> OODPipeline:
    return OODPipeline.fit(
        model, tiny_tokenizer(), *data.train, data.validation[0], detector, label_names=data.labels, **kwargs
    )  # fmt: skip


MODELS = {
    "pooled": lambda folder: PooledClassifier.from_backbone(folder, 6),
    "pooled-lora": lambda folder: get_peft_model(
        PooledClassifier.from_backbone(folder, 6), LoraConfig(task_type="SEQ_CLS")
    ),
    "pooled-bottleneck-cut": lambda folder: get_peft_model(
        PooledClassifier.from_backbone(folder, 6, pooling="first", layers=1), BottleneckConfig(task_type="SEQ_CLS")
    ),
    "pooled-peqa": lambda folder: get_peft_model(
        PooledClassifier.from_backbone(folder, 6), PeqaConfig(task_type="SEQ_CLS")
    ),
    "transformers": lambda folder: AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=6, ignore_mismatched_sizes=True
    ),
    "transformers-lora": lambda folder: get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=6, ignore_mismatched_sizes=True),
        LoraConfig(task_type="SEQ_CLS"),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind, data, bert_folder, tmp_path):
    pipeline = _pipeline(MODELS[kind](bert_folder), data)
    texts = data.test[0] + data.outside
    before = pipeline(texts)
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = OODPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(again.model) is type(pipeline.model) and again.threshold == pipeline.threshold
    for old, new in zip(before, again(texts)):
        assert (new["label"], new["in_distribution"]) == (old["label"], old["in_distribution"])
        assert new["score"] == pytest.approx(old["score"], rel=1e-3)


@pytest.mark.parametrize("detector", ["mahalanobis_cosine", "mahalanobis", "msp"])
def test_layers_are_kept(detector, data, bert_folder, tmp_path):
    """The default sees the last layer but one beside the head's input, where angles are measured; a file that says nothing of
    layers is of a pipeline without."""
    pipeline = _pipeline(PooledClassifier.from_backbone(bert_folder, 6), data, detector)
    layers = pipeline.layers
    assert layers == ([1] if detector == "mahalanobis_cosine" else [])
    chosen = _pipeline(PooledClassifier.from_backbone(bert_folder, 6), data, detector, layers=[-1, 1])
    assert chosen.layers == [1, 2]
    for each in (pipeline, chosen):
        each.save_pretrained(tmp_path / "pipeline")
        again = OODPipeline.from_pretrained(tmp_path / "pipeline")
        assert again.layers == each.layers
        np.testing.assert_allclose(again.predict(data.outside).scores, each.predict(data.outside).scores, rtol=1e-5)
    with pytest.raises(ValueError, match=r"layers=\[9\]: 9 is none of the model's 2 layers"):
        _pipeline(PooledClassifier.from_backbone(bert_folder, 6), data, detector, layers=[9])


def test_saved_over_another_one(data, bert_folder, tmp_path):
    """An adapter over a whole model: nothing of the older save stays, and what isn't ours does."""
    folder = tmp_path / "pipeline"
    _pipeline(MODELS["pooled"](bert_folder), data, "knn").save_pretrained(folder)
    weights = (folder / "model" / "model.safetensors").read_bytes()
    (folder / "notes.txt").write_text("mine")
    pipeline = _pipeline(MODELS["pooled-lora"](bert_folder), data)
    pipeline.save_pretrained(folder)
    names = {path.name for path in (folder / "model").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert (folder / "notes.txt").read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == [
        "pipeline"
    ]
    assert type(OODPipeline.from_pretrained(folder).detector) is Mahalanobis
    _pipeline(MODELS["pooled"](bert_folder), data, "knn").save_pretrained(folder)
    (folder / "model" / "model.safetensors").write_bytes(weights[:-4] + bytes(4))
    with pytest.raises(
        ValueError, match="model/model.safetensors' isn't the file that was saved with ood_pipeline.json"
    ):
        OODPipeline.from_pretrained(folder)


def test_labels_scores_and_the_threshold(data, bert_folder):
    model = PooledClassifier.from_backbone(bert_folder, 6)
    trained = train(
        model,
        tiny_tokenizer(),
        data,
        TrainingOptions(epochs=30, patience=None, batch_size=8, head_learning_rate=2e-2),
        2e-3,
        0,
    )
    assert trained.validation_accuracy > 0.8
    pipeline = _pipeline(model, data, id_recall=0.9)
    validation = pipeline(data.validation[0])
    assert np.mean([row["in_distribution"] for row in validation]) >= 0.9
    test, outside = pipeline(data.test[0]), pipeline(data.outside)
    assert np.mean([row["label"] == data.labels[label] for row, label in zip(test, data.test[1])]) > 0.75
    assert all(row["in_distribution"] == (row["score"] >= pipeline.threshold) for row in [*test, *outside])
    strict = _pipeline(model, data, id_recall=0.2)
    assert strict.threshold > pipeline.threshold
    assert np.mean([row["in_distribution"] for row in strict(data.validation[0])]) < 0.5
    one = pipeline(data.test[0][0])
    assert set(one) == {"label", "score", "in_distribution"} and one["label"] in LABELS
    assert isinstance(one["score"], float) and isinstance(one["in_distribution"], bool)


def test_thresholds_of_each_class_and_by_examples_from_outside(data, bert_folder, tmp_path):
    model, (texts, labels), outside = PooledClassifier.from_backbone(bert_folder, 6), data.validation, data.outside
    plain = _pipeline(model, data)
    own = _pipeline(model, data, thresholds="per-class")
    assert plain.offsets is None and len(own.offsets) == 6
    predicted = own.predict(texts)
    expected = predicted.scores >= own.threshold + np.array(own.offsets)[predicted.classes]
    assert (predicted.in_distribution == expected).all() and any(own.offsets)
    own.save_pretrained(tmp_path / "own")
    again = OODPipeline.from_pretrained(tmp_path / "own")
    assert again.offsets == own.offsets
    assert (again.predict(texts).in_distribution == predicted.in_distribution).all()

    names = [data.labels[label] for label in labels]
    told = _pipeline(model, data, outside_texts=outside, validation_labels=names)
    same = _pipeline(model, data, outside_texts=outside, validation_labels=labels)
    right = plain.predict(texts).classes == np.array(labels)
    chosen = best_threshold(plain.predict(texts).scores, plain.predict(outside).scores, right=right)
    assert told.threshold == same.threshold == chosen
    wary = _pipeline(model, data, outside_texts=outside, outside_share=0.99)
    assert wary.threshold >= told.threshold

    for options, match in (
        ({"thresholds": "each"}, "thresholds='each' is unknown"),
        ({"validation_labels": names}, "used beside outside_texts alone"),
        ({"validation_labels": names[1:], "outside_texts": outside}, "labels for"),
        ({"validation_labels": ["no"] * len(names), "outside_texts": outside}, "'no', which is no class"),
    ):
        with pytest.raises(ValueError, match=match):
            _pipeline(model, data, **options)
    with pytest.raises(ValueError, match="offsets=.*each of the 6 classes"):
        OODPipeline(model, tiny_tokenizer(), plain.detector, 0.0, data.labels, offsets=[1.0])
    path = tmp_path / "own" / "ood_pipeline.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "offsets": [0.0]}))
    with pytest.raises(ValueError, match="offsets has 1 numbers for 6 labels"):
        OODPipeline.from_pretrained(tmp_path / "own")


def test_a_base_that_is_given(data, bert_folder, tmp_path):
    """An adapter on a base that its config can't name, such as a calibrated one."""
    adapted = get_peft_model(PooledClassifier.from_backbone(bert_folder, 6), LoraConfig(task_type="SEQ_CLS"))
    adapted.peft_config["default"].base_model_name_or_path = "nowhere"
    pipeline = _pipeline(adapted, data)
    pipeline.save_pretrained(tmp_path)
    base = PooledClassifier.from_backbone(bert_folder, 6)
    again = OODPipeline.from_pretrained(tmp_path, model=base)
    assert again(data.outside[0])["score"] == pytest.approx(pipeline(data.outside[0])["score"], rel=1e-4)


def test_an_adapter_on_the_default_model(data, llama_folder, tmp_path, monkeypatch):
    """Its file names the model as the user does, not by where the package happens to lie here."""
    monkeypatch.setattr("peft_ext.models._default_source", lambda: ModelSource(llama_folder))
    adapted = get_peft_model(PooledClassifier.from_backbone(None, 6), LoraConfig(task_type="SEQ_CLS"))
    pipeline = _pipeline(adapted, data)
    pipeline.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == DEFAULT_MODEL
    again = OODPipeline.from_pretrained(tmp_path)
    assert again(data.outside[0])["score"] == pytest.approx(pipeline(data.outside[0])["score"], rel=1e-4)


def test_labels_come_from_the_config(data, bert_folder):
    model = MODELS["transformers"](bert_folder)
    model.config.id2label = dict(enumerate("abcdef"))
    pipeline = OODPipeline(model, tiny_tokenizer(), MSP().fit(logits=torch.zeros(1, 6)), 0.0)
    assert pipeline("w5")["label"] in set("abcdef") and pipeline("w5")["in_distribution"]


def test_pushing_uploads_the_folder(data, bert_folder, tmp_path, monkeypatch):
    """As any model of transformers: `push_to_hub` saves into a folder and uploads it."""
    uploaded = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, repo_id, operations, **kwargs):
            uploaded[repo_id] = {operation.path_in_repo for operation in operations}

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("intents"))
    _pipeline(MODELS["pooled"](bert_folder), data).push_to_hub("me/intents")
    expected = {
        "ood_pipeline.json",
        "detector/detector.json",
        "model/config.json",
        "model/model.safetensors",
        "README.md",
    }
    assert expected <= uploaded["me/intents"]


def test_bad_input(data, bert_folder, tmp_path):
    pipeline = _pipeline(MODELS["pooled"](bert_folder), data)
    for inputs, match in (([], "empty"), (["w5", None], "None, a NoneType"), ([3], "3, a int")):
        with pytest.raises(ValueError, match=match):
            pipeline(inputs)
    with pytest.raises(FileNotFoundError, match=r"ood_pipeline\.json"):
        OODPipeline.from_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "ood_pipeline.json").read_text())
    (tmp_path / "ood_pipeline.json").write_text(json.dumps({**config, "format": 9}))
    with pytest.raises(ValueError, match="format is 9.*later version"):
        OODPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="id_recall|recall=0"):
        _pipeline(MODELS["pooled"](bert_folder), data, id_recall=0)
    with pytest.raises(ValueError, match="numbers of examples differ"):
        OODPipeline.fit(pipeline.model, tiny_tokenizer(), data.train[0], [0], data.validation[0])
    other = Mahalanobis().fit(torch.randn(10, 7), labels=[0, 1] * 5)
    with pytest.raises(ValueError, match="size 32.*fitted on features of size 7"):
        OODPipeline(pipeline.model, tiny_tokenizer(), other, 0.0, data.labels)("w5")


def test_labels_that_the_adapter_does_not_have(data, bert_folder, tmp_path):
    _pipeline(MODELS["pooled-lora"](bert_folder), data).save_pretrained(tmp_path)
    path = tmp_path / "ood_pipeline.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "labels": config["labels"][1:]}))
    with pytest.raises(
        ValueError, match=r"ood_pipeline.json': labels has 5 classes.*doesn't fit such a model \(size mismatch"
    ):
        OODPipeline.from_pretrained(tmp_path)
