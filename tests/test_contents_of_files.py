# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Detectors, pipelines, PALP classifiers, critics and C-DNPG models are judged by what their files hold.

Each kind is saved, changed as somebody's script or a bad disk would change it, and loaded: the change is refused with file
and field, or it changes nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file


pytest.importorskip("sklearn", reason="some of the kinds are fitted by scikit-learn")
from generation_ext import CDNPGForConditionalGeneration  # noqa: E402
from generation_ext.critic import Critic  # noqa: E402
from generation_ext.granularity.modeling import CDNPGConfig  # noqa: E402
from generation_ext.probing import PALPClassifier  # noqa: E402
from peft_ext.ood.classifier import PooledClassifier  # noqa: E402
from peft_ext.ood.detectors import (  # noqa: E402
    KNN,
    Energy,
    Mahalanobis,
    MahalanobisCosine,
    MaxCosine,
    RelativeMahalanobis,
    ViM,
    load_detector,
)
from peft_ext.ood.pipeline import OODPipeline  # noqa: E402
from peft_ext.tensor_files import carries_digest, read_header  # noqa: E402
from tests.tiny.models import tiny  # noqa: E402
from tests.tiny.tokenizers import tiny_tokenizer  # noqa: E402


RANDOM = np.random.default_rng(0)
FEATURES, LOGITS, LABELS = RANDOM.normal(size=(60, 6)), RANDOM.normal(size=(60, 3)), np.arange(60) % 3


class Lengths:
    """Features of texts that need no model."""

    def extract(self, texts, prefix=""):
        return np.array([[len(text), text.count("a"), len(prefix)] for text in texts], np.float32)


TEXTS = ["a fine film", "two lost hours", "a joy and a half", "boring"] * 4


def _detector(detector):
    def build(folder):
        detector.fit(FEATURES, LOGITS, LABELS).save_pretrained(folder)

    return build, lambda folder: load_detector(folder).score(FEATURES, LOGITS), "detector.safetensors", "detector.json"


def _palp(head):
    def build(folder):
        palp = PALPClassifier(Lengths(), template="{text}:", demonstrations="per-class", head=head, permutations=1)
        palp.fit(TEXTS, ["p", "n"] * 8).save_pretrained(folder)

    def load(folder):
        return PALPClassifier.from_pretrained(folder, Lengths()).decision_scores(TEXTS)

    return build, load, "head.safetensors", "palp.json"


def _critic(folder):
    torch.manual_seed(0)
    critic = Critic.for_model(tiny("llama"), head="mlp", mlp_size=4, action_values=True)
    for parameter in critic.parameters():
        parameter.data.normal_()
    critic.save_pretrained(folder)


def _cdnpg(folder):
    torch.manual_seed(0)
    sizes = {
        f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    CDNPGForConditionalGeneration(CDNPGConfig(vocab_size=12, d_model=8, **sizes)).save_pretrained(folder)


def _paraphrase(folder):
    ids = torch.arange(3, 9)[None]
    model = CDNPGForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=ids).logits.numpy()


def _pipeline(folder):
    torch.manual_seed(0)
    config = tiny("llama").config
    config.pooling, config.num_labels = "last", 2
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    model = PooledClassifier(config).eval()
    options = {"detector": "cosine", "label_names": ["a", "b"], "max_length": 16}
    OODPipeline.fit(model, tokenizer, TEXTS, [0, 1] * 8, TEXTS[:8], **options).save_pretrained(folder)


def _pipelines_scores(folder):
    return OODPipeline.from_pretrained(folder).predict(TEXTS).scores


