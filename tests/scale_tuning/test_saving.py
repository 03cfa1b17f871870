# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Saving and loading adapters as every PEFT method does."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_ext import AlphaTuningConfig, PeqaConfig
from tests.cases import (
    CASES,
    CASES_THAT_MERGE,
    adapter_parameters,
    assert_differs,
    assert_same,
    move_adapter,
    once_per_architecture,
    over,
    prefix_of,
    tuner_layers,
)
from tests.tiny.folders import save_tiny
from tests.tiny.models import inputs, tiny


# One model of each kind; the whole table does the round trip.
FEW_NAMES = ("peqa-llama-3bit-groups", "peqa-gpt2-4bit", "peqa-t5-4bit", "peqa-bert-4bit", "peqa-mlp-groups-head")
FEW_NAMES += ("bottleneck-llama", "bottleneck-bert-pfeiffer")
FEW = [case for case in CASES if case.name in FEW_NAMES]
few_cases = over(FEW)


def _load(case, path, **kwargs) -> PeftModel:
    return PeftModel.from_pretrained(case.float_model(), path, **kwargs)


def test_round_trip(case, tmp_path):
    model = case.moved()
    expected = case.logits(model)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    restored = _load(case, tmp_path)
    assert not restored.training
    assert_same(case.logits(restored), expected, tolerance=1e-6)
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(adapter_parameters(restored)[name].data, parameter.data, rtol=1e-5, atol=1e-6)


def test_file_holds_the_adapter_and_nothing_of_the_base(case, tmp_path):
    model = case.moved()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    head = {f"{name}." for name in model.modules_to_save or ()}
    assert saved
    for key in saved:
        assert key.startswith("base_model.model.") and "default" not in key and "base_layer" not in key
        assert f".{prefix_of(model)}" in key or any(part in key for part in head), key
    layers = {key.rsplit(f".{prefix_of(model)}", 1)[0] for key in saved if prefix_of(model) in key}
    assert layers == {f"base_model.model.{name}" for name in model.base_model.targeted_module_names}


@once_per_architecture
def test_adapter_config_is_for_inference_and_names_the_method(case, tmp_path):
    model = case.moved()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["inference_mode"] is True and saved["peft_type"] == model.peft_config["default"].peft_type.value
    assert model.peft_config["default"].inference_mode is False
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, case.config_cls)
    assert _load(case, tmp_path, config=config).peft_config["default"] is config


@few_cases
def test_saving_twice_writes_the_same_numbers(case, tmp_path):
    model = case.moved()
    model.save_pretrained(tmp_path / "first")
    _load(case, tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert set(first) == set(second)
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-6, atol=0)


@few_cases
def test_path_as_string_and_positional_name(case, tmp_path):
    model = case.moved(adapter_name="mine")
    expected = case.logits(model)
    model.save_pretrained(str(tmp_path))
    restored = PeftModel.from_pretrained(case.float_model(), str(tmp_path / "mine"), "yours")
    assert list(restored.peft_config) == ["yours"]
    assert_same(case.logits(restored), expected, tolerance=1e-6)


@few_cases
def test_subfolder(case, tmp_path):
    model = case.moved(adapter_name="mine")
    model.save_pretrained(tmp_path)
    restored = _load(case, tmp_path, subfolder="mine")
    assert_same(case.logits(restored), case.logits(model), tolerance=1e-6)


@once_per_architecture
def test_selected_adapters(case, tmp_path):
    model = case.with_two_adapters()
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "other" / "adapter_model.safetensors").exists()
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert [path.name for path in sorted((tmp_path / "one").iterdir()) if path.name != "README.md"] == ["other"]
    with pytest.raises(ValueError, match="nobody"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["nobody"])
    restored = _load(case, tmp_path / "one" / "other")
    model.set_adapter("other")
    assert_same(case.logits(restored), case.logits(model), tolerance=1e-6)


@once_per_architecture
def test_names_that_contain_each_other(case, tmp_path):
    model = case.moved(adapter_name="adapter")
    for seed, name in enumerate(("adapter_2", "other_adapter", "a"), start=1):
        model.add_adapter(name, case.config())
        move_adapter(model, name, strength=case.strength, seed=seed)
    model.eval().save_pretrained(tmp_path)
    for name in ("adapter", "adapter_2", "other_adapter", "a"):
        model.set_adapter(name)
        assert_same(case.logits(_load(case, tmp_path / name)), case.logits(model), tolerance=1e-6)


@few_cases
def test_load_several_adapters(case, tmp_path):
    model = case.with_two_adapters()
    model.save_pretrained(tmp_path)
    restored = _load(case, tmp_path)
    for source, target in (("", "again"), ("other", "second")):
        result = restored.load_adapter(tmp_path / source, adapter_name=target)
        assert not result.missing_keys and not result.unexpected_keys
    assert restored.active_adapters == ["default"]
    assert_same(case.logits(restored), case.logits(model), tolerance=1e-6)
    restored.set_adapter("again")
    assert_same(case.logits(restored), case.logits(model), tolerance=1e-6)
    restored.set_adapter("second"), model.set_adapter("other")
    assert_same(case.logits(restored), case.logits(model), tolerance=1e-6)


