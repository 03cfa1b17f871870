# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Layers that vLLM runs as one are stored alike, or it is said; what the command does is in tests/commands/test_export.py."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from peft import get_peft_model

from peft_ext import PeqaConfig
from peft_ext.checkpoint.fused_layers import fused_notice, pack_the_rest, stored_apart
from peft_ext.quant.conversion import packed_layers
from tests.tiny.models import tiny


ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def packed(name="llama", **kwargs):
    return get_peft_model(tiny(name), PeqaConfig(**kwargs)).unload()


@pytest.mark.parametrize("model", [tiny("llama"), packed(bits=4), packed(target_modules=["o_proj", "down_proj"])])
def test_all_or_none_of_a_group(model):
    """Layers that vLLM runs by themselves may be what they are."""
    assert stored_apart(model) == [] and fused_notice(model) is None and pack_the_rest(model) == []


def test_what_differs_is_named():
    model = packed(bits=4, target_modules=r"model\.layers\.0\.(self_attn\.[qk]_proj|mlp\.up_proj)")
    integers, floats = "uniform integers", "float"
    assert stored_apart(model) == [
        {f"{ATTENTION}.q_proj": integers, f"{ATTENTION}.k_proj": integers, f"{ATTENTION}.v_proj": floats},
        {f"{MLP}.gate_proj": floats, f"{MLP}.up_proj": integers},
    ]
    notice = fused_notice(model)
    assert "in 2 of them" in notice and "v_proj float" in notice and "--pack_rest" in notice
    assert pack_the_rest(model) == [f"{ATTENTION}.v_proj", f"{MLP}.gate_proj"]
    assert stored_apart(model) == [] and len(packed_layers(model)) == 5
    layer = packed_layers(model)[f"{ATTENTION}.v_proj"]
    error = (layer.dequantize() - tiny("llama").get_submodule(f"{ATTENTION}.v_proj").weight).abs()
    assert (error <= layer.scale / 2 + 1e-6).all()  # to the nearest level


def test_the_format_of_the_layers_beside_it():
    config = {"bits": 8, "bits_pattern": {"q_proj": 3}, "group_size": 16, "sym": True}
    model = packed(target_modules=["q_proj", "v_proj"], **config)
    pack_the_rest(model)
    assert packed_layers(model)[f"{ATTENTION}.k_proj"].number_format == PeqaConfig(sym=True).number_format(8, 16)
    assert stored_apart(model) == []  # one container holds both widths
    assert [len(group) for group in stored_apart(model, one_scheme=False)] == [3, 3]


def test_other_encoders_names():
    """BERT's query, key and value; gpt_neox has one matrix for the three."""
    assert len(stored_apart(packed("bert", target_modules=["query"]))) == 2
    assert stored_apart(packed("gpt_neox", target_modules=["query_key_value"])) == []


def test_layers_of_another_kind_cannot_be_packed():
    model = packed(target_modules=["q_proj", "k_proj"])
    weights = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    for layer in model.model.layers:
        layer.self_attn.v_proj.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "quantise the float model again" in fused_notice(model)
    with pytest.raises(ValueError, match=f"{ATTENTION}.v_proj' is 8-bit float per channel"):
        pack_the_rest(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
