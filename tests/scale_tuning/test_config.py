# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`PeqaConfig`: fields, files, other versions of them, and which modules it picks."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings

import pytest
import torch
from peft import PeftConfig, PeftType, TaskType, get_peft_model
from transformers.pytorch_utils import Conv1D

from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.quant.linear import PackedLinear
from tests.cases import assert_same, tuner_layers
from tests.tiny.models import LAYERS, TINY_MODELS, inputs, logits_of, tiny


def _targets(model: str, **kwargs) -> set[str]:
    return set(tuner_layers(get_peft_model(tiny(model), PeqaConfig(**kwargs)).base_model.model))


def test_defaults():
    config = PeqaConfig()
    assert (config.bits, config.group_size, config.sym) == (None, None, None)  # tests/scale_tuning/test_base_format.py
    assert (config.init_method, config.parametrization) == ("minmax", "relative")
    assert config.target_modules is None and config.modules_to_save is None and config.bits_pattern == {}
    assert config.group_size_pattern == {}
    assert config.peft_type is PeftType.PEQA and config.inference_mode is False and config.task_type is None


@pytest.mark.parametrize("config_cls", [PeqaConfig, AlphaTuningConfig])
def test_every_field_is_documented(config_cls):
    own = {field.name: field for field in dataclasses.fields(config_cls)}
    for inherited in dataclasses.fields(PeftConfig):
        own.pop(inherited.name)
    assert set(own) >= {"bits", "group_size", "init_method", "bits_pattern", "fan_in_fan_out"}
    for name, field in own.items():
        assert len(field.metadata.get("help", "")) > 20, name
        assert re.search(rf"^\s+{name} \(`", config_cls.__doc__, re.MULTILINE), f"{name} is not in the docstring"


def test_round_trip_through_a_file(tmp_path):
    config = PeqaConfig(
        bits=3,
        group_size=32,
        sym=True,
        init_method="mse",
        parametrization="log",
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["layers.0.self_attn.q_proj"],
        modules_to_save=["lm_head"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        bits_pattern={"v_proj": 8},
        group_size_pattern={"q_proj": 16},
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path="somewhere",
        revision="main",
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded == config and loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.target_modules, set)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PEQA"


def test_to_dict_makes_the_config_again():
    config = PeqaConfig(bits=2, target_modules="all-linear")
    assert PeqaConfig(**config.to_dict()) == config
    assert copy.copy(config) == config == copy.deepcopy(config)


def test_a_config_of_a_later_version(tmp_path):
    """Unknown keys: PEFT warns and goes on."""
    PeqaConfig(bits=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_the_future": 1}))
    with pytest.warns(UserWarning, match="of_the_future"):
        assert PeftConfig.from_pretrained(tmp_path).bits == 3


def test_attributes_can_be_set():
    config = PeqaConfig()
    config.bits = 3
    config.target_modules = ["q_proj"]
    assert config.to_dict()["bits"] == 3


def test_none_of_the_callers_objects_is_changed():
    targets, pattern = ["q_proj", "v_proj"], {"q_proj": 8}
    config = PeqaConfig(target_modules=targets, bits_pattern=pattern)
    get_peft_model(tiny("llama"), config)
    assert targets == ["q_proj", "v_proj"] and pattern == {"q_proj": 8}


@pytest.mark.parametrize("targets", [None, "all-linear", "ALL-LINEAR"])
@pytest.mark.parametrize("model", [name for name, model in TINY_MODELS.items() if model.linear_layers])
def test_all_linear(model, targets):
    """Every linear layer but the output layer; what isn't linear stays as it is."""
    task = {"task_type": "SEQ_CLS"} if model == "bert" else {}
    wrapped = get_peft_model(tiny(model), PeqaConfig(target_modules=targets, **task))
    layers = tuner_layers(wrapped.base_model.model)
    assert len(layers) == TINY_MODELS[model].linear_layers
    assert not {"lm_head", "embed_out", "classifier"} & set(layers)
    before, after = tiny(model), wrapped.base_model.model
    for name, module in before.named_modules():
        if name not in layers and not any(name.startswith(part) for part in (*layers, "classifier")):
            assert type(after.get_submodule(name)) is type(module), name


def test_convolutions_and_embeddings_stay_as_they_are():
    before = tiny("conv")
    after = get_peft_model(tiny("conv"), PeqaConfig()).base_model.model
    for name in ("conv0", "conv1", "embed"):
        assert type(after.get_submodule(name)) is type(before.get_submodule(name))
        assert torch.equal(after.get_submodule(name).weight, before.get_submodule(name).weight)
    assert set(tuner_layers(after)) == {"lin0", "head"}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], LAYERS),
        (["q_proj", "down_proj"], 2 * LAYERS),
        (["model.layers.1.self_attn.q_proj"], 1),
        (r".*\.self_attn\.[qk]_proj", 2 * LAYERS),
        (r"model\.layers\.0\..*_proj", 7),
    ],
)
def test_lists_and_regular_expressions(targets, count):
    assert len(_targets("llama", target_modules=targets)) == count


def test_a_string_is_one_regular_expression_and_not_a_suffix():
    with pytest.raises(ValueError, match="q_proj.*not found"):
        _targets("llama", target_modules="q_proj")


@pytest.mark.parametrize("exclude", [["down_proj", "o_proj"], r".*\.(down|o)_proj"])
def test_exclude_modules(exclude):
    names = _targets("llama", exclude_modules=exclude)
    assert len(names) == 5 * LAYERS and not [name for name in names if "down" in name or "o_proj" in name]


