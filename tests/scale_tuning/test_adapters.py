# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Several adapters on one base: adding, choosing, weighting, deleting, gradients, hot swap."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model

from peft_ext import PeqaConfig
from tests.cases import (
    CASES,
    ONE_PER_ARCHITECTURE,
    adapter_parameters,
    assert_differs,
    assert_same,
    move_adapter,
    once_per_architecture,
    over,
    tuner_layers,
)
from tests.tiny.models import logits_of, tiny


plain_cases = over([case for case in CASES if not case.saves_modules])
plain_once_per_architecture = over([case for case in ONE_PER_ARCHITECTURE if not case.saves_modules])


@once_per_architecture
def test_set_adapter(case):
    model = case.with_two_adapters()
    assert model.active_adapters == ["default"]
    first = case.logits(model)
    model.set_adapter("other")
    assert model.active_adapter == "other" and model.active_adapters == ["other"]
    second = case.logits(model)
    assert_differs(second, first)
    model.set_adapter("default")
    assert torch.equal(case.logits(model), first)


def test_an_added_adapter_starts_as_the_base_and_changes_no_other(case):
    model = case.moved()
    before = case.logits(model)
    base_state = {key: value.clone() for key, value in model.state_dict().items()}
    model.add_adapter("other", case.config())
    assert torch.equal(case.logits(model.eval()), before)
    for key, value in base_state.items():
        assert torch.equal(model.state_dict()[key], value), key
    with model.disable_adapter():
        base = case.logits(model)
    model.set_adapter("other")
    assert_same(case.logits(model), base)


@once_per_architecture
def test_adapters_share_one_base(case):
    model = case.moved()
    before = {name: id(layer.get_base_layer()) for name, layer in tuner_layers(model).items()}
    model.add_adapter("other", case.config())
    assert {name: id(layer.get_base_layer()) for name, layer in tuner_layers(model).items()} == before


@plain_once_per_architecture
def test_switching_freezes_what_was_unfrozen_by_hand(case):
    """As PEFT's own layers do, though ours look only at the adapters that can be unfrozen."""
    model = case.with_two_adapters()
    model.add_adapter("third", case.config())
    for unfrozen, chosen in ((["default", "other"], "third"), (["other"], ["default", "third"])):
        model.set_requires_grad(unfrozen)
        model.base_model.set_adapter(chosen)
        for name in ("default", "other", "third"):
            expected = name == chosen or name in chosen
            assert all(parameter.requires_grad == expected for parameter in adapter_parameters(model, name).values())
    model.base_model.set_adapter("third")
    model.delete_adapter("third")
    model.add_adapter("third", case.config())
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model, "third").values())


@once_per_architecture
def test_only_the_active_adapter_requires_grad(case):
    model = case.with_two_adapters()
    for active, inactive in (("default", "other"), ("other", "default")):
        model.set_adapter(active)
        assert all(parameter.requires_grad for parameter in adapter_parameters(model, active).values())
        assert not any(parameter.requires_grad for parameter in adapter_parameters(model, inactive).values())
    model.set_adapter("default", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@once_per_architecture
def test_set_requires_grad(case):
    model = case.with_two_adapters()
    model.set_requires_grad(["default", "other"], requires_grad=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_requires_grad("other")
    assert all(parameter.requires_grad for parameter in adapter_parameters(model, "other").values())
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model).values())


@plain_cases
def test_several_active_adapters(case):
    model = case.with_two_adapters()
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = case.logits(model)
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]
    both = case.logits(model)
    assert_differs(both, alone["default"])
    assert_differs(both, alone["other"])
    model.base_model.set_adapter(["other", "default"])
    assert_same(case.logits(model), both)
    assert all(parameter.requires_grad for parameter in adapter_parameters(model, "other").values())


@once_per_architecture
def test_adding_a_name_that_exists_changes_nothing(case):
    model = case.moved()
    before = case.logits(model)
    with pytest.raises(ValueError, match="default"):
        model.add_adapter("default", case.config())
    assert torch.equal(case.logits(model), before)


@once_per_architecture
def test_setting_an_unknown_adapter(case):
    model = case.moved()
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter("nobody")


@once_per_architecture
def test_delete_the_active_adapter(case):
    model = case.with_two_adapters()
    model.set_adapter("other")
    expected = case.logits(model)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"] and model.active_adapters == ["other"]
    assert not adapter_parameters(model, "default")
    for layer in tuner_layers(model).values():
        assert layer.active_adapters == ["other"]
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "default" not in getattr(layer, attribute)
    assert torch.equal(case.logits(model), expected)


@once_per_architecture
def test_delete_an_inactive_adapter(case):
    model = case.with_two_adapters()
    before = case.logits(model)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert torch.equal(case.logits(model), before)


