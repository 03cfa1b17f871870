# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Different adapters for the samples of one batch (`adapter_names=`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from peft_ext import PeqaConfig
from peft_ext.scale_tuning.layer import ScaleTuningLinear
from tests.cases import (
    CASES,
    ONE_PER_ARCHITECTURE,
    assert_differs,
    assert_same,
    move_adapter,
    once_per_architecture,
    over,
    tuner_layers,
)
from tests.tiny.models import tiny


NAMES = ["default", "__base__", "other"]
# OPT flattens batch and tokens before its feed-forward layers, which leaves no samples to tell apart (as with LoRA).
OPT_ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
MIXED_CASES = [replace(case, kwargs=OPT_ATTENTION) if case.model == "opt" else case for case in CASES]
MIXED_CASES_THAT_GENERATE = [case for case in MIXED_CASES if case.generates]
mixed_cases = over(MIXED_CASES)


def _expected(case, model) -> torch.Tensor:
    """Each row as its own adapter alone computes it."""
    rows = []
    for index, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(case.logits(model)[index])
        else:
            model.set_adapter(name)
            rows.append(case.logits(model)[index])
    model.set_adapter("default")
    return torch.stack(rows)


@mixed_cases
def test_each_row_gets_its_own_adapter(case):
    model = case.with_two_adapters()
    expected = _expected(case, model)
    plain = case.logits(model)
    mixed = case.logits(model, adapter_names=NAMES)
    assert_same(mixed, expected)
    assert_differs(mixed[1:], plain[1:])
    assert torch.equal(case.logits(model), plain)  # nothing is left behind


@mixed_cases
def test_all_rows_of_one_adapter(case):
    model = case.with_two_adapters()
    model.set_adapter("other")
    expected = case.logits(model)
    model.set_adapter("default")
    assert_same(case.logits(model, adapter_names=["other"] * 3), expected)
    with model.disable_adapter():
        base = case.logits(model)
    assert_same(case.logits(model, adapter_names=["__base__"] * 3), base)


@once_per_architecture
def test_a_disabled_model_ignores_the_names(case):
    model = case.with_two_adapters()
    with model.disable_adapter():
        assert torch.equal(case.logits(model, adapter_names=NAMES), case.logits(model))


@once_per_architecture
def test_unknown_name(case):
    model = case.with_two_adapters()
    with pytest.raises(ValueError, match="non-existing adapter.*nobody"):
        case.logits(model, adapter_names=["default", "nobody", "__base__"])
    assert torch.isfinite(case.logits(model)).all()


@once_per_architecture
@pytest.mark.parametrize("names", [["default"], ["default"] * 4, []], ids=["short", "long", "empty"])
def test_wrong_number_of_names(case, names):
    model = case.with_two_adapters()
    before = case.logits(model)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        case.logits(model, adapter_names=names)
    assert torch.equal(case.logits(model), before)  # the hooks are gone after the error


@once_per_architecture
def test_names_must_be_a_list(case):
    model = case.with_two_adapters()
    with pytest.raises(TypeError, match="adapter names"):
        case.logits(model, adapter_names="default")


@once_per_architecture
def test_training_mode_is_refused(case):
    model = case.with_two_adapters().train()
    with pytest.raises(ValueError, match="training mode"):
        case.logits(model, adapter_names=NAMES)


@over([case for case in ONE_PER_ARCHITECTURE if case.merges])
def test_merged_adapters_are_refused(case):
    model = case.with_two_adapters()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        case.logits(model, adapter_names=NAMES)


@over(MIXED_CASES_THAT_GENERATE)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate(case, beams):
    model = case.with_two_adapters()
    batch = {key: value for key, value in case.inputs().items() if key != "decoder_input_ids"}
    kwargs = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    rows = []
    for index, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model.generate(**batch, **kwargs)[index])
        else:
            model.set_adapter(name)
            rows.append(model.generate(**batch, **kwargs)[index])
    model.set_adapter("default")
    mixed = model.generate(**batch, **kwargs, adapter_names=NAMES)
    assert torch.equal(mixed, torch.stack(rows))


