# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a config leaves open of the format is what each layer of a packed base has; what it says must be so."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_ext import AdapterPool, AlphaTuningConfig, PeqaConfig, calibrate
from peft_ext.quant.conversion import packed_layers
from tests.cases import assert_same, move_adapter, tuner_layers
from tests.tiny.models import inputs, logits_of, tiny


KINDS = pytest.mark.parametrize("kind", [PeqaConfig, AlphaTuningConfig])
EARLIER = Path(__file__).parents[1] / "earlier" / "files"


def logits(model):
    with torch.no_grad():
        return logits_of(model, inputs("llama"))


def formats(model):
    return {name: layer.number_format for name, layer in packed_layers(model).items()}


def packed(*configs, name="llama"):
    """A base packed by one config after another."""
    model = tiny(name)
    for config in configs:
        model = get_peft_model(model, config).unload()
    return model


def mixed(kind):
    """Two widths and three group sizes; of integers two symmetries, too."""
    config = kind(
        bits=3,
        group_size=16,
        bits_pattern={"q_proj": 2},
        group_size_pattern={"up_proj": 8, "down_proj": -1},
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
    )
    rest = {"sym": True} if kind is PeqaConfig else {}
    return packed(config, kind(bits=4, group_size=32, target_modules=["o_proj", "k_proj", "gate_proj"], **rest))


@KINDS
def test_a_float_base_gets_the_defaults(kind):
    config = kind()
    model = get_peft_model(tiny("llama"), config)
    assert (config.bits, config.group_size) == (4, -1) and getattr(config, "sym", False) is False
    assert set(formats(model.unload()).values()) == {config.number_format(4, -1)}


@pytest.mark.parametrize(
    "said",
    [{"bits": 3}, {"bits": 3, "group_size": 16}, {"bits": 2, "group_size": 8, "sym": True}],
    ids=str,
)
@pytest.mark.parametrize("asked", [{}, {"bits": "base"}], ids=["default", "base"])
def test_integers_of_a_packed_base(said, asked, tmp_path):
    """The numbers are in the file, so that the adapter also finds the same codes on the float base."""
    base = packed(PeqaConfig(**said))
    before = formats(base)
    config = PeqaConfig(**asked)
    model = get_peft_model(base, config).eval()
    assert (config.bits, config.group_size, config.sym) == (said["bits"], said.get("group_size", -1), "sym" in said)
    move_adapter(model)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["bits"], stored["group_size"], stored["sym"]) == (config.bits, config.group_size, config.sym)
    for other in (packed(PeqaConfig(**said)), tiny("llama")):
        restored = PeftModel.from_pretrained(other, tmp_path)
        assert_same(logits(restored), logits(model), tolerance=1e-6)
        assert formats(restored.unload()) == before


@pytest.mark.parametrize("asked", [{}, {"bits": "base"}, {"group_size": 16}], ids=str)
def test_binary_codings_of_a_packed_base(asked):
    config = AlphaTuningConfig(**asked)
    base = packed(AlphaTuningConfig(bits=2, group_size=16))
    before = formats(base)
    model = get_peft_model(base, config)
    assert (config.bits, config.group_size) == (2, 16) and formats(model.unload()) == before


@KINDS
def test_what_is_said_must_be_so(kind):
    for wrong, found in (({"bits": 4}, "bits"), ({"bits": "base", "group_size": 8}, "group_size")):
        with pytest.raises(ValueError, match=f"q_proj.*quantised already with.*{found}.*leave that out"):
            get_peft_model(packed(kind(bits=3, group_size=16)), kind(**wrong))
    with pytest.raises(ValueError, match="sym"):
        get_peft_model(packed(PeqaConfig(bits=3)), PeqaConfig(sym=True))
    other = PeqaConfig if kind is AlphaTuningConfig else AlphaTuningConfig
    with pytest.raises(ValueError, match="quantised already to"):
        get_peft_model(packed(kind(bits=3)), other())


@KINDS
def test_base_asks_for_a_packed_base(kind):
    for model, batches in ((tiny("llama"), None), (tiny("llama"), [inputs("llama")])):
        with pytest.raises(ValueError, match="bits='base'.*q_proj.*float.*pass bits"):
            if batches is None:
                get_peft_model(model, kind(bits="base"))
            else:
                calibrate(model, kind(bits="base", init_method="calibrated"), batches, progressbar=False)
    with pytest.raises(ValueError, match="bits='own'.*'base'"):
        kind(bits="own")


