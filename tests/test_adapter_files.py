# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Adapters' files are judged by their contents: a digest, types and ranges, and nothing is passed over."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_ext import AdapterPool, AlphaTuningConfig, BottleneckConfig, PeqaConfig
from peft_ext.tensor_files import DIGEST, carries_digest, read_header
from tests.cases import move_adapter
from tests.tiny.models import tiny


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONFIGS = {
    "peqa": PeqaConfig(bits=4, task_type="CAUSAL_LM"),
    "alphatuning": AlphaTuningConfig(bits=2, task_type="CAUSAL_LM"),
    "bottleneck": BottleneckConfig(bottleneck_dim=2, task_type="CAUSAL_LM"),
}


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path) -> Path:
    model = get_peft_model(tiny("llama"), copy.deepcopy(CONFIGS[request.param]))
    move_adapter(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(tiny("llama"), folder)


def rewrite(folder: Path, change, keep_digest: bool = False) -> None:
    """As somebody else would save the file: without our metadata, or a copy that kept them."""
    metadata = read_header(folder / WEIGHTS).metadata if keep_digest else {"format": "pt"}
    tensors = load_file(folder / WEIGHTS)
    change(tensors, next(name for name in tensors if name.endswith(("_scale", "up.weight"))))
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def test_saved_with_a_digest_and_read_back(folder):
    assert carries_digest(folder / WEIGHTS)
    assert read_header(folder / WEIGHTS).metadata["format"] == "pt"
    load(folder)
    tiny("llama").load_adapter(str(folder))


CHANGES = {
    "negated": lambda tensors, name: tensors[name].neg_(),
    "zeroed": lambda tensors, name: tensors[name].zero_(),
    "flipped": lambda tensors, name: tensors[name].view(torch.int32).view(-1)[:1].bitwise_xor_(1),
    "renamed": lambda tensors, name: tensors.update(more=tensors.pop(name)),
    "reshaped": lambda tensors, name: tensors.update({name: tensors[name].unsqueeze(0)}),
    "dropped": lambda tensors, name: tensors.pop(name),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tensor_is_refused(folder, change, monkeypatch):
    rewrite(folder, CHANGES[change], keep_digest=True)
    for loader in (load, lambda folder: tiny("llama").load_adapter(str(folder))):
        with pytest.raises(
            ValueError, match=rf"{WEIGHTS}'.*aren't those that were written.*PEFT_EXT_VERIFY_DIGESTS=0"
        ):
            loader(folder)
    if change in ("negated", "zeroed", "flipped"):
        monkeypatch.setenv("PEFT_EXT_VERIFY_DIGESTS", "0")
        load(folder)


def test_a_file_saved_anew_without_the_metadata_is_taken(folder):
    rewrite(folder, lambda tensors, name: None)
    assert not carries_digest(folder / WEIGHTS)
    load(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensors, name: tensors[name].fill_(3e38), "has the value 3e"),
        (lambda tensors, name: tensors[name].view(-1)[:1].fill_(float("nan")), "has NaN or infinity"),
        (lambda tensors, name: tensors.update({name: tensors[name].long()}), "is I64; it must be a float"),
        (lambda tensors, name: tensors.pop(name), "is missing"),
        (lambda tensors, name: tensors.update({"model.nowhere.weight": torch.ones(2)}), "nothing in the model takes"),
        (lambda tensors, name: tensors.update({f"x.{name}": tensors[name].clone()}), "is missing"),
    ],
)
def test_what_nobody_can_have_written_is_refused(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=words):
        load(folder)


@pytest.mark.parametrize(
    "field, value",
    [
        ("target_modules", [1]),
        ("init_weights", "no"),
        ("inference_mode", 1),
        ("layers_to_transform", -1),
        ("init_method", None),
        ("peft_type", "FOO"),
        ("peft_type", ["PEQA"]),
        ("task_type", 3),
    ],
)
def test_a_config_value_out_of_its_range_names_file_and_field(folder, field, value):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=rf"{CONFIG}': {field} is "):
        load(folder)


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"a":' + b"[" * 50_000, "{'ä".encode("latin-1"), b""])
def test_a_config_that_is_no_object_names_the_file(folder, content):
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=CONFIG):
        load(folder)


def test_an_activation_that_no_tensor_tells_is_not_guessed(tmp_path):
    """(Without it, the default's answers came, another's than that of training.)"""
    model = get_peft_model(
        tiny("llama"), BottleneckConfig(bottleneck_dim=2, non_linearity="gelu", task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["non_linearity"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="non_linearity is missing"):
        load(tmp_path)


def test_without_a_type(folder):
    config = json.loads((folder / CONFIG).read_text())
    del config["peft_type"]
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="peft_type is missing"):
        load(folder)


def test_only_safetensors_are_taken(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.bin' is a pickle.*adapter_model\.safetensors alone"):
        load(folder)


def test_bytes_that_no_tensor_has(folder):
    with open(folder / WEIGHTS, "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=rf"{WEIGHTS}' is truncated, damaged or no safetensors file"):
        load(folder)


def test_the_pool_names_layers_that_the_file_lacks(tmp_path):
    model = get_peft_model(tiny("llama"), copy.deepcopy(CONFIGS["peqa"]))
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors, name: [tensors.pop(name), tensors.pop(name.replace("_scale", "_codes"))])
    pool = AdapterPool(model.unload())
    with pytest.raises(ValueError, match=r"no scales of 1 layers.*'model\.layers\.0\.mlp\.down_proj'"):
        pool.load(tmp_path, "one")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "target_modules": None}))
    with pytest.raises(ValueError, match=rf"{CONFIG} has no target_modules"):
        pool.load(tmp_path, "one")
    assert pool.names == []


def test_a_missing_module_that_was_trained_in_full(tmp_path):
    config = PeqaConfig(bits=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors, name: tensors.pop("base_model.model.lm_head.weight"))
    with pytest.raises(ValueError, match=r"the file has no .*lm_head\.weight"):
        load(tmp_path)


def test_other_tuners_are_left_to_peft(tmp_path):
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert DIGEST not in read_header(tmp_path / WEIGHTS).metadata
    load(tmp_path)
    model.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / WEIGHTS).unlink()
    load(tmp_path)
