# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Merging, unmerging and unloading."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.cases import (
    CASES_THAT_MERGE,
    ONE_PER_ARCHITECTURE,
    adapter_parameters,
    assert_differs,
    assert_same,
    move_adapter,
    over,
    tuner_layers,
)


merging_cases = over(CASES_THAT_MERGE)
merging_once_per_architecture = over([case for case in ONE_PER_ARCHITECTURE if case.merges])


def _state(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def _assert_same_state(model, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert set(after) == set(before)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0.0, atol=0.0, equal_nan=True, msg=key)


@merging_cases
def test_merge_and_unmerge(case):
    model = case.moved()
    before, state = case.logits(model), _state(model)
    model.merge_adapter()
    assert all(layer.merged_adapters == ["default"] for layer in tuner_layers(model).values())
    assert_same(case.logits(model), before)
    model.unmerge_adapter()
    assert not any(layer.merged for layer in tuner_layers(model).values())
    _assert_same_state(model, state)
    assert torch.equal(case.logits(model), before)


@merging_cases
def test_unmerge_is_exact_even_where_a_scale_became_zero(case):
    model = case.moved()
    for parameter in adapter_parameters(model).values():
        parameter.data.fill_(-1.0)  # relative: a scale of exactly zero, which no division gets back
    state = _state(model)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    _assert_same_state(model, state)


@merging_once_per_architecture
def test_merging_twice_warns_and_changes_nothing(case):
    model = case.moved()
    model.merge_adapter()
    state = _state(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    _assert_same_state(model, state)


@merging_once_per_architecture
def test_unmerging_without_a_merge_warns(case):
    model = case.moved()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@merging_cases
def test_disable_adapter_while_merged_gives_the_base(case):
    model = case.fresh()
    base = case.logits(model)
    move_adapter(model, strength=case.strength)
    enabled = case.logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert_same(case.logits(model), base)
    assert_same(case.logits(model), enabled)


@merging_cases
def test_training_cannot_silently_use_a_merged_adapter(case):
    model = case.moved()
    enabled = case.logits(model)
    model.merge_adapter()
    move_adapter(model, strength=case.strength, seed=3)
    assert_same(case.logits(model), enabled)  # a merged model shows what was merged
    model.unmerge_adapter()
    assert_differs(case.logits(model), enabled)


@merging_cases
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_base_alone(case, broken):
    model = case.moved()
    # the last layer: the ones before it are checked and merged first
    list(adapter_parameters(model).values())[-1].data[0] = broken
    state = _state(model)
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        model.base_model.merge_adapter(safe_merge=True)
    for layer in tuner_layers(model).values():
        if layer.merged:
            layer.unmerge()
    _assert_same_state(model, state)


@merging_cases
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload(case, safe_merge):
    model = case.moved()
    before = case.logits(model)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert not hasattr(merged, "peft_config")
    assert type(merged) is type(case.float_model())
    assert_same(case.logits(merged), before)


@merging_once_per_architecture
def test_merge_and_unload_a_merged_model(case):
    model = case.moved()
    before = case.logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        merged = model.merge_and_unload()
    assert_same(case.logits(merged), before)


@merging_cases
def test_unload_gives_the_base(case):
    model = case.fresh()
    base = case.logits(model)
    move_adapter(model, strength=case.strength)
    unloaded = model.unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert_same(case.logits(unloaded), base)


@merging_cases
def test_unload_a_merged_model_keeps_what_was_merged(case):
    model = case.moved()
    before = case.logits(model)
    model.merge_adapter()
    assert_same(case.logits(model.unload()), before)


@merging_cases
def test_merge_one_of_two_adapters(case):
    model = case.with_two_adapters()
    model.set_adapter("other" if case.saves_modules else "default")
    active = model.active_adapters
    expected = case.logits(model)
    twin = copy.deepcopy(model)
    assert_same(case.logits(model.merge_and_unload(adapter_names=active)), expected)
    inactive = "other" if active == ["default"] else "default"
    twin.set_adapter(inactive)
    expected = case.logits(twin)
    assert_same(case.logits(twin.merge_and_unload(adapter_names=[inactive])), expected)


@over([case for case in CASES_THAT_MERGE if not case.saves_modules])  # PEFT lets only one with a head be active
def test_merging_two_adapters_equals_both_active(case):
    model = case.with_two_adapters()
    first = case.logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = case.logits(model)
    assert_differs(both, first)
    one_by_one, state = copy.deepcopy(model), _state(model)
    model.merge_adapter(adapter_names=["default", "other"])
    assert_same(case.logits(model), both)
    one_by_one.merge_adapter(adapter_names=["other"])
    one_by_one.merge_adapter(adapter_names=["default"])
    assert_same(case.logits(one_by_one), both)
    one_by_one.unmerge_adapter()
    _assert_same_state(one_by_one, state)


@merging_once_per_architecture
def test_adapter_names_to_merge_must_be_a_list(case):
    model = case.moved()
    with pytest.raises(TypeError, match="list"):
        model.merge_adapter(adapter_names="default")


@merging_once_per_architecture
def test_a_merged_adapter_cannot_be_deleted(case):
    model = case.with_two_adapters()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    assert set(model.peft_config) == {"default", "other"}
