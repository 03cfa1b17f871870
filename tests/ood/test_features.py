# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Features are what the head sees: times its weight, they are the logits, for every kind of classifier."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_ext.ood.classifier import PooledClassifier
from peft_ext.ood.features import chosen_layers, extract
from tests.tiny.models import tiny
from tests.tiny.tokenizers import tiny_tokenizer


TEXTS = ["w5 w6", "w7", "w8 w9 w10 w11 w12", "w13 w14 w15", "w5 w6"]


def _llama() -> nn.Module:
    config = tiny("llama").config
    config.num_labels = 3
    return transformers.LlamaForSequenceClassification(config)


def _roberta() -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config)


HEADS = {
    "llama": (_llama, "score"),
    "bert": (lambda: tiny("bert"), "classifier"),
    "roberta": (_roberta, "classifier.out_proj"),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("kind", HEADS)
def test_features_of_transformers_own_classifiers(kind, adapted):
    make, head = HEADS[kind]
    model = make().eval()
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS"))
    found = extract(model, tiny_tokenizer(), TEXTS, batch_size=2)
    layer = (model.get_base_model() if adapted else model).get_submodule(head)
    if hasattr(layer, "modules_to_save"):
        layer = layer.modules_to_save["default"]
    elif not hasattr(layer, "weight"):
        layer = layer.out_proj.modules_to_save["default"]
    torch.testing.assert_close(layer(found.features), found.logits, rtol=1e-4, atol=1e-5)
    one = extract(model, tiny_tokenizer(), [TEXTS[3]])
    torch.testing.assert_close(found.features[3:4], one.features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.features[0], found.features[4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.features[0], found.features[1])


def test_pooled_classifier(bert_folder):
    model = PooledClassifier.from_backbone(bert_folder, 5).train()
    found = extract(model, tiny_tokenizer(), TEXTS)
    torch.testing.assert_close(model.score(found.features), found.logits)
    assert model.training and not found.features.requires_grad


def test_every_modules_own_mode_comes_back(bert_folder):
    model = PooledClassifier.from_backbone(bert_folder, 5).train()
    model.backbone.eval()
    extract(model, tiny_tokenizer(), TEXTS)
    assert model.training and model.score.training and not any(m.training for m in model.backbone.modules())


def test_a_text_without_tokens_is_read_as_the_start_of_a_text():
    """(A pipeline died of an empty text where the tokenizer puts nothing around texts.)"""
    found = extract(_llama().eval(), tiny_tokenizer(), ["w5 w6", "", "w7"])
    assert torch.isfinite(found.logits).all() and not torch.equal(found.features[1], found.features[0])
    assert extract(_llama().eval(), tiny_tokenizer(), [""]).features.shape == (1, 32)


def test_models_that_have_no_features():
    with pytest.raises(ValueError, match="no linear layer makes this model's logits|has no config"):
        extract(tiny("mlp"), tiny_tokenizer(), TEXTS)
    with pytest.raises(ValueError, match="texts is empty"):
        extract(tiny("bert"), tiny_tokenizer(), [])


@pytest.mark.parametrize("kind", ["llama", "bert", "pooled"])
def test_layers_are_transformers_hidden_states(kind, bert_folder):
    """Pooled as the classifier does, of length 1 each, in front of what the head sees."""
    pooled = kind == "pooled"
    model = (PooledClassifier.from_backbone(bert_folder, 3) if pooled else HEADS[kind][0]()).eval()
    count = model.config.num_hidden_layers
    found = extract(model, tiny_tokenizer(), TEXTS, layers=[1, -1], batch_size=2)
    plain = extract(model, tiny_tokenizer(), TEXTS)
    torch.testing.assert_close(found.logits, plain.logits)
    blocks = found.features.unflatten(1, (-1, plain.features.shape[1]))
    assert blocks.shape[1] == (3 if count > 1 else 2)
    torch.testing.assert_close(blocks[:, -1], nn.functional.normalize(plain.features, dim=-1))
    ids = torch.tensor(tiny_tokenizer()([TEXTS[2]])["input_ids"])
    body = model.backbone if pooled else model
    with torch.no_grad():
        state = body(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
    expected = state[-1] if kind == "llama" else state.mean(dim=0)
    torch.testing.assert_close(blocks[2, 0], nn.functional.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)


def test_which_layers():
    model = tiny("bert")
    count = model.config.num_hidden_layers
    assert chosen_layers(model, None) == chosen_layers(model, ()) == [] and chosen_layers(model, [-1, 1]) == [
        *dict.fromkeys([1, count])
    ]
    for wrong, match in (
        ([0], "0 is none of"),
        ([count + 1], "is none of"),
        ([True], "True is none"),
        ("all", "'all'"),
    ):
        with pytest.raises(ValueError, match=match):
            chosen_layers(model, wrong)
