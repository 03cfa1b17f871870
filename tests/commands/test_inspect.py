# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext inspect`: what it says about every format agrees with the loaded model, and nothing is loaded for it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_ext import PeqaConfig
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.cli import main
from peft_ext.quant.conversion import packed_layers
from tests.checkpoint.gptq_files import gptq_layer, save_gptq
from tests.tiny.models import tiny


def inspect(path, capsys) -> list[dict]:
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def check_layers(contents: dict, model) -> None:
    layers = packed_layers(model)
    assert [layer["name"] for layer in contents["layers"]] == sorted(layers)  # layers 0 and 1
    for found in contents["layers"]:
        layer = layers[found["name"]]
        assert (found["number_format"], found["bits"]) == (layer.number_format.title, layer.bits)
        assert found["group_size"] == layer.group_size
        assert found["shape"] == [layer.out_features, layer.in_features]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, request):
    if "may_load" not in request.fixturenames:
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)


@pytest.fixture
def may_load():
    """Marks a test that loads a model itself."""


FORMATS = {
    "pack-quantized": ({"bits": 3, "group_size": 8}, "pack-quantized", None),
    "pack-quantized-sym": ({"bits": 4, "sym": True}, "pack-quantized", None),
    "pack-quantized-widths": ({"bits": 4, "bits_pattern": {"q_proj": 2}}, "pack-quantized", None),
    "pack-quantized-container": ({"bits": 3, "sym": True}, "pack-quantized", 4),
    "bcq": ({"bits": 3, "group_size": 16}, "bcq", None),
    "bcq-channel": ({"bits": 8}, "bcq", None),
    "bcq-float-zeros": ({"bits": 4, "group_size": 16, "zero": "float"}, "bcq", None),
}


@pytest.mark.parametrize("kwargs, checkpoint_format, container_bits", FORMATS.values(), ids=FORMATS)
def test_our_checkpoints(kwargs, checkpoint_format, container_bits, tmp_path, capsys):
    base = get_peft_model(tiny("llama"), PeqaConfig(**kwargs)).unload()
    make_saveable(base, checkpoint_format, container_bits)
    base.save_pretrained(tmp_path, max_shard_size="20KB")
    (contents,) = inspect(tmp_path, capsys)
    check_layers(contents, base)
    assert contents["format"] == ("bcq" if checkpoint_format == "bcq" else "compressed-tensors")
    assert contents["format_version"] == ("1" if checkpoint_format == "bcq" else None)
    stored = {key: tensor for file in tmp_path.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert contents["nbytes"] == sum(tensor.nbytes for tensor in stored.values())
    name = contents["layers"][0]["name"]
    expected = sum(tensor.nbytes for key, tensor in stored.items() if key.startswith(f"{name}."))
    assert contents["layers"][0]["nbytes"] == expected


def test_a_run(run, capsys, may_load):
    folder, _ = run
    base, adapter = inspect(folder, capsys)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    layers = packed_layers(model.unload())
    assert (base["kind"], adapter["kind"], adapter["format"]) == ("checkpoint", "adapter", "PEQA")
    assert adapter["base_model"] == str(folder / "base") and base["architecture"] == "LlamaForCausalLM"
    assert {layer["name"]: layer["fingerprint"] for layer in adapter["layers"]} == {
        name: layer.fingerprint() for name, layer in layers.items()
    }
    assert all(layer["shape"] == list(layers[layer["name"]].scale.shape) for layer in adapter["layers"])
    assert {(layer["bits"], layer["group_size"]) for layer in adapter["layers"]} == {(3, 32)}
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    scales = sum(layer.scale.numel() for layer in layers.values())
    assert "14 layers of uniform integers, 3 bits, groups of 32" in out and f"{scales:,}" in out
    assert "bits per weight with scales" in out
    assert main(["inspect", str(folder / "adapter"), "--layers"]) == 0
    out = capsys.readouterr().out
    for name, layer in layers.items():
        assert f"  {name}: " in out and f"codes {layer.fingerprint():016x}" in out


def test_adapters_of_one_base_have_one_fingerprint(binary_run, run, tmp_path, capsys, may_load):
    def fingerprint(folder) -> str:
        assert main(["inspect", str(folder)]) == 0
        return next(line.split()[-1] for line in capsys.readouterr().out.splitlines() if "fingerprint" in line)

    config = PeqaConfig(bits=3, group_size=32)
    get_peft_model(AutoModelForCausalLM.from_pretrained(run[0] / "base"), config).save_pretrained(tmp_path)
    assert fingerprint(tmp_path) == fingerprint(run[0] / "adapter") != fingerprint(binary_run[0] / "adapter")


@pytest.mark.parametrize("own_file", [False, True])
def test_gptq(own_file, tmp_path, capsys):
    model, tensors = tiny("llama"), {}
    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):
            codes, scale = torch.randint(8, module.weight.shape), torch.ones(module.weight.shape[0], 2)
            tensors[name] = gptq_layer(codes, scale, torch.zeros_like(scale).int(), 3)
    config = {"bits": 3, "group_size": -1, "checkpoint_format": "gptq_v2"}
    save_gptq(model, tensors, tmp_path, **({} if own_file else config))
    if own_file:
        (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    (contents,) = inspect(tmp_path, capsys)
    assert (contents["format"], contents["format_version"]) == ("gptq", "gptq_v2")
    assert {layer["name"]: layer["shape"] for layer in contents["layers"]} == {
        name: list(model.get_submodule(name).weight.shape) for name in tensors
    }
    assert {layer["bits"] for layer in contents["layers"]} == {3}
    assert {layer["group_size"] for layer in contents["layers"]} == {16, 32}


def test_gguf(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_name("tiny")
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), dtype=np.float16))
    blocks = np.zeros((32, 2 * 18), dtype=np.uint8)
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (contents,) = inspect(tmp_path / "model.gguf", capsys)
    assert (contents["format"], contents["architecture"], contents["base_model"]) == ("gguf", "llama", "tiny")
    assert contents["nbytes"] == 8 * 64 * 2 + blocks.nbytes
    (layer,) = contents["layers"]
    assert (layer["number_format"], layer["shape"], layer["group_size"]) == ("Q4_0", [32, 64], 32)
    content = (tmp_path / "model.gguf").read_bytes()
    for left in (3, 40, len(content) - 1000):
        (tmp_path / "cut.gguf").write_bytes(content[:left])
        assert main(["inspect", str(tmp_path / "cut.gguf")]) == 2
        assert "cut.gguf' is truncated or no GGUF" in capsys.readouterr().err


