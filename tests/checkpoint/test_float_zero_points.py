# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Integers whose zero points are floats, in files: ours (`bcq`), not compressed-tensors', and GGUF's blocks with a minimum."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_ext import BcqConfig, PeqaConfig, calibrate, report
from peft_ext.checkpoint.contents import read_contents
from peft_ext.checkpoint.gguf import export_gguf
from peft_ext.checkpoint.gguf_blocks import block_type, to_blocks, why_no_blocks
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.model_card import README
from peft_ext.quant.conversion import packed_layers, quantize_layer
from peft_ext.quant.formats import Uniform
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.packed_module import replace_layer
from peft_ext.quant.uniform import Quantized, quantize
from tests.cases import assert_differs, assert_same, move_adapter
from tests.tiny.folders import save_tiny
from tests.tiny.models import inputs, logits_of, tiny
from tests.tiny.tokenizers import byte_tokenizer


FLOAT = {"bits": 4, "group_size": 16, "zero": "float"}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def logits(model, name="llama"):
    with torch.no_grad():
        return logits_of(model.eval(), inputs(name))


def packed(name="llama", dtype=torch.float32, **kwargs):
    return get_peft_model(tiny(name, dtype), PeqaConfig(**{**FLOAT, **kwargs})).unload()


@pytest.fixture
def folder(tmp_path):
    packed().save_pretrained(tmp_path)
    return tmp_path


def edited(folder, **changes):
    """Other entries in the config's description of the weights; None: the entry is left out."""
    config = json.loads((folder / "config.json").read_text())
    stored = {**config["quantization_config"], **changes}
    config["quantization_config"] = {key: value for key, value in stored.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_round_trip(name, dtype, tmp_path):
    base = packed(name, dtype)
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    # in half precision the positions of a model that was cast are rounded, too
    assert_same(logits(loaded, name), logits(base, name), 0.05 if dtype == torch.bfloat16 else 0.0)
    for layer, before in zip(packed_layers(loaded).values(), packed_layers(base).values()):
        assert layer.number_format == Uniform(4, 16, zero="float")
        assert layer.zero_point.dtype == torch.float32 and torch.equal(layer.zero_point, before.zero_point)
        assert not layer.zero_point.requires_grad
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["number_format"], stored["zero"]) == ("bcq", "uniform", "float")
    with pytest.raises(ValueError, match="'pack-quantized' holds .*whole zero points.*format='bcq'"):
        make_saveable(loaded, "pack-quantized")


def test_files_of_whole_zero_points_are_what_they_were(tmp_path):
    base = packed(zero="int")
    make_saveable(base, "bcq")
    base.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert not [field for field in stored if field.startswith("zero")]
    assert {layer.number_format.zero for layer in packed_layers(packed(zero="int")).values()} == {"int"}
    assert repr(Uniform(4, 32)) == "Uniform(bits=4, group_size=32, sym=False)"


def test_a_float_checkpoint_is_quantised_while_it_is_loaded(tmp_path):
    path = save_tiny("llama", tmp_path)
    config = BcqConfig(bits=4, group_size=16, number_format="uniform", zero="float", zero_pattern={"q_proj": "int"})
    layers = packed_layers(AutoModelForCausalLM.from_pretrained(path, quantization_config=config))
    assert {name for name, layer in layers.items() if layer.number_format.zero == "int"} == {
        name for name in layers if name.endswith("q_proj")
    }
    expected = packed_layers(packed())
    others = [name for name in layers if not name.endswith("q_proj")]
    assert all(layers[name].fingerprint() == expected[name].fingerprint() for name in others)


def test_layers_of_both_kinds(tmp_path):
    base = packed()
    whole = quantize_layer(tiny("llama").get_submodule(Q_PROJ), Uniform(8, 16), "minmax", Q_PROJ)
    replace_layer(base, Q_PROJ, whole)
    make_saveable(base)
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(base))
    zeros = {name: layer.number_format.zero for name, layer in packed_layers(loaded).items()}
    assert zeros.pop(Q_PROJ) == "int" and set(zeros.values()) == {"float"}
    adapter = get_peft_model(loaded, PeqaConfig())  # takes what each layer has
    assert adapter.peft_config["default"].bits == "base" and adapter.peft_config["default"].zero is None