@KINDS
def test_layers_of_several_formats(kind, tmp_path):
    """Each layer keeps its own, in training, merging, files and pools."""
    base = mixed(kind)
    assert len(set(formats(base).values())) == 5
    base.save_pretrained(tmp_path / "base")
    config = kind()
    assert formats(get_peft_model(copy.deepcopy(base), config).unload()) == formats(base)
    assert (config.bits, config.group_size) == ("base", None) and getattr(config, "sym", None) is None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = formats(loaded)
    model = get_peft_model(loaded, kind()).eval()
    assert_same(logits(model), logits(base))
    move_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    tuned = logits(model)
    for restored in (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        assert_same(logits(restored), tuned, tolerance=1e-6)
    pool = AdapterPool(served := AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    pool.activate(pool.load(tmp_path / "adapter"))
    assert_same(logits(served), tuned)
    merged = model.merge_and_unload()
    assert formats(merged) == before
    assert_same(logits(merged), tuned)
    with pytest.raises(ValueError, match=f"bits='base'.*float.*{tmp_path.name}"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")


@KINDS
def test_a_sum_of_adapters_on_layers_of_several_formats(kind):
    model = get_peft_model(mixed(kind), kind(target_modules=["q_proj"]), "one")
    model.add_adapter("two", kind(target_modules=["up_proj", "o_proj"]))
    assert model.peft_config["one"].bits == 2 and model.peft_config["two"].bits == "base"
    for name in ("one", "two"):
        move_adapter(model, name)
    for first, second in (("one", "two"), ("two", "one")):
        model.add_weighted_adapter([first, second], [1.0, 1.0], first + second)
        model.set_adapter(first + second)
        layers = tuner_layers(model)
        assert {name.rsplit(".", 1)[1] for name, layer in layers.items() if layer.holds(first + second)} == {
            "q_proj",
            "up_proj",
            "o_proj",
        }


@KINDS
def test_float_layers_beside_packed_ones(kind):
    """They are packed like the others where these are alike, and else it must be said how."""
    config = kind()
    config.target_modules = ["q_proj", "up_proj"]
    model = get_peft_model(packed(kind(bits=3, group_size=16, target_modules=["q_proj"])), config)
    assert (config.bits, config.group_size) == (3, 16) and len(set(formats(model.unload()).values())) == 1
    two = kind(bits=3, group_size_pattern={"q_proj": 16, "k_proj": 8}, target_modules=["q_proj", "k_proj"])
    base = packed(two)
    with pytest.raises(ValueError, match="up_proj.*float.*differ in group_size.*pass group_size="):
        get_peft_model(base, kind(target_modules=["q_proj", "k_proj", "up_proj"]))
    said = kind(
        group_size=32, group_size_pattern={"q_proj": 16, "k_proj": 8}, target_modules=["q_proj", "k_proj", "up_proj"]
    )
    layers = formats(get_peft_model(base, said).unload())
    assert layers["model.layers.0.mlp.up_proj"] == said.number_format(3, -1)
    assert layers["model.layers.0.self_attn.q_proj"] == said.number_format(3, 16)


def test_a_single_group_is_a_group_of_any_size():
    """Of 32 inputs in groups of 32 a layer has one group, which says nothing about the others."""
    config = PeqaConfig()
    get_peft_model(packed(PeqaConfig(bits=4, group_size=32)), config)
    assert (config.bits, config.group_size) == (4, 32)


@pytest.mark.parametrize("sym", [True, False])
def test_layers_that_stock_transformers_left_compressed(sym, tmp_path):
    """Groups of `config_groups`, each with a scheme of its own, as llm-compressor writes them."""
    base = packed(PeqaConfig(bits=4, group_size=16, sym=sym))
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = PeqaConfig()
    model = get_peft_model(loaded, config)
    assert (config.bits, config.group_size, config.sym) == (4, 16, sym)
    assert formats(model.unload()) == formats(base)


def test_configs_of_earlier_files_say_all():
    for folder in ("peqa/adapter", "alphatuning/adapter"):
        kind = PeqaConfig if "peqa" in folder else AlphaTuningConfig
        config = kind.from_pretrained(EARLIER / folder)
        assert isinstance(config.bits, int) and isinstance(config.group_size, int) and config.group_size_pattern == {}
