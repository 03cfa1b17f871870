# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Equal budgets: sizes solved from a config, and models that train so many numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel

from peft_ext.ood.classifier import PooledClassifier
from peft_ext.ood.study.methods import METHODS, NotPossibleError, apply, get_method, solve, trained_parameters


IDS = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
MASK = (IDS != 0).long()
SIZED = [name for name, method in METHODS.items() if method.config is not None]


def _classifier(folder: str, **kwargs) -> PooledClassifier:
    return PooledClassifier.from_backbone(folder, 3, **kwargs)


@pytest.fixture(params=["bert", "llama"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.mark.parametrize("name", METHODS)
def test_applied_as_solved(name, folder):
    """What is solved on the meta device is what is trained; the best of all sizes."""
    model = _classifier(folder)
    total = sum(parameter.numel() for parameter in model.backbone.parameters())
    budget = 0.03  # of a tiny model, whose biases alone are more than one percent
    solution = solve(name, model.config, budget)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    adapted = apply(name, model, solution.size, [batch])
    if name == "full":
        assert trained_parameters(adapted) == solution.parameters == total
    elif name == "linear":
        assert solution.parameters == 0
    else:
        assert trained_parameters(adapted) == solution.parameters
        assert abs(solution.parameters - budget * total) < 0.5 * budget * total
    assert any(parameter.requires_grad for n, parameter in adapted.named_parameters() if ".score." in f".{n}")
    output = adapted(**batch, labels=torch.tensor([0, 2]))
    output.loss.backward()
    assert output.logits.shape == (2, 3) and torch.isfinite(output.loss)


@pytest.mark.parametrize("name", SIZED)
def test_the_closest_size_is_taken(name, bert_folder):
    """No neighbouring size comes closer to the budget."""
    model = _classifier(bert_folder)
    total = sum(parameter.numel() for parameter in model.backbone.parameters())
    for budget in (0.05, 0.1):
        try:
            solution = solve(name, model.config, budget)
        except NotPossibleError:
            continue
        off = abs(solution.parameters - budget * total)
        for size in (solution.size - 1, solution.size + 1) if METHODS[name].grows else (-1, 8, 16, 32):
            if size == 0:
                continue
            batch = {"input_ids": IDS, "attention_mask": MASK}
            assert (
                abs(trained_parameters(apply(name, _classifier(bert_folder), size, [batch])) - budget * total) >= off
            )


def test_budgets_out_of_reach(bert_folder):
    config = _classifier(bert_folder).config
    with pytest.raises(NotPossibleError, match="lora has no size near a budget of 0.01%.*rank 1, trains"):
        solve("lora", config, 0.0001)
    with pytest.raises(ValueError, match="budget=2"):
        solve("lora", config, 2)
    with pytest.raises(ValueError, match="method 'adapter' is unknown.*'bottleneck'"):
        get_method("adapter")


def test_a_model_that_cannot_be_prefixed():
    config = DistilBertConfig(
        vocab_size=100, dim=32, n_layers=1, n_heads=2, hidden_dim=64, pooling="mean", num_labels=3
    )
    model = PooledClassifier(config, DistilBertModel(config))
    with pytest.raises(NotPossibleError, match="PEFT can't prefix a DistilBertModel"):
        apply("prefix", model, 4)


def test_pooling_and_layers(bert_folder, llama_folder):
    for folder, pooling in ((bert_folder, "mean"), (llama_folder, "last")):
        model = _classifier(folder).eval()
        assert model.config.pooling == pooling
        states = model.backbone(input_ids=IDS, attention_mask=MASK).last_hidden_state
        expected = (
            torch.stack([states[0, :3].mean(0), states[1].mean(0)]) if pooling == "mean" else states[[0, 1], [2, 3]]
        )
        logits = model(input_ids=IDS, attention_mask=MASK).logits
        torch.testing.assert_close(logits, expected @ model.score.weight.T)
    assert _classifier(llama_folder, layers=1).config.num_hidden_layers == 1
    short = _classifier(llama_folder, layers=1).eval()
    assert len(short.backbone.layers) == 1 and torch.isfinite(short(input_ids=IDS).logits).all()
    with pytest.raises(ValueError, match="layers=3: the model has 2"):
        _classifier(llama_folder, layers=3)
    with pytest.raises(ValueError, match="pooling='max'"):
        _classifier(llama_folder, pooling="max")


def test_left_padding_makes_no_difference(llama_folder):
    model = _classifier(llama_folder).eval()
    left = torch.tensor([[0, 5, 6, 7]])
    positions = torch.tensor([[0, 0, 1, 2]])
    found = model(input_ids=left, attention_mask=(left != 0).long(), position_ids=positions).logits
    torch.testing.assert_close(found, model(input_ids=left[:, 1:]).logits, rtol=1e-4, atol=1e-5)


def test_round_trip(bert_folder, tmp_path):
    model = _classifier(bert_folder, pooling="first").eval()
    model.save_pretrained(tmp_path)
    again = PooledClassifier.from_pretrained(tmp_path).eval()
    assert again.config.pooling == "first"
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