def test_exclude_modules_that_match_nothing_warn():
    with pytest.warns(UserWarning, match="nowhere"):
        _targets("llama", exclude_modules=["nowhere"])


def test_excluding_everything():
    with pytest.raises(ValueError, match="No modules were targeted|All modules were excluded"):
        _targets("llama", target_modules=["q_proj"], exclude_modules=["q_proj"])


@pytest.mark.parametrize(
    ("model", "targets", "pattern"),
    [
        ("llama", ["q_proj"], None),
        ("llama", ["q_proj"], "layers"),
        ("gpt2", ["c_attn"], "h"),
        ("opt", ["fc1"], ["layers"]),
    ],
)
def test_layers_to_transform(model, targets, pattern):
    names = _targets(model, target_modules=targets, layers_to_transform=[1], layers_pattern=pattern)
    assert len(names) == 1 and ".1." in names.pop()
    assert len(_targets(model, target_modules=targets, layers_to_transform=0, layers_pattern=pattern)) == 1


def test_layers_pattern_needs_layers_to_transform():
    with pytest.raises(ValueError, match="layers_pattern.*layers_to_transform"):
        PeqaConfig(target_modules=["q_proj"], layers_pattern="layers")


def test_layers_to_transform_needs_a_list_of_targets():
    with pytest.raises(ValueError, match="layers_to_transform.*target_modules"):
        PeqaConfig(target_modules=".*q_proj", layers_to_transform=[0])


def test_modules_to_save_are_not_quantised():
    wrapped = get_peft_model(tiny("mlp"), PeqaConfig(modules_to_save=["head"]))
    assert set(tuner_layers(wrapped.base_model.model)) == {"lin0", "lin1"}
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {name for name in trained if "head" in name} == {
        "base_model.model.head.modules_to_save.default.weight",
        "base_model.model.head.modules_to_save.default.bias",
    }


def test_bits_pattern():
    wrapped = get_peft_model(
        tiny("llama"),
        PeqaConfig(
            bits=4, bits_pattern={"down_proj": 8, r"layers\.0\..*\.q_proj": 2, "^model.layers.1.mlp.up_proj": 3}
        ),
    )
    found = {name: layer.base_layer.bits for name, layer in tuner_layers(wrapped.base_model.model).items()}
    for name, bits in found.items():
        expected = 8 if name.endswith("down_proj") else 4
        expected = 2 if name == "model.layers.0.self_attn.q_proj" else expected
        expected = 3 if name == "model.layers.1.mlp.up_proj" else expected
        assert bits == expected, name


def test_group_size_pattern():
    """As `bits_pattern`, and beside it."""
    pattern = {"down_proj": 16, r"layers\.0\..*\.q_proj": 8, "^model.layers.1.mlp.up_proj": -1}
    config = PeqaConfig(bits=4, group_size=32, group_size_pattern=pattern, bits_pattern={"down_proj": 8})
    layers = tuner_layers(get_peft_model(tiny("llama"), config).base_model.model)
    for name, layer in layers.items():
        expected = 16 if name.endswith("down_proj") else 32
        expected = 8 if name == "model.layers.0.self_attn.q_proj" else expected
        expected = layer.in_features if name == "model.layers.1.mlp.up_proj" else expected
        assert layer.in_features // layer.base_layer.scale.shape[1] == expected, name
        assert layer.base_layer.bits == (8 if name.endswith("down_proj") else 4)
    with pytest.raises(ValueError, match="up_proj.*group_size=24.*in_features=32"):
        get_peft_model(tiny("llama"), AlphaTuningConfig(group_size_pattern={"up_proj": 24}))


def test_fan_in_fan_out_is_read_off_the_layer():
    """The flag exists for PEFT users' habit; both settings give the same model, a wrong one with a warning."""
    batch = inputs("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        right = get_peft_model(tiny("gpt2"), PeqaConfig(fan_in_fan_out=True)).eval()
    without = get_peft_model(tiny("gpt2"), PeqaConfig()).eval()
    with torch.no_grad():
        assert torch.equal(logits_of(right, batch), logits_of(without, batch))
    layer = tuner_layers(right.base_model.model)["transformer.h.0.attn.c_attn"]
    assert (layer.in_features, layer.out_features) == (32, 96)
    with pytest.warns(UserWarning, match="fan_in_fan_out.*torch.nn.Linear"):
        wrong = get_peft_model(tiny("llama"), PeqaConfig(fan_in_fan_out=True, target_modules=["q_proj"])).eval()
    plain = get_peft_model(tiny("llama"), PeqaConfig(target_modules=["q_proj"])).eval()
    with torch.no_grad():
        assert torch.equal(logits_of(wrong, inputs("llama")), logits_of(plain, inputs("llama")))


def test_conv1d_is_quantised_per_output_channel():
    """The codes of a `Conv1D` are those of the `nn.Linear` with the transposed weight."""
    conv = Conv1D(12, 8)
    linear = torch.nn.Linear(8, 12)
    linear.weight.data, linear.bias.data = conv.weight.data.t().contiguous(), conv.bias.data
    one = get_peft_model(torch.nn.Sequential(conv), PeqaConfig(bits=3, target_modules=["0"], fan_in_fan_out=True))
    two = get_peft_model(torch.nn.Sequential(linear), PeqaConfig(bits=3, target_modules=["0"]))
    first, second = (next(m for m in model.modules() if isinstance(m, PackedLinear)) for model in (one, two))
    assert first.fingerprint() == second.fingerprint() and torch.equal(first.scale, second.scale)
    x = torch.randn(2, 5, 8)
    assert_same(one(x), two(x))