@few_cases
def test_trainable_or_not(case, tmp_path):
    case.moved().save_pretrained(tmp_path)
    frozen = _load(case, tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trainable = _load(case, tmp_path, is_trainable=True)
    assert all(parameter.requires_grad for parameter in adapter_parameters(trainable).values())
    assert trainable.peft_config["default"].inference_mode is False
    frozen.load_adapter(tmp_path, "second", is_trainable=True)
    assert all(parameter.requires_grad for parameter in adapter_parameters(frozen, "second").values())
    assert not any(parameter.requires_grad for parameter in adapter_parameters(frozen).values())


def test_low_cpu_mem_usage(case, tmp_path):
    model = case.moved()
    model.save_pretrained(tmp_path)
    restored = _load(case, tmp_path, low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in restored.parameters()} == {"cpu"}
    assert_same(case.logits(restored), case.logits(model), tolerance=1e-6)
    restored.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    restored.set_adapter("second")
    assert {parameter.device.type for parameter in restored.parameters()} == {"cpu"}
    assert_same(case.logits(restored), case.logits(model), tolerance=1e-6)


@few_cases
def test_low_cpu_mem_usage_at_creation(case):
    model = get_peft_model(case.float_model(), case.config(), low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in adapter_parameters(model).values()} == {"meta"}
    others = {p.device.type for n, p in model.named_parameters() if n not in adapter_parameters(model)}
    assert others == {"cpu"}
    state = get_peft_model_state_dict(case.moved())
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert_same(case.logits(model.eval()), case.logits(case.moved()), tolerance=1e-6)


@few_cases
def test_state_dict_functions(case):
    model, other = case.moved(), case.fresh()
    state = get_peft_model_state_dict(model)
    assert all("default" not in key for key in state)
    result = set_peft_model_state_dict(other, {key: value.clone() for key, value in state.items()})
    assert not result.unexpected_keys
    assert_same(case.logits(other), case.logits(model), tolerance=1e-6)


@over(CASES_THAT_MERGE)
def test_state_dict_of_a_merged_model_is_the_adapters_own(case):
    model = case.moved()
    before = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    model.merge_adapter()
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, before[key]), key


@few_cases
def test_device_map(case, tmp_path):
    model = case.moved()
    model.save_pretrained(tmp_path)
    restored = _load(case, tmp_path, device_map={"": "cpu"})
    assert_same(case.logits(restored), case.logits(model), tolerance=1e-6)


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("peqa-llama-4bit", AutoPeftModelForCausalLM),
        ("peqa-gpt2-4bit", AutoPeftModelForCausalLM),
        ("peqa-t5-4bit", AutoPeftModelForSeq2SeqLM),
        ("peqa-bert-4bit", AutoPeftModelForSequenceClassification),
        ("bottleneck-bert-pfeiffer", AutoPeftModelForSequenceClassification),
    ],
)
def test_auto_classes(name, auto, tmp_path):
    """The adapter's config names the base model, which the auto class loads first."""
    case = next(row for row in CASES if row.name == name)
    base = save_tiny(case.model, tmp_path / "base")
    from_folder = type(case.float_model()).from_pretrained(base)
    model = get_peft_model(from_folder, case.config()).eval()
    move_adapter(model, strength=case.strength)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    restored = auto.from_pretrained(tmp_path / "adapter")
    assert tuner_layers(restored)
    assert_same(case.logits(restored), case.logits(model), tolerance=1e-6)


def test_transformers_adds_and_saves_an_adapter_itself(tmp_path):
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers' own add_adapter asks for peft {MIN_PEFT_VERSION}")
    case = CASES[0]
    plain = case.float_model()
    before = case.logits(plain)
    plain.add_adapter(case.config(), adapter_name="mine")
    assert_same(case.logits(plain.eval()), case.logits(case.fresh()))
    assert {name for name, p in plain.named_parameters() if p.requires_grad} == set(adapter_parameters(plain, "mine"))
    move_adapter(plain, "mine")
    plain.save_pretrained(tmp_path)
    assert_same(case.logits(_load(case, tmp_path)), case.logits(plain), tolerance=1e-6)
    plain.disable_adapters()
    assert_same(case.logits(plain), case.logits(case.fresh()))
    assert_differs(case.logits(plain), before)  # the quantised base, not the float model


SHARDED = """
import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from peft_ext import PeqaConfig
from tests.tiny.models import tiny

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
plain, sharded = (get_peft_model(tiny("llama"), PeqaConfig(bits=3)) for _ in range(2))
fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
ids = torch.tensor([[1, 2, 3]])
sharded(input_ids=ids, labels=ids).loss.backward()
whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
expected, found = get_peft_model_state_dict(plain), get_peft_model_state_dict(sharded, state_dict=whole)
assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in expected)
print("saved")
"""


def test_an_adapter_of_a_sharded_model(fresh_process):
    """FSDP2 shards packed codes; the adapter file is the one of the whole model."""
    assert "saved" in fresh_process(SHARDED)


@pytest.mark.parametrize("kind", ["peqa", "alphatuning", "lora"])
def test_a_packed_output_head_stays_out_of_the_adapter(kind, tmp_path):
    """Where it is a target, as by default on bases that others packed; PEFT keeps float heads beside its own adapters."""
    packed = PeqaConfig(bits=4, target_modules=["q_proj", "lm_head"])
    if kind == "alphatuning":
        packed = AlphaTuningConfig(bits=3, target_modules=["q_proj", "lm_head"])
    base = get_peft_model(tiny("llama"), packed).unload()
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"]) if kind == "lora" else packed
    model = get_peft_model(copy.deepcopy(base), config)
    move_adapter(model)
    expected = model(**inputs("llama")).logits
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert any("lm_head" in name for name in tensors)
    assert not [name for name in tensors if ".base_layer." in name]
    assert_same(PeftModel.from_pretrained(base, tmp_path)(**inputs("llama")).logits, expected)