def test_delete_the_last_adapter_leaves_the_base(case):
    model = case.fresh()
    base = case.logits(model)
    move_adapter(model, strength=case.strength)
    model.delete_adapter("default")
    assert model.active_adapters == []
    with torch.no_grad():
        assert_same(logits_of(model.base_model, case.inputs()), base)


@once_per_architecture
def test_delete_then_add_again_starts_anew(case):
    model = case.with_two_adapters()
    with model.disable_adapter():
        base = case.logits(model)
    model.delete_adapter("other")
    model.add_adapter("other", case.config())
    model.set_adapter("other")
    assert_same(case.logits(model.eval()), base)


@once_per_architecture
def test_delete_an_unknown_adapter(case):
    model = case.moved()
    with pytest.raises(ValueError, match="nobody.* does not exist"):
        model.delete_adapter("nobody")


@plain_cases
def test_weighted_adapter_of_one(case):
    model = case.moved()
    model.add_weighted_adapter(["default"], [1.0], "same")
    expected = case.logits(model)
    model.set_adapter("same")
    assert model.active_adapters == ["same"]
    assert_same(case.logits(model.eval()), expected, tolerance=1e-4)


@plain_cases
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, -0.25], [0.0, 0.0]], ids=str)
def test_weighted_adapter_of_two(case, weights):
    model = case.with_two_adapters()
    model.add_weighted_adapter(["default", "other"], weights, "sum")
    model.set_adapter("sum")
    combined = case.logits(model.eval())
    with model.disable_adapter():
        base = case.logits(model)
    if weights == [1.0, 1.0]:
        model.base_model.set_adapter(["default", "other"])
        assert_same(combined, case.logits(model), tolerance=1e-4)
    elif weights == [0.0, 0.0]:
        assert_same(combined, base, tolerance=1e-4)
    else:
        assert_differs(combined, base)
    model.set_adapter("default")  # the sources are as they were
    assert_same(case.logits(model), case.logits(case.moved()))


@plain_once_per_architecture
def test_weighted_adapter_is_not_trained_by_itself(case):
    model = case.with_two_adapters()
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    assert model.active_adapters == ["default"]
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model, "sum").values())


@plain_once_per_architecture
def test_weighted_adapter_of_an_unknown_one(case):
    model = case.moved()
    with pytest.raises(ValueError, match="nobody.* does not exist"):
        model.add_weighted_adapter(["default", "nobody"], [0.5, 0.5], "sum")
    assert "sum" not in model.peft_config


@plain_once_per_architecture
def test_weighted_adapter_needs_a_weight_for_each(case):
    model = case.with_two_adapters()
    with pytest.raises(ValueError, match="weight"):
        model.add_weighted_adapter(["default", "other"], [0.5], "sum")
    assert "sum" not in model.peft_config


@plain_cases
def test_weighted_adapter_can_be_saved_and_loaded(case, tmp_path):
    model = case.with_two_adapters()
    model.add_weighted_adapter(["default", "other"], [0.5, -0.5], "sum")
    model.set_adapter("sum")
    expected = case.logits(model.eval())
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    restored = case.fresh()
    restored.load_adapter(tmp_path / "sum", "loaded")
    restored.set_adapter("loaded")
    assert_same(case.logits(restored), expected, tolerance=1e-4)


def test_hot_swap(case, tmp_path):
    """`load_adapter` over a name that exists puts the file's numbers in, in place."""
    model = case.with_two_adapters()
    model.set_adapter("other")
    expected = case.logits(model)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    first = case.logits(model)
    storage = {name: parameter.data_ptr() for name, parameter in adapter_parameters(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = model.load_adapter(tmp_path / "other", adapter_name="default")
    assert not result.missing_keys and not result.unexpected_keys
    assert {name: parameter.data_ptr() for name, parameter in adapter_parameters(model).items()} == storage
    assert_same(case.logits(model), expected)
    model.load_adapter(tmp_path, adapter_name="default")
    assert_same(case.logits(model), first)


def test_weighted_adapter_of_adapters_on_different_layers():
    """The sum tunes every layer that one of them tunes, at that layer's own width."""
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4, target_modules=["q_proj"], layers_to_transform=[0]), "a")
    model.add_adapter("b", PeqaConfig(bits=3, target_modules=["v_proj"], layers_to_transform=[1]))
    for name in ("a", "b"):
        move_adapter(model, name)
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "sum")
    assert len(adapter_parameters(model, "sum")) == 2
    model.eval()
    for name, weight in (("a", 1.0), ("b", 0.5)):
        for key, delta in adapter_parameters(model, name).items():
            total = adapter_parameters(model, "sum")[key.replace(f".{name}.weight", ".sum.weight")]
            torch.testing.assert_close(total.data, weight * delta.data)
