# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What is packed and what isn't: as an object, as a page, and as the one line that is said where nobody would expect it."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_ext import AlphaTuningConfig, BottleneckConfig, PeqaConfig, calibrate, report
from peft_ext.quant.formats import BinaryCoding, Uniform
from tests.tiny.models import LAYERS, inputs, tiny


@pytest.fixture
def said():
    """The warnings about what is packed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(warning.message) for warning in caught if "linear layers" in str(warning.message)]


def test_an_ordinary_model_is_packed_without_a_word(said, caplog):
    with caplog.at_level(logging.INFO, logger="peft_ext"):
        model = get_peft_model(tiny("llama"), PeqaConfig(bits=4, group_size=16, task_type="CAUSAL_LM"))
    line = f"packed {7 * LAYERS} of {7 * LAYERS + 1} linear layers; left: lm_head (output layer)"
    assert said() == [] and caplog.messages == [f"{line}."]
    found = report(model)
    assert found.summary == line and line in str(found)
    assert set(found.left) == {"lm_head"} and len(found.packed) == len(found.tuned) == 7 * LAYERS
    part = found.packed["model.layers.0.self_attn.q_proj"]
    assert part.format == Uniform(4, 16) and part.origin == "minmax" and part.weights == 32 * 32
    assert found.uncalibrated == []  # nothing was


def test_bytes_add_up():
    model = get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3))
    found = report(model)
    assert found.nbytes == sum(parameter.nbytes for parameter in model.parameters())
    assert found.packed["model.layers.0.mlp.up_proj"].format == BinaryCoding(3)
    planes = sum(p.logical_numel for name, p in model.named_parameters() if name.endswith("planes"))
    assert 3 < found.bits_per_weight == 8 * found.packed_bytes / planes


def test_the_same_of_base_and_tuned_and_loaded_models(tmp_path):
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4))
    tuned = report(model)
    base = model.unload()
    assert report(base).packed == tuned.packed and report(base).left == tuned.left and report(base).tuned == []
    base.save_pretrained(tmp_path)
    loaded = report(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert set(loaded.packed) == set(tuned.packed) and {part.origin for part in loaded.packed.values()} == {None}
    assert loaded.packed_bytes == tuned.packed_bytes


def test_adapters_of_others_are_no_layers_of_the_model():
    base = get_peft_model(tiny("llama"), PeqaConfig(bits=4)).unload()
    before = report(base)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    found = report(model)
    assert found.packed == before.packed and found.tuned == list(found.packed)
    assert found.left["lm_head"].reason == "trained in full" and set(found.left) == set(before.left)
    assert report(get_peft_model(tiny("llama"), BottleneckConfig(bottleneck_dim=4))).packed == {}


def test_what_others_have_quantised_is_told():
    class Linear8(nn.Linear):
        pass

    model = tiny("mlp")
    model.lin0 = Linear8(10, 32)
    model.lin0.weight = nn.Parameter(torch.zeros(32, 10, dtype=torch.int8), requires_grad=False)
    found = report(model)
    assert found.left["lin0"].reason == "quantised by others" and found.left["lin1"].reason == "no target"


def test_a_model_of_nobody(said):
    """Not of transformers: its layers are told all the same."""
    model = get_peft_model(tiny("mlp"), PeqaConfig(target_modules=["lin0"], modules_to_save=["head"]))
    assert report(model).summary == ("packed 1 of 3 linear layers; left: lin1 (no target), head (trained in full)")
    assert said() == []


def test_a_classifier_leaves_its_head_without_a_word(said):
    model = get_peft_model(tiny("bert"), PeqaConfig(task_type="SEQ_CLS"))
    assert report(model).left["classifier"].reason == "trained in full" and said() == []


@pytest.mark.parametrize("init_method", ["minmax", "calibrated"])
def test_a_target_that_nothing_is_called_is_said(init_method, said):
    config = PeqaConfig(target_modules=["q_proj", "v_projj"], init_method=init_method)
    model = tiny("llama")
    if init_method == "calibrated":
        calibrate(model, config, [inputs("llama")], progressbar=False)
        (line,) = said()
        assert "target_modules has 'v_projj', which no module is called" in line
        return
    get_peft_model(model, config)
    (line,) = said()
    assert "target_modules has 'v_projj', which no module is called" in line and f"packed {LAYERS} of" in line


def test_layers_that_the_data_never_reach_are_named(said):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    config = PeqaConfig(bits=4, target_modules=["used", "unused"], init_method="calibrated")
    model = calibrate(Branches(), config, [torch.randn(16, 8)], progressbar=False)
    (line,) = said()
    assert "never reached unused, rounded without data (minmax)" in line
    found = report(model)
    assert found.uncalibrated == ["unused"] and "without calibration data: unused" in str(found)
    get_peft_model(model, config)
    assert len(said()) == 1  # said already


def test_a_layer_that_gets_no_row_is_one_that_the_data_never_reach(said):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            return torch.cat([self.experts[0](x), self.experts[1](x[:0])])

    config = PeqaConfig(bits=4, target_modules=["0", "1"], init_method="calibrated")
    model = calibrate(Experts(), config, [torch.randn(16, 8)], progressbar=False)
    assert report(model).uncalibrated == ["experts.1"] and "never reached experts.1" in said()[0]


def test_putting_an_adapter_onto_a_packed_base_says_nothing(tmp_path, said):
    model = get_peft_model(tiny("llama"), PeqaConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PeqaConfig())
    assert said() == []


@pytest.mark.parametrize("name, ends", [("llama", 2), ("gpt2", 2)])
def test_packed_embeddings_are_told_and_are_not_uncalibrated(name, ends):
    config = PeqaConfig(bits=4, init_method="calibrated", embedding_bits=8, fan_in_fan_out=name == "gpt2")
    model = get_peft_model(calibrate(tiny(name), config, [inputs(name)], progressbar=False), config)
    found = report(model)
    assert len(found.embeddings) == ends and {part.origin for part in found.embeddings.values()} == {"minmax"}
    assert not found.uncalibrated
    first, *heads = found.embeddings
    assert f"embedding {first}: 8 bits per channel (uniform integers), " in str(found)
    assert f"frozen; with it {heads[0]}" in str(found) and "loaded" not in str(found)
    assert not report(tiny(name)).embeddings and "embedding" not in str(report(tiny(name)))
