# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`trained="scales+zeros"`: zero points are tuned beside the scales, on bases whose own are whole or floats."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_ext import AdapterPool, AlphaTuningConfig, PeqaConfig
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.formats import Uniform
from tests.cases import adapter_parameters, assert_differs, assert_same, move_adapter, train, tuner_layers
from tests.tiny.models import inputs, logits_of, tiny


FILE = "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
BASES = {
    "whole": {"bits": 4},
    "symmetric": {"bits": 3, "group_size": 16, "sym": True},
    "float": {"bits": 4, "group_size": 16, "zero": "float"},
}
bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def config(base, trained="scales+zeros", **kwargs):
    return PeqaConfig(**base, trained=trained, task_type="CAUSAL_LM", **kwargs)


def tuned(base, trained="scales+zeros", strength=0.3, **kwargs):
    """An adapter "default" away from the identity."""
    model = get_peft_model(tiny("llama"), config(base, trained, **kwargs)).eval()
    move_adapter(model, strength=strength)
    return model


def both(base):
    """Adapters "zeros" (scales and zero points) and "scales", and the logits with each, and without ("base")."""
    model = get_peft_model(tiny("llama"), config(base), "zeros").eval()
    model.add_adapter("scales", config(base, "scales"))
    move_adapter(model, "zeros", strength=0.3)
    move_adapter(model, "scales", strength=0.3, seed=1)
    expected = {}
    for name in ("zeros", "scales"):
        model.set_adapter(name)
        expected[name] = logits(model)
    with model.disable_adapter():
        expected["base"] = logits(model)
    return model, expected


def logits(model):
    with torch.no_grad():
        return logits_of(model.eval(), inputs("llama"))


@bases
def test_both_are_trained(base):
    model = get_peft_model(tiny("llama"), config(base))
    scales = sum(p.numel() for name, p in adapter_parameters(model).items() if "zero_delta" not in name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * scales
    losses = train(model, inputs("llama"))
    assert losses[-1] < losses[0]
    for layer in tuner_layers(model).values():
        assert layer.delta("default").any() and layer.zero_delta("default").any()
    alone = get_peft_model(tiny("llama"), config(base, "scales"))
    assert train(alone, inputs("llama"))[-1] > losses[-1]


@bases
def test_an_adapter_starts_as_the_base(base):
    model = get_peft_model(tiny("llama"), config(base))
    with model.disable_adapter():
        expected = logits(model)
    assert_same(logits(model), expected, 1e-6)


@bases
def test_merging_makes_floats_of_zero_points_and_unmerging_gives_them_back(base, tmp_path):
    model = tuned(base)
    expected = logits(model)
    before = {name: (layer.zero_point, layer.number_format) for name, layer in packed_layers(model).items()}
    model.save_pretrained(tmp_path / "unmerged")
    model.merge_adapter()
    assert_same(logits(model), expected, 1e-5)
    assert {layer.number_format.zero for layer in packed_layers(model).values()} == {"float"}
    model.save_pretrained(tmp_path / "merged")
    unmerged, merged = (load_file(tmp_path / part / FILE) for part in ("unmerged", "merged"))
    assert all(torch.equal(unmerged[name], merged[name]) for name in unmerged | merged)
    model.bfloat16()
    model.unmerge_adapter()
    for name, layer in packed_layers(model).items():
        assert torch.equal(layer.zero_point, before[name][0]) and layer.number_format == before[name][1]
        assert layer.zero_point.dtype == before[name][0].dtype


@bases
def test_a_merged_model_goes_through_a_file(base, tmp_path):
    model = tuned(base)
    expected = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(merged))
    assert_same(logits(loaded), expected, 1e-5)
    assert loaded.config.quantization_config.zero == "float"


@bases
def test_the_file_holds_plain_zero_points(base, tmp_path):
    model = tuned(base)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / FILE)
    for name, layer in tuner_layers(model.base_model.model).items():
        zero_point = saved[f"base_model.model.{name}.peqa_zero_point"]
        assert_same(zero_point, layer.base_layer.zero_point.float() + layer.zero_delta("default"), 1e-6)
    assert_same(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path)), logits(model), 1e-5)