HIDDEN = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
# By kind: what saves one, what loads and uses it, the tensors' file, the JSON.
KINDS = {
    **{
        each.name: _detector(each)
        for each in (Energy(), Mahalanobis(), RelativeMahalanobis(), MahalanobisCosine(), KNN(3), MaxCosine(), ViM(2))
    },
    **{f"palp-{head}": _palp(head) for head in ("logistic", "knn", "mlp")},
    "critic": (
        _critic,
        lambda folder: Critic.from_pretrained(folder).value(HIDDEN.repeat(1, 2)).detach().numpy(),
        "model.safetensors",
        "config.json",
    ),
    "c-dnpg": (_cdnpg, _paraphrase, "model.safetensors", "config.json"),
    "pipeline": (_pipeline, _pipelines_scores, "model/model.safetensors", "ood_pipeline.json"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    build, load, tensors, settings = KINDS[request.param]
    folder = tmp_path_factory.mktemp("kinds") / request.param
    build(folder)
    return request.param, folder, load, tensors, settings, load(folder)


@pytest.fixture
def saved(kind, tmp_path):
    name, folder, load, tensors, settings, expected = kind
    copy = shutil.copytree(folder, tmp_path / "copy")
    return name, copy, load, copy / tensors, copy / settings, expected


def forget_digests(folder: Path) -> None:
    """As an earlier version wrote the JSON: without what tells which files belong to it."""
    for path in folder.rglob("*.json"):
        value = json.loads(path.read_text())
        if isinstance(value, dict) and value.pop("files", None) is not None:
            value.pop("state", None)
            path.write_text(json.dumps(value))


def test_sealed_and_the_same_when_loaded(saved):
    _, folder, load, tensors, _, expected = saved
    assert carries_digest(tensors)
    np.testing.assert_allclose(load(folder), expected, rtol=1e-6)


def test_without_digests_the_contents_count(saved):
    name, folder, load, path, _, expected = saved
    forget_digests(folder)
    stored = load_file(path)
    save_file(stored, path, metadata={"format": "pt"})
    np.testing.assert_allclose(load(folder), expected, rtol=1e-6)
    changes = {
        "nan": lambda tensor: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else None,
        "integers": lambda tensor: tensor.int(),
        "more dimensions": lambda tensor: tensor[None],
        "empty": lambda tensor: tensor[:0].clone() if tensor.dim() else None,
        "missing": lambda tensor: "missing",
    }
    for key in list(stored)[:4]:
        for what, change in changes.items():
            changed = change(stored[key])
            if changed is None:
                continue
            left = {other: tensor for other, tensor in stored.items() if other != key}
            save_file(left if what == "missing" else {**left, key: changed}, path, metadata={"format": "pt"})
            try:
                found = load(folder)
            except ValueError as error:
                assert key in str(error) and "\n" not in str(error), (key, what)
            else:  # such as a bias of zeros that is missing
                np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=f"{key}: {what}")
    save_file({**stored, "more": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="more (belongs to nothing there|has no place)"):
        load(folder)


def test_a_changed_tensor_is_noticed(saved, monkeypatch):
    _, folder, load, path, _, _ = saved
    forget_digests(folder)  # those of folders would notice it as well
    stored = load_file(path)
    key = next((name for name, tensor in stored.items() if tensor.is_floating_point() and tensor.any()), None)
    if key is None:
        return  # nothing is learned
    save_file({**stored, key: -stored[key]}, path, metadata=read_header(path).metadata)
    with pytest.raises(ValueError, match=rf"{path.name}': the tensors aren't those that were written"):
        load(folder)
    monkeypatch.setenv("PEFT_EXT_VERIFY_DIGESTS", "0")
    load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a":' + b"[" * 50_000, "{'ä".encode("latin-1")])
def test_json_that_is_no_object_names_the_file(saved, content):
    _, folder, load, _, path, _ = saved
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=path.name):
        load(folder)


# By kind fields (`a.b`: b within a), and values that they can't have.
VALUES = {
    "energy": {"params.temperature": [float("nan"), 0, "1", True, None], "n_logits": [-1, "3", None, 2.0]},
    "knn": {"params.k": ["3", 0, True, 1000, 3.0], "params.normalize": [1, "yes"], "n_features": [0, "6", None]},
    "mahalanobis": {
        "params.covariance": ["none", 1],
        "detector": ["odin", [1], None],
        "params": [[1], None, {"k": 1}],
    },
    "mahalanobis_cosine": {"params.shrinkage": [0, 1.5, "1", True, None]},
    "vim": {"params.dim": ["2", 0, True], "format": [2, True, "1", None]},
    "palp-logistic": {
        "classes": ["pn", ["p"], ["p", "p"], ["p", "n", "q"], None],
        "words": [[1, 2], ["p"], "pn"],
        "demonstrations": [[["a"]], "ab", [[1, 2, 3]]],
        "params.head": ["tree", [1], None],
        "params.permutations": [0, True, "1"],
        "params.max_length": [0, "9"],
        "params.strange": [1],
        "params.template": ["x", "{", 3],
        "base_model": [3, None, {"name": "x"}],
    },
    "critic": {
        "hidden_size": ["32", -1, None],
        "lora_alpha": [float("nan"), "16", 0],
        "control_codes": ["abc", [1]],
        "lora_layers": [{"x": [1]}, [1]],
        "base_model_fingerprint": [3],
        "prompt_template": ["x", "{"],
    },
    "pipeline": {
        "threshold": [float("nan"), float("-inf"), "0.5", True, 10**400, None],
        "labels": ["ab", ["a"], [], [None, None]],
        "max_length": [-1, 0, "16", 16.0],
        "batch_size": [0, None],
        "adapter": [1, "no"],
        "pooling": ["all"],
        "format": ["1", 2],
    },
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_a_field_cannot_have_names_it(name, tmp_path):
    build, load, _, settings = KINDS[name]
    build(tmp_path / "saved")
    path = tmp_path / "saved" / settings
    content = json.loads(path.read_text())
    content.pop("state", None)  # as an earlier version's, so that nothing but the fields tells
    content = json.dumps(content)
    for field, values in VALUES[name].items():
        outer, _, inner = field.rpartition(".")
        for value in values:
            changed = json.loads(content)
            (changed[outer] if outer else changed)[inner] = value
            path.write_text(json.dumps(changed))
            with pytest.raises((ValueError, TypeError), match=inner) as error:
                load(tmp_path / "saved")
            assert type(error.value).__name__ not in ("KeyError", "JSONDecodeError", "TypeError"), (field, value)
        if field not in ("params.strange", "base_model"):
            changed = json.loads(content)
            del (changed[outer] if outer else changed)[inner]
            path.write_text(json.dumps(changed))
            try:
                load(tmp_path / "saved")  # a default, as an earlier version's
            except ValueError as error:
                assert inner in str(error) or "config.json it must be" in str(error)
