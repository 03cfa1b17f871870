# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What PEFT promises of every tuner's model: attributes, forward, generate, disabling, inspection, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_base_model_state_dict, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from tests.cases import (
    CASES_THAT_GENERATE,
    ONE_PER_ARCHITECTURE,
    TRANSFORMERS_CASES,
    adapter_parameters,
    assert_differs,
    assert_same,
    move_adapter,
    once_per_architecture,
    over,
    tuner_layers,
)
from tests.tiny.models import logits_of


@once_per_architecture
def test_attributes(case):
    model = case.fresh()
    config = model.peft_config["default"]
    assert isinstance(config, case.config_cls)
    assert isinstance(model.base_model, PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type])
    assert model.peft_type == config.peft_type
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    for name in ("save_pretrained", "from_pretrained", "push_to_hub", "merge_and_unload", "unload"):
        assert callable(getattr(model, name))


def test_every_target_becomes_a_tuner_layer(case):
    model = case.fresh()
    layers = tuner_layers(model.base_model.model)
    assert layers and sorted(layers) == sorted(model.base_model.targeted_module_names)
    for layer in layers.values():
        assert layer.active_adapters == ["default"] and not layer.merged and not layer.disable_adapters


@once_per_architecture
def test_tuner_layers_show_the_size_of_the_layer_that_they_replace(case):
    before = dict(case.float_model().named_modules())
    for name, layer in tuner_layers(case.fresh().base_model.model).items():
        weight = before[name].weight
        shape = weight.shape if isinstance(before[name], nn.Linear) else weight.T.shape
        assert (layer.out_features, layer.in_features) == tuple(shape)
        # some models (T5) read a layer's weight dtype in their forward
        assert layer.weight.is_floating_point()
        assert (layer.bias is None) == (before[name].bias is None)
        if layer.bias is not None:
            assert torch.equal(layer.bias, before[name].bias)


@once_per_architecture
def test_custom_adapter_name(case):
    model = case.moved(adapter_name="mine")
    assert list(model.peft_config) == ["mine"]
    assert model.active_adapter == "mine"
    assert adapter_parameters(model, "mine") and not adapter_parameters(model, "default")
    assert torch.isfinite(case.logits(model)).all()


@once_per_architecture
def test_forward_takes_positional_and_keyword_arguments(case):
    model = case.moved()
    batch = case.inputs()
    first = next(iter(batch))
    with torch.no_grad():
        by_name = logits_of(
            model, {first: batch[first], **({k: v for k, v in batch.items() if k != "attention_mask"})}
        )
        rest = {k: v for k, v in batch.items() if k not in (first, "attention_mask")}
        by_position = model(batch[first], **rest)
    by_position = by_position if isinstance(by_position, torch.Tensor) else by_position[0]
    assert torch.equal(by_name, by_position)


def test_forward_is_repeatable_and_finite(case):
    model = case.moved()
    first = case.logits(model)
    assert torch.isfinite(first).all()
    assert first.dtype == torch.float32
    assert torch.equal(first, case.logits(model))


def test_a_fresh_adapter_is_the_identity(case):
    model = case.fresh()
    enabled = case.logits(model)
    with model.disable_adapter():
        assert_same(enabled, case.logits(model))


def test_without_init_weights_the_adapter_is_no_identity(case):
    model = case.fresh(init_weights=False)
    enabled = case.logits(model)
    with model.disable_adapter():
        assert_differs(enabled, case.logits(model))


def test_a_moved_adapter_changes_the_output(case):
    assert_differs(case.logits(case.moved()), case.logits(case.fresh()))


@over([case for case in ONE_PER_ARCHITECTURE if case in TRANSFORMERS_CASES])
def test_inputs_embeds(case):
    model = case.moved()
    batch = case.inputs()
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    expected = case.logits(model)
    with torch.no_grad():
        rest = {key: value for key, value in batch.items() if key != "input_ids"}
        assert_same(model(inputs_embeds=embeds, **rest)[0], expected)


@over(CASES_THAT_GENERATE)
def test_generate(case):
    model = case.moved()
    batch = {key: value for key, value in case.inputs().items() if key != "decoder_input_ids"}
    kwargs = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**batch, **kwargs)
    assert torch.equal(cached, model.generate(**batch, **kwargs, use_cache=False))
    if case.kwargs.get("task_type") != "SEQ_2_SEQ_LM":  # PEFT's own class for these takes keywords only
        mask = batch["attention_mask"]
        assert torch.equal(cached, model.generate(batch["input_ids"], attention_mask=mask, **kwargs))


