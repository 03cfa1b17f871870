# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Packed checkpoints are judged by their contents: digests, missing tensors, types, shapes, numbers, what config.json says."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_ext import AlphaTuningConfig, PeqaConfig, load, load_packed
from peft_ext.checkpoint.contents import read_contents
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.tensor_files import carries_digest, read_header
from tests.checkpoint.gptq_files import gptq_layer, save_gptq
from tests.tiny.models import inputs, tiny


WEIGHTS, LAYER = "model.safetensors", "model.layers.0.mlp.down_proj"
KINDS = {
    "pack-quantized": (PeqaConfig(bits=4, group_size=8, sym=True), None),
    "asymmetric": (PeqaConfig(bits=4, group_size=8), None),
    "integers-bcq": (PeqaConfig(bits=4, group_size=8), "bcq"),
    "bcq": (AlphaTuningConfig(bits=2), None),
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    config, checkpoint_format = KINDS[request.param]
    model = get_peft_model(tiny("llama"), config).unload()
    make_saveable(model, checkpoint_format)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "base")


def rewrite(folder, change, keep_digest=False):
    metadata = read_header(folder / WEIGHTS).metadata if keep_digest else {"format": "pt"}
    tensors = load_file(folder / WEIGHTS)
    change(tensors, [name for name in tensors if name.startswith(LAYER)])
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def configured(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def logits(model):
    with torch.no_grad():
        return model.eval()(**inputs("llama")).logits


def test_saved_with_a_digest_and_taken_without(folder):
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert carries_digest(folder / WEIGHTS)
    rewrite(folder, lambda tensors, own: None)
    assert not carries_digest(folder / WEIGHTS)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)


def test_swapped_and_changed_tensors_are_refused(folder, monkeypatch):
    other = LAYER.replace("layers.0", "layers.1")
    scale = next(name for name in load_file(folder / WEIGHTS) if name.startswith(LAYER) and name.endswith("scale"))

    def swap(tensors, own):
        for name in own:
            twin = name.replace(LAYER, other)
            tensors[name], tensors[twin] = tensors[twin], tensors[name]

    changes = [
        swap,
        lambda t, own: t[scale].neg_(),
        lambda t, own: t[scale].zero_(),
        lambda t, own: t.pop("lm_head.weight"),
    ]
    content = (folder / WEIGHTS).read_bytes()
    for change in changes:
        (folder / WEIGHTS).write_bytes(content)
        rewrite(folder, change, keep_digest=True)
        with pytest.raises(ValueError, match=rf"{WEIGHTS}'.*aren't those that were written|layer 'lm_head'"):
            AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setenv("PEFT_EXT_VERIFY_DIGESTS", "0")
    (folder / WEIGHTS).write_bytes(content)
    rewrite(folder, swap, keep_digest=True)
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_flipped_bit_anywhere_in_the_data_is_refused(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    start = read_header(folder / WEIGHTS).start
    for place in (start, (start + len(content)) // 2, len(content) - 1):
        content[place] ^= 1
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match="aren't those that were written"):
            AutoModelForCausalLM.from_pretrained(folder)
        content[place] ^= 1


@pytest.mark.parametrize("missing", ["all", "one"])
def test_a_layer_without_codes_is_no_random_float_layer(folder, missing):
    parts = [name for name in load_file(folder / WEIGHTS) if name.startswith(LAYER)]
    codes = [name for name in parts if name.endswith(("planes", "weight_packed"))]
    rewrite(folder, lambda tensors, own: [tensors.pop(name) for name in (parts if missing == "all" else codes)])
    with pytest.raises(ValueError, match=rf"layer '{LAYER}': the checkpoint has (neither|.* of it)"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: torch.full_like(tensor, float("nan")),
        lambda tensor: torch.full_like(tensor, 3e38),
        lambda tensor: tensor.int(),
        lambda tensor: tensor[:1].clone(),
        lambda tensor: tensor[None],
    ],
    ids=["nan", "3e38", "integers", "one-row", "more-dimensions"],
)
def test_scales_that_no_weight_has_name_the_layer(folder, change):
    scale = next(name for name in load_file(folder / WEIGHTS) if name.startswith(LAYER) and name.endswith("scale"))
    rewrite(folder, lambda tensors, own: tensors.update({scale: change(tensors[scale])}))
    with pytest.raises(ValueError, match=rf"layer '{LAYER}': .*scale"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "change", [{"quantization_config": None}, {"quantization_config": {"quant_method": "nothing"}}]
)
def test_packed_layers_that_no_config_reads_are_refused(folder, change):
    configured(folder, **change)
    with pytest.raises(ValueError, match="holds packed layers|Unknown quantization type"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"[1]", b'{"a":' + b"[" * 50_000, b"{", "{'ä".encode("latin-1")])