def test_adapters_on_different_layers():
    """A layer that lacks a row's adapter gives that row the base."""
    model = get_peft_model(tiny("llama"), PeqaConfig(target_modules=["q_proj", "up_proj"]))
    with pytest.warns(UserWarning, match="float so far"):
        model.add_adapter("other", PeqaConfig(target_modules=["up_proj", "down_proj"]))
    for seed, name in enumerate(("default", "other")):
        move_adapter(model, name, seed=seed)
    model.eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    with torch.no_grad():
        mixed = model(ids, adapter_names=["other", "__base__", "default"]).logits
        alone = model(ids).logits[2]
        model.set_adapter("other")
        other = model(ids).logits[0]
        with model.disable_adapter():
            base = model(ids).logits[1]
    assert_same(mixed, torch.stack([other, base, alone]))


def test_modules_to_save_are_mixed_too():
    model = get_peft_model(tiny("bert"), PeqaConfig(task_type="SEQ_CLS"))
    model.add_adapter("other", PeqaConfig(task_type="SEQ_CLS"))
    move_adapter(model, "other")
    model.eval()
    classifier = model.base_model.model.classifier.modules_to_save
    classifier["other"].weight.data.normal_(std=0.2)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    with torch.no_grad():
        mixed = model(ids, adapter_names=["default", "other", "default"]).logits
        first = model(ids).logits
        model.set_adapter("other")
        second = model(ids).logits
    assert_same(mixed, torch.stack([first[0], second[1], first[2]]))


def test_more_dimensions_and_one_row():
    """Samples are the first dimension, whatever comes after it."""
    model = get_peft_model(tiny("mlp"), PeqaConfig(target_modules=["lin0"], group_size=5)).eval()
    model.add_adapter("other", PeqaConfig(target_modules=["lin0"], group_size=5))
    move_adapter(model, "other")
    model.eval()
    layer = next(iter(tuner_layers(model).values()))
    x = torch.randn(2, 3, 4, 10)
    with torch.no_grad():
        mixed = layer(x, adapter_names=["default", "other"])
        assert mixed.shape == (2, 3, 4, 32)
        assert_same(mixed[0], layer(x)[0])
        model.set_adapter("other")
        assert_same(mixed[1], layer(x)[1])
        assert layer(x[:0], adapter_names=[]).shape == (0, 3, 4, 32)
        assert_same(layer(x[1:], adapter_names=["other"]), layer(x)[1:])


def test_adapters_of_different_parametrisations():
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4))
    names = ["default", "log", "__base__"]
    model.add_adapter("log", PeqaConfig(bits=4, parametrization="log"))
    for seed, name in enumerate(names[:2]):
        move_adapter(model, name, seed=seed)
    model.eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    with torch.no_grad():
        mixed = model(ids, adapter_names=names).logits
        rows = [model(ids).logits[0]]
        model.set_adapter("log")
        rows.append(model(ids).logits[1])
        with model.disable_adapter():
            rows.append(model(ids).logits[2])
    assert_same(mixed, torch.stack(rows))


def test_scales_are_stacked_once_in_a_generation(monkeypatch):
    case = next(case for case in CASES if case.name == "peqa-llama-4bit")
    model = case.with_two_adapters()
    stacked = []
    stack = ScaleTuningLinear.stacked_scales

    def counted(layer, names):
        stacked.append(layer)
        return stack(layer, names)

    monkeypatch.setattr(ScaleTuningLinear, "stacked_scales", counted)
    for _ in range(2):  # and not kept for the next call, before which an adapter may be trained
        stacked.clear()
        model.generate(**case.inputs(), max_new_tokens=4, min_new_tokens=4, adapter_names=NAMES)
        assert len(stacked) == len(set(stacked)) == len(tuner_layers(model))
