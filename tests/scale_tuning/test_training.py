# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Training steps: what gets gradients, what changes, in which precision, with which memory savers."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

from tests.cases import (
    CASES,
    TRANSFORMERS_CASES,
    adapter_parameters,
    assert_differs,
    assert_same,
    loss_of,
    once_per_architecture,
    over,
    prefix_of,
    train,
    tuner_layers,
)


FEW_NAMES = ("peqa-llama-3bit-groups", "peqa-gpt2-4bit", "peqa-opt-4bit", "peqa-t5-4bit", "peqa-bert-4bit")
FEW_NAMES += ("alphatuning-llama-4bit", "alphatuning-bert-all", "bottleneck-llama", "bottleneck-t5")
FEW = [case for case in CASES if case.name in FEW_NAMES]
few_cases = over(FEW)
transformers_cases = over(TRANSFORMERS_CASES)


def _gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _is_trained(model, name: str) -> bool:
    return name in adapter_parameters(model) or ".modules_to_save.default." in name


def test_only_the_adapter_gets_gradients(case):
    model = case.moved()
    gradients = _gradients(model, case.inputs())
    expected = {name for name, _ in model.named_parameters() if _is_trained(model, name)}
    assert set(gradients) == expected
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert all(gradients[name].abs().sum() > 0 for name in adapter_parameters(model))


def test_only_the_adapter_changes(case):
    model = case.fresh()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert set(before) >= {name for name, _ in model.named_parameters()}
    losses = train(model, case.inputs(), steps=3, lr=case.lr)
    assert losses[-1] < losses[0]
    for key, value in model.state_dict().items():
        if _is_trained(model, key):
            assert not torch.equal(value, before[key]), f"{key} did not change"
        else:
            assert torch.equal(value, before[key]), f"{key} changed"


def test_disable_adapter_after_training_is_the_base_of_the_start(case):
    model = case.fresh()
    base = case.logits(model)
    train(model, case.inputs(), lr=3e-2)
    trained = case.logits(model)
    assert_differs(trained, base)
    with model.disable_adapter():
        assert_same(case.logits(model), base)
    if not case.merges:
        return
    model.merge_adapter()
    assert_same(case.logits(model), trained)
    with model.disable_adapter():
        assert_same(case.logits(model), base)


@few_cases
def test_training_goes_on_after_a_round_trip(case, tmp_path):
    model = case.fresh()
    train(model, case.inputs())
    model.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(case.float_model(), tmp_path, is_trainable=True)
    assert_same(case.logits(restored.eval()), case.logits(model), tolerance=1e-5)
    expected = loss_of(model, case.inputs()).item()
    assert train(restored, case.inputs(), steps=2)[0] == pytest.approx(expected, rel=1e-4)


@transformers_cases
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(case, use_reentrant):
    model = case.moved()
    expected = _gradients(model, case.inputs())
    model.train()
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    gradients = _gradients(model, case.inputs())
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert_same(gradients[name], gradient, tolerance=1e-4)


@few_cases
def test_prepare_model_for_kbit_training(case):
    """The helper that QLoRA users call on the base first; with us it is not needed but does no harm."""
    model = case.float_model()
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    peft_model = get_peft_model(prepared, case.config()).train()
    gradients = _gradients(peft_model, case.inputs())
    assert set(adapter_parameters(peft_model)) <= set(gradients)


@few_cases
def test_bfloat16_base_trains_float32_adapters(case):
    model = case.fresh(dtype=torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    losses = train(model, case.inputs(), steps=4, lr=case.lr)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert case.logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@few_cases
def test_autocast(case, dtype):
    model = case.moved()
    batch = case.inputs()
    expected = _gradients(model, batch)
    reference = case.logits(model)
    with torch.autocast("cpu", dtype=dtype):
        logits = case.logits(model)
        model.zero_grad()
        loss = loss_of(model, batch)
    loss.backward()
    assert_same(logits, reference, tolerance=0.15)
    parameters = adapter_parameters(model)
    assert {parameter.grad.dtype for parameter in parameters.values()} == {torch.float32}
    found = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
    exact = torch.cat([expected[name].flatten() for name in parameters])
    assert torch.cosine_similarity(found, exact, dim=0) > 0.95


@once_per_architecture
def test_inference_mode_trains_nothing(case):
    model = case.fresh(inference_mode=True)
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model).values())
    assert not loss_of(model, case.inputs()).requires_grad or model.modules_to_save


@few_cases
def test_only_the_active_adapter_learns(case):
    model = case.with_two_adapters()
    model.set_adapter("other")
    before = {name: parameter.clone() for name, parameter in adapter_parameters(model).items()}
    moving = {name: parameter.clone() for name, parameter in adapter_parameters(model, "other").items()}
    train(model, case.inputs())
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())
    assert not any(torch.equal(p, moving[name]) for name, p in adapter_parameters(model, "other").items())


def test_gradients_add_up_over_micro_batches(case):
    model = case.moved()
    batch = case.inputs()
    whole = _gradients(model, batch)
    model.zero_grad()
    for row in range(3):
        loss = loss_of(model, {key: value[row : row + 1] for key, value in batch.items()})
        (loss / 3).backward()
    for name in adapter_parameters(model):
        assert_same(model.get_parameter(name).grad, whole[name], tolerance=1e-4)


def test_a_frozen_layer_passes_gradients_to_its_inputs(case):
    """Layers without trained scales (disabled) are still part of the graph for what comes before them."""
    model = case.moved()
    layers = list(tuner_layers(model))
    first, last = layers[0], layers[-1]
    if first == last:
        pytest.skip("a single layer")
    for name, parameter in adapter_parameters(model).items():
        parameter.requires_grad_(name.startswith(f"{first}."))
    gradients = _gradients(model, case.inputs())
    assert any(name.startswith(f"{first}.{prefix_of(model)}") for name in gradients)
    assert not any(name.startswith(f"{last}.{prefix_of(model)}") for name in gradients)


@few_cases
def test_layers_to_transform(case, tmp_path):
    names = sorted({name.rsplit(".", 1)[-1] for name in case.fresh().base_model.targeted_module_names})
    model = case.moved(layers_to_transform=[1], target_modules=names)
    assert len(tuner_layers(model)) == len(tuner_layers(case.fresh(target_modules=names))) / 2 or case.model == "bert"
    assert set(_gradients(model, case.inputs())) >= set(adapter_parameters(model))
    model.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(case.float_model(), tmp_path)
    assert_same(case.logits(restored), case.logits(model), tolerance=1e-5)