def test_an_adapter_belongs_to_its_zero_points(tmp_path):
    model = get_peft_model(tiny("llama"), PeqaConfig(**FLOAT, task_type="CAUSAL_LM"))
    move_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    model.unload().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for layer in packed_layers(base).values():
        layer.zero_point.data += 0.25
    with pytest.raises(ValueError, match="trained on other integer codes"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match="quantised already with {'zero': 'float'}.*pass zero='float'"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PeqaConfig(zero="int"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"zero": None}, "holds uniform integers with float zero points of 4 bits.*says uniform integers of 4"),
        ({"zero": "whole"}, "zero is 'whole'.*'int', 'float'"),
        ({"zero_pattern": {"q_proj": 1}}, "zero_pattern"),
        ({"sym": True}, "sym=True keeps every zero point in the middle"),
        ({"number_format": "binary", "init_method": None}, "binary codings have no zero points"),
    ],
)
def test_a_config_that_says_something_else(changes, match, folder):
    edited(folder, **changes)
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e31])
def test_zero_points_that_no_weight_has_name_the_layer(value, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q_PROJ}.zero_point"][3, 0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"layer '{Q_PROJ}': zero_point"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_minimum_that_no_weight_has_names_the_layer(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q_PROJ}.zero_point"][3, 0] = tensors[f"{Q_PROJ}.scale"][3, 0] = 1e20
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"layer '{Q_PROJ}': zero_point times scale"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_it_is_said_where_formats_are_listed(folder):
    assert {layer.number_format for layer in read_contents(folder).layers} == {
        "uniform integers with float zero points"
    }
    assert "float zero points" in (folder / README).read_text()
    assert "uniform integers with float zero points" in str(report(AutoModelForCausalLM.from_pretrained(folder)))


def q4_1_layer(out_features=6, blocks=3, seed=0):
    """A layer as a Q4_1 tensor has it, and its bytes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out_features, 32 * blocks), generator=generator, dtype=torch.uint8)
    d, m = torch.randn(2, out_features, blocks, generator=generator).half()
    nibbles = codes.view(out_features, blocks, 32)
    low = nibbles[..., :16] | nibbles[..., 16:] << 4
    as_bytes = [part[..., None].view(torch.uint8) for part in (d, m)]
    zero_point = -m.float() / d.float()
    return Quantized(codes, d.float(), zero_point), torch.cat([*as_bytes, low], -1).view(out_features, -1).numpy()


def test_q4_1_goes_in_and_out_bit_for_bit():
    quantized, stored = q4_1_layer()
    layer = PackedLinear.from_quantized(quantized, 4, None)
    assert block_type(layer) == "Q4_1"
    assert np.array_equal(to_blocks(layer, "Q4_1"), stored)
    read = gguf.dequantize(stored, gguf.GGMLQuantizationType.Q4_1)
    largest = np.abs(read).reshape(6, 3, 32).max(-1).repeat(32, -1)
    # the rounding of float32: of the zero point, the difference, the product, and of the other's product and sum
    assert (np.abs(layer.dequantize().numpy() - read) <= 5 * 2**-24 * 2 * largest).all()


@pytest.mark.parametrize(("bits", "expected"), [(2, "Q4_1"), (3, "Q4_1"), (4, "Q4_1"), (5, "Q5_1"), (8, None)])
def test_blocks_with_a_minimum(bits, expected):
    codes = torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8)
    scale = torch.rand(5, 2) * 0.1
    layer = PackedLinear.from_quantized(Quantized(codes, scale, 2**bits * torch.rand(5, 2)), bits, None)
    assert block_type(layer) == expected
    if expected is None:
        assert "codes of 8 bits with a minimum" in why_no_blocks(layer)
        return
    read = gguf.dequantize(to_blocks(layer, expected), gguf.GGMLQuantizationType[expected])
    bound = 2.0**-11 * 2 ** (bits + 1) * scale.max().item()  # float16, of the scale and of the minimum
    assert np.abs(read - layer.dequantize().numpy()).max() <= bound


def test_blocks_of_constants():
    """Their scale is 1, or too small for float16; the minimum is the constant all the same."""
    weight = torch.tensor([[0.37, -2.5], [0.5, 0.5]]).half().float().repeat_interleave(32, 1)
    weight[1, 40] += 1e-7
    layer = PackedLinear.from_quantized(quantize(weight, 4, 32, zero="float"), 4, None)
    read = gguf.dequantize(to_blocks(layer, "Q4_1"), gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_allclose(read, weight.numpy(), rtol=0, atol=2e-7)


def test_a_whole_model_as_gguf(tmp_path):
    base = packed(group_size=32)
    export_gguf(base, byte_tokenizer(), tmp_path / "m.gguf", other_tensors="f32")
    contents = read_contents(tmp_path / "m.gguf")
    assert {layer.number_format for layer in contents.layers} == {"Q4_1"}
    assert len(contents.layers) == len(packed_layers(base))


def test_calibrated_with_data():
    batches = [{"input_ids": torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0))}]
    config = PeqaConfig(**FLOAT, init_method="calibrated")
    layers = packed_layers(get_peft_model(calibrate(tiny("llama"), config, batches), config).unload())
    assert {(layer.number_format, layer.origin) for layer in layers.values()} == {
        (Uniform(4, 16, zero="float"), "calibrated")
    }


def test_float_zero_points_are_closer_in_small_groups():
    weight = tiny("llama").get_submodule(Q_PROJ).weight.detach()
    off = {}
    for zero in ("int", "float"):
        layer = quantize_layer(tiny("llama").get_submodule(Q_PROJ), Uniform(4, 16, zero=zero), "minmax", Q_PROJ)
        off[zero] = (layer.dequantize() - weight).square().mean()
    assert off["float"] < off["int"]
    assert_differs(packed_layers(packed())[Q_PROJ].dequantize(), weight)