@over([case for case in ONE_PER_ARCHITECTURE if case.generates])
def test_generate_uses_the_adapter(case):
    model = case.moved()
    batch = {key: value for key, value in case.inputs().items() if key != "decoder_input_ids"}

    def first_scores():
        return model.generate(
            **batch, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_scores=True
        ).scores[0]

    enabled = first_scores()
    with model.disable_adapter():
        assert_differs(first_scores(), enabled)
    assert torch.equal(first_scores(), enabled)


def test_disable_adapter_gives_the_base(case):
    model = case.fresh()
    base = case.logits(model)
    move_adapter(model, strength=case.strength)
    enabled = case.logits(model)
    with model.disable_adapter():
        assert_same(case.logits(model), base)
    assert torch.equal(case.logits(model), enabled)


@once_per_architecture
def test_disable_adapter_is_undone_after_an_error(case):
    model = case.moved()
    enabled = case.logits(model)
    with pytest.raises(RuntimeError, match="from the user"), model.disable_adapter():
        raise RuntimeError("from the user")
    assert torch.equal(case.logits(model), enabled)
    assert all(not layer.disable_adapters for layer in tuner_layers(model).values())


@once_per_architecture
def test_disable_and_enable_adapter_layers(case):
    model = case.moved()
    enabled = case.logits(model)
    model.base_model.disable_adapter_layers()
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model).values())
    assert_differs(case.logits(model), enabled)
    model.base_model.enable_adapter_layers()
    assert all(parameter.requires_grad for parameter in adapter_parameters(model).values())
    assert torch.equal(case.logits(model), enabled)


def test_deepcopy_is_independent(case):
    model = case.moved()
    before = case.logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(case.logits(twin), before)
    move_adapter(twin, strength=case.strength, seed=5)
    assert_differs(case.logits(twin), before)
    assert torch.equal(case.logits(model), before)


def test_a_whole_model_can_be_pickled(case):
    model = case.moved()
    twin = pickle.loads(pickle.dumps(model.base_model.model))
    assert torch.equal(case.logits(twin), case.logits(model))


def test_state_dict_round_trip(case):
    model, other = case.moved(), case.fresh()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    result = other.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(case.logits(other), case.logits(model))


@once_per_architecture
def test_layer_and_model_status(case):
    model = case.moved()
    layers = model.get_layer_status()
    named = {status.name.removeprefix("model.") for status in layers}
    assert set(model.base_model.targeted_module_names) <= {name.removeprefix("base_model.") for name in named} | named
    for status in layers:
        assert status.enabled and status.active_adapters == ["default"] and status.merged_adapters == []
        assert status.requires_grad == {"default": True} and status.available_adapters == ["default"]
        assert status.devices == {"default": ["cpu"]}
    summary = model.get_model_status()
    trainable, total = model.get_nb_trainable_parameters()
    assert summary.peft_types == {"default": model.peft_config["default"].peft_type.value}
    assert (summary.trainable_params, summary.total_params) == (trainable, total)
    assert summary.enabled is True and summary.active_adapters == ["default"]
    if not case.merges:
        return
    model.base_model.merge_adapter()
    # modules_to_save are never merged, which PEFT calls irregular
    assert model.get_model_status().merged_adapters == ("irregular" if model.modules_to_save else ["default"])


@once_per_architecture
def test_inject_adapter_in_model(case):
    expected = case.logits(case.fresh())
    model = inject_adapter_in_model(case.config(), case.float_model()).eval()
    assert not hasattr(model, "base_model") or "PeftModel" not in type(model).__name__
    assert_same(case.logits(model), expected)
    move_adapter(model, strength=case.strength)
    assert_differs(case.logits(model), expected)


def test_base_model_state_dict_has_the_keys_of_the_unloaded_model(case):
    model = case.moved()
    base = {key: value.clone() for key, value in get_base_model_state_dict(model).items()}
    unloaded = model.unload().state_dict()
    assert set(base) == set(unloaded)
    for key, value in unloaded.items():
        assert torch.equal(base[key], value), key


def test_wrapping_does_not_change_the_callers_config(case):
    config = case.config()
    before = copy.deepcopy(config.to_dict())
    get_peft_model(case.float_model(), copy.deepcopy(config))
    again = get_peft_model(case.float_model(), config)
    after = config.to_dict()
    # PEFT itself fills these in
    for field in ("target_modules", "modules_to_save", "base_model_name_or_path", "inference_mode", "auto_mapping"):
        before.pop(field), after.pop(field)
    # of the format, what was left open is filled in as PEFT fills in target_modules
    left_open = {field for field in ("bits", "group_size", "sym", "zero") if before.get(field, 0) is None}
    assert {field for field in before if after[field] != before[field]} <= left_open
    assert again.peft_config["default"].to_dict()


@once_per_architecture
def test_repr_names_the_layers(case):
    text = repr(case.fresh())
    assert next(iter(model_name for model_name in case.float_model()._modules)) in text
    assert "base_layer" in text