def test_a_config_that_is_no_object_names_the_file(folder, content):
    (folder / "config.json").write_bytes(content)
    for loader in (AutoModelForCausalLM.from_pretrained, load, load_packed):
        with pytest.raises((ValueError, OSError), match=r"config\.json"):
            loader(str(folder))


@pytest.mark.parametrize("value", [{LAYER: "4"}, [1], {LAYER: 8}, {LAYER: True}, {LAYER: 5}])
def test_widths_in_the_config(tmp_path, value):
    get_peft_model(tiny("llama"), KINDS["asymmetric"][0]).unload().save_pretrained(tmp_path)
    configured(tmp_path, packed_bits=value)
    with pytest.raises(ValueError, match="packed_bits"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "field, value", [("bits", "4"), ("bits", True), ("group_size", float("nan")), ("bits_pattern", [1])]
)
def test_fields_of_bcq(tmp_path, field, value):
    get_peft_model(tiny("llama"), KINDS["bcq"][0]).unload().save_pretrained(tmp_path)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    configured(tmp_path, quantization_config={**quantization, field: value})
    with pytest.raises(ValueError, match=f"quantization_config: {field} is "):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    get_peft_model(tiny("llama"), KINDS["pack-quantized"][0]).unload().save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def test_every_shard_has_its_digest(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 1 and all(map(carries_digest, shards))
    AutoModelForCausalLM.from_pretrained(sharded)
    content = bytearray(shards[-1].read_bytes())
    content[-1] ^= 1
    shards[-1].write_bytes(content)
    with pytest.raises(ValueError, match=shards[-1].name):
        AutoModelForCausalLM.from_pretrained(sharded)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/model.safetensors", 3, "", None])
def test_an_index_names_files_of_its_folder_alone(sharded, name):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    for loader in (AutoModelForCausalLM.from_pretrained, load, read_contents):
        with pytest.raises(ValueError, match=r"index\.json': weight_map\['lm_head\.weight'\] is "):
            loader(sharded if loader is read_contents else str(sharded))


def test_a_gptq_layer_without_its_words(tmp_path):
    codes = torch.randint(0, 16, (32, 64))
    layer = gptq_layer(codes, torch.ones(32, 8), torch.full((32, 8), 8), bits=4)
    save_gptq(tiny("llama"), {LAYER: layer}, tmp_path, bits=4, group_size=8, sym=True, checkpoint_format="gptq")
    load_packed(tmp_path)
    other = LAYER.replace("layers.0", "layers.1")
    rewrite(
        tmp_path,
        lambda tensors, own: tensors.update({f"{other}.qzeros": layer["qzeros"]}) or tensors.pop(f"{other}.weight"),
    )
    with pytest.raises(ValueError, match=rf"layer '{other}': the checkpoint has qzeros .*but no qweight"):
        load_packed(tmp_path)


def test_a_head_that_writes_tokens_is_no_random_one(tmp_path):
    codes = torch.randint(0, 16, (32, 64))
    layer = gptq_layer(codes, torch.ones(32, 8), torch.full((32, 8), 8), bits=4)
    save_gptq(tiny("llama"), {LAYER: layer}, tmp_path, bits=4, group_size=8, sym=True, checkpoint_format="gptq")
    rewrite(tmp_path, lambda tensors, own: tensors.pop("lm_head.weight"))
    with pytest.raises(
        ValueError, match="layer 'lm_head': the checkpoint has neither lm_head.qweight nor lm_head.weight"
    ):
        load_packed(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(torch.ones(32, dtype=torch.int16), "is I16; it must be a float"), (torch.ones(1), r"has the shape \[1\]")],
)
def test_other_tensors_of_a_gptq_checkpoint(tensor, message, tmp_path):
    codes = torch.randint(0, 16, (32, 64))
    layer = gptq_layer(codes, torch.ones(32, 8), torch.full((32, 8), 8), bits=4)
    save_gptq(tiny("llama"), {LAYER: layer}, tmp_path, bits=4, group_size=8, sym=True, checkpoint_format="gptq")
    rewrite(tmp_path, lambda tensors, own: tensors.update({"model.norm.weight": tensor}))
    with pytest.raises(ValueError, match=rf"{WEIGHTS}': model.norm.weight {message}"):
        load_packed(tmp_path)


@pytest.mark.parametrize("layers", [2**31, 1e300])
def test_layers_beyond_counting(layers, folder):
    configured(folder, num_hidden_layers=layers)
    with pytest.raises(
        ValueError, match=r"config.json': num_hidden_layers is .*; no model has more than 10000 layers"
    ):
        AutoModelForCausalLM.from_pretrained(folder)