def test_other_things(float_folder, tmp_path, capsys):
    (contents,) = inspect(float_folder, capsys)
    assert contents["format"] == "float" and not contents["layers"] and contents["nbytes"] > 0
    get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    (contents,) = inspect(tmp_path, capsys)
    assert contents["format"] == "LORA" and not contents["layers"] and contents["nbytes"] > 0


def test_damage(tmp_path, capsys):
    get_peft_model(tiny("llama"), PeqaConfig(bits=3)).unload().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole, name = shard.read_bytes(), "model.layers.1.mlp.up_proj"

    def error() -> str:
        assert main(["inspect", str(tmp_path)]) == 2
        return capsys.readouterr().err

    shard.write_bytes(whole[:-10])
    assert f"{shard.name}' is truncated" in error()
    shard.write_bytes(whole)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    holder = tmp_path / index[f"{name}.weight_scale"]
    left = {key: tensor for key, tensor in load_file(holder).items() if key != f"{name}.weight_scale"}
    save_file(left, holder, metadata={"format": "pt"})
    assert f"layer '{name}': the files have no weight_scale" in error()
    shard.unlink()
    assert f"lacks {shard.name}, which its index names" in error()
    (tmp_path / "config.json").write_text("{")
    assert "config.json' is no JSON" in error()
    (tmp_path / "config.json").unlink()
    assert "neither config.json nor adapter_config.json" in error()


def test_an_unknown_format_version(tmp_path, capsys):
    base = get_peft_model(tiny("llama"), PeqaConfig(bits=3)).unload()
    make_saveable(base, "bcq")
    base.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format_version"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path)]) == 2
    assert "format_version=7 of bcq is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message", [([], "path is missing"), (["./nothing"], "path='./nothing' doesn't exist")]
)
def test_mistakes(arguments, message, capsys):
    assert main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err