def test_an_adapter_on_a_base_into_which_zero_points_were_merged_is_refused(tmp_path):
    model, _ = both(BASES["float"])
    model.save_pretrained(tmp_path)
    model.set_adapter("zeros")
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match="trained on other integer codes"):
        PeftModel.from_pretrained(merged, tmp_path / "scales")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop(f"{LAYER}.peqa_zero_point"),
            "no zero points, expected .32, 1., since trained='scales.zeros'",
        ),
        (lambda t: t.update({f"{LAYER}.peqa_zero_point": torch.ones(32, 2)}), r"peqa_zero_point|zero points of shape"),
        (lambda t: t[f"{LAYER}.peqa_zero_point"].fill_(float("nan")), "peqa_zero_point.*NaN|NaN"),
    ],
    ids=["missing", "shape", "nan"],
)
def test_damaged_files(damage, message, tmp_path):
    tuned(BASES["whole"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    damage(tensors)
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)


def test_a_config_that_is_another_adapters(tmp_path):
    for trained in ("scales", "scales+zeros"):
        tuned(BASES["whole"], trained).save_pretrained(tmp_path / trained)
    for config_of, file_of, message in (
        ("scales", "scales+zeros", "has trained zero points, but its adapter_config.json"),
        ("scales+zeros", "scales", "no zero points, expected"),
    ):
        own = PeqaConfig.from_pretrained(tmp_path / config_of)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(tiny("llama"), tmp_path / file_of, config=own)


@bases
def test_a_mixed_batch_of_both_kinds(base):
    model, expected = both(base)
    names = ["zeros", "__base__", "scales"]
    mixed = logits_of_batch(model, adapter_names=names)
    for row, name in enumerate(("zeros", "base", "scales")):
        assert_same(mixed[row], expected[name][row], 1e-5)
    assert_differs(expected["zeros"], expected["scales"])


def logits_of_batch(model, **kwargs):
    with torch.no_grad():
        return logits_of(model, inputs("llama"), **kwargs)


@bases
def test_a_weighted_sum_of_both_kinds(base):
    model, _ = both(base)
    model.add_weighted_adapter(["scales", "zeros"], [0.5, 2.0], "sum")
    assert model.peft_config["sum"].trained == "scales+zeros"
    for layer in tuner_layers(model).values():
        assert_same(layer.zero_delta("sum"), 2 * layer.zero_delta("zeros"))
        change = 0.5 * (layer.scale_of("scales") - layer.base_scale()) + 2 * (
            layer.scale_of("zeros") - layer.base_scale()
        )
        assert_same(layer.scale_of("sum"), layer.base_scale() + change, 1e-5)


@bases
def test_both_kinds_in_a_pool(base, tmp_path):
    model, expected = both(base)
    model.save_pretrained(tmp_path)
    pool = AdapterPool(model.unload())
    pool.load(tmp_path / "scales")
    pool.activate("scales")
    before = pool.nbytes
    chosen, go_on, seen = threading.Event(), threading.Event(), []

    def other_thread():
        pool.activate("scales")
        chosen.set()
        go_on.wait()
        seen.append(logits(pool.model))

    thread = threading.Thread(target=other_thread)
    thread.start()
    chosen.wait()
    pool.load(tmp_path / "zeros")
    assert pool.nbytes == 3 * before
    pool.activate("zeros")
    assert_same(logits(pool.model), expected["zeros"], 1e-5)
    go_on.set()
    thread.join()  # it goes on with what it chose, before there were zero points
    assert_same(seen[0], expected["scales"], 1e-5)
    for names in (["zeros", None, "scales"], ["scales", None, "scales"], [None, None, None], ["zeros"] * 3):
        with pool.mixed(names):
            mixed = logits(pool.model)
        for row, name in enumerate(names):
            assert_same(mixed[row], expected[name or "base"][row], 1e-5)
    pool.activate(None)
    assert torch.equal(logits(pool.model), expected["base"])
    pool.remove("zeros")
    pool.load(tmp_path / "zeros")  # its fingerprint is that of the zero points as they were
    pool.activate("zeros")
    assert_same(logits(pool.model), expected["zeros"], 1e-5)


def test_the_default_trains_scales_alone():
    assert PeqaConfig().trained == "scales"
    with pytest.raises(ValueError, match="trained='zeros' is unknown; choose one of"):
        PeqaConfig(trained="zeros")
    assert not AlphaTuningConfig().trains_zero_points
    model = get_peft_model(tiny("llama"), PeqaConfig())
    assert not [name for name, _ in model.named_parameters() if "zero_delta" in name]
    assert {layer.number_format for layer in packed_layers(model.unload()).values()} == {Uniform(4)}
