# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Fused experts as layers with names, and back; on every way in which transformers stores and routes them."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from peft_ext.quant.conversion import dequantize_layers, packed_layers, quantize_layer
from peft_ext.quant.experts import (
    Pairing,
    UnfusedExperts,
    fuse_experts,
    fused_experts,
    future_layers,
    projection_names,
    unfuse_experts,
    unfused_experts,
)
from peft_ext.quant.formats import Uniform
from peft_ext.quant.packed_module import replace_layer
from tests.tiny.models import tiny
from tests.tiny.moe import EXPERTS, MOE, moe_batch, tiny_moe


families = pytest.mark.parametrize("family", MOE)


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch):
    monkeypatch.setenv("PEFT_EXT_KERNEL", "torch")  # the kernel rounds inputs, and a router may then choose otherwise


def _unfused(family: str) -> nn.Module:
    model = tiny_moe(family)
    assert unfuse_experts(model, lambda name: True)
    return model


@families
def test_unfused_experts_compute_the_same(family):
    model, batch = tiny_moe(family), moe_batch()
    expected = model(**batch).logits
    numbers = sum(parameter.numel() for parameter in model.parameters())
    blocks = unfuse_experts(model, lambda name: True)
    assert list(unfused_experts(model)) == blocks and not fused_experts(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == numbers
    assert not any(parameter.dim() == 3 for parameter in model.parameters())
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@families
def test_the_backward_is_the_same(family):
    fused, batch = tiny_moe(family).train(), moe_batch()
    unfused = copy.deepcopy(fused)
    unfuse_experts(unfused, lambda name: True)
    for model in (fused, unfused):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    fuse_experts(unfused)  # values; gradients stay with the parameters that had them
    fused_embedding, embedding = fused.get_input_embeddings(), unfused.get_input_embeddings()
    torch.testing.assert_close(embedding.weight.grad, fused_embedding.weight.grad, rtol=1e-4, atol=1e-5)


@families
def test_there_and_back(family):
    model, batch = tiny_moe(family), moe_batch()
    stored, expected = copy.deepcopy(model.state_dict()), model(**batch).logits
    unfuse_experts(model, lambda name: True)
    fuse_experts(model)
    found = model.state_dict()
    assert found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored)
    assert torch.equal(model(**batch).logits, expected)


@families
def test_packed_experts_compute_with_the_dequantised_weights(family):
    model, batch = _unfused(family), moe_batch()
    for name, layer in list(model.named_modules()):
        if ".experts." in name and isinstance(layer, nn.Linear):
            replace_layer(model, name, quantize_layer(layer, Uniform(3, -1), "minmax", name))
    packed = packed_layers(model)
    assert len(packed) == 3 * EXPERTS * len(unfused_experts(model))
    floats = dequantize_layers(copy.deepcopy(model))
    assert fused_experts(floats).keys() == unfused_experts(model).keys()
    torch.testing.assert_close(model(**batch).logits, floats(**batch).logits, rtol=1e-4, atol=1e-4)


@families
def test_a_token_alone_and_one_that_no_expert_takes(family):
    model, batch = tiny_moe(family), {"input_ids": torch.tensor([[5]])}
    expected = model(**batch).logits
    unfuse_experts(model, lambda name: True)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    experts = next(iter(unfused_experts(model).values()))
    if family != "llama4":
        nobody = torch.full((3, 2), EXPERTS)
        assert not experts(torch.randn(3, 32), nobody, torch.ones(3, 2)).any()


@families
def test_copies_and_pickles(family):
    model, batch = _unfused(family), moe_batch()
    expected = model(**batch).logits
    assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)
    experts = next(iter(unfused_experts(model).values()))
    again = pickle.loads(pickle.dumps(experts))
    assert isinstance(again, UnfusedExperts) and [name for name, _ in again.layers()] == [
        name for name, _ in experts.layers()
    ]


def test_layers_are_called_as_in_the_family_s_checkpoints():
    assert projection_names(tiny_moe("mixtral")) == ("w1", "w3", "w2")
    assert projection_names(tiny_moe("qwen3_moe")) == ("gate_proj", "up_proj", "down_proj")
    assert projection_names(nn.Linear(1, 1)) == ("gate_proj", "up_proj", "down_proj")


def test_only_blocks_of_which_a_layer_is_wanted():
    model = tiny_moe("qwen3_moe")
    assert len(future_layers(model)) == 2 * EXPERTS * 3
    assert unfuse_experts(model, lambda name: name.startswith("model.layers.1.") and name.endswith("2.up_proj")) == [
        "model.layers.1.mlp.experts"
    ]
    assert list(fused_experts(model)) == ["model.layers.0.mlp.experts"]
    assert not future_layers(tiny("llama")) and not unfuse_experts(tiny("llama"), lambda name: True)


def test_a_block_with_a_packed_layer_stays_unfused():
    model = _unfused("mixtral")
    name = "model.layers.0.mlp.experts.1.w1"
    replace_layer(model, name, quantize_layer(model.get_submodule(name), Uniform(3, -1), "minmax", name))
    fuse_experts(model)
    assert list(unfused_experts(model)) == ["model.layers.0.mlp.experts"]


def test_no_weight_is_copied_where_it_lies_in_one_piece():
    model = tiny_moe("qwen3_moe")
    whole = model.model.layers[0].mlp.experts.down_proj
    unfuse_experts(model, lambda name: True)
    assert model.model.layers[0].mlp.experts.get_submodule("2.down_proj").weight.data_ptr() == whole[2].data_ptr()


def test_interleaved_biases_can_be_saved(tmp_path):
    model = _unfused("gpt_oss")
    model.save_pretrained(tmp_path)  # refuses tensors that overlap


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_pairs_take_the_same_tokens_of_both_copies(family):
    """Calibration compares a token's float input with its disturbed one, though the routers may disagree about it."""
    model, batch = _unfused(family), moe_batch()
    seen = []
    for experts in unfused_experts(model).values():
        experts.pairing = Pairing((batch["attention_mask"],))
        for _, layer in experts.layers():
            layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
    logits = model(**twice).logits
    alone = model(**twice).logits  # the same again: nothing is left behind
    assert torch.equal(logits, alone)
    assert seen and all(torch.equal(*rows.chunk(2)) for rows in seen)
    counted = int(batch["attention_mask"].sum())
    assert max(len(rows) for rows in seen) <= 2 * counted


def test_experts_without_a_gate_and_with_a_norm_behind_them():
    config = SimpleNamespace(
        n_routed_experts=3,
        num_local_experts=3,
        hidden_size=16,
        moe_hidden_size=16,
        moe_intermediate_size=8,
        moe_latent_size=None,
        mlp_hidden_act="relu2",
        hidden_act="silu",
        post_norm_eps=1e-5,
        _experts_implementation="eager",
    )
    index, weights = torch.tensor([[0, 2], [2, 1], [0, 1], [0, 2]]), torch.rand(4, 2)
    for kind in (NemotronHExperts, MuseSparkExperts):
        block = nn.ModuleDict({"experts": kind(config)})
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
        x = torch.randn(4, 16)
        expected = block["experts"](x, index, weights)
        assert unfuse_experts(block, lambda name: True) == ["experts"]
        torch.testing.assert_close(block["experts"](x, index, weights), expected)
        fuse_experts(block)
        torch.testing.assert_close(block["experts"](x, index, weights), expected)
