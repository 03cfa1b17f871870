# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Packed embeddings: rows as the whole weight has them, ties that hold, floats again as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_ext.quant.conversion import dequantize_layers, packed_layers
from peft_ext.quant.embedding import PackedEmbedding, packed_ends, shared_ends
from peft_ext.quant.formats import Uniform
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.packing import SUPPORTED_BITS, pack, unpack_rows
from peft_ext.scale_tuning.embeddings import pack_embeddings
from tests.tiny.models import inputs, logits_of, tiny


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(SUPPORTED_BITS),
    rows=st.integers(1, 100),
    columns=st.integers(1, 50),
    count=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
def test_rows_are_those_of_the_weight(bits, rows, columns, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    wanted = torch.randint(0, rows, (count,), generator=generator)
    assert torch.equal(unpack_rows(pack(codes, bits), wanted, columns), codes[wanted])


@pytest.mark.parametrize("number_format", [Uniform(8, -1, sym=True), Uniform(4, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookups(number_format, dtype):
    torch.manual_seed(0)
    weight = torch.randn(77, 64).to(dtype)
    layer = PackedEmbedding.from_quantized(
        number_format.quantize(weight, "minmax"), number_format, dtype, padding_idx=3
    )
    ids = torch.tensor([[0, 76, 5], [31, 32, 5]])
    assert layer(ids).dtype == dtype and layer(ids).shape == (2, 3, 64)
    assert torch.equal(layer(ids), layer.dequantize()[ids].to(dtype))
    assert torch.equal(layer.weight[5].to(dtype), layer(torch.tensor(5)))
    step = layer.scale.max()
    assert (layer(ids).float() - weight[ids].float()).abs().max() <= 0.51 * step + 0.01 * weight.abs().max()
    assert layer(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 64)
    with pytest.raises((IndexError, RuntimeError)):
        layer(torch.tensor([77]))
    again = copy.deepcopy(layer)
    assert torch.equal(again(ids), layer(ids)) and again.fingerprint() == layer.fingerprint()


@pytest.mark.parametrize("name, tied", [("llama", []), ("gpt2", ["lm_head"]), ("t5", None)])
@pytest.mark.parametrize("bits", [8, 4])
def test_both_ends_of_a_model(name, tied, bits):
    model = tiny(name)
    batch, source = inputs(name), model.get_input_embeddings()
    weight, before = source.weight.detach().clone(), model.get_memory_footprint()
    pack_embeddings(model, bits)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedLinear)
    assert not packed_layers(model)  # nothing of them is tuned
    assert (embedding.planes is head.planes) == (tied != [])
    shared = shared_ends(model)
    assert list(shared) == (["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"] if tied is None else tied)
    copies = 2 if tied == [] else 1  # of the weight; nothing of it is there twice
    packed = sum(parameter.nbytes for parameter in embedding.parameters())
    assert model.get_memory_footprint() == before - copies * (weight.nbytes - packed) and packed < weight.nbytes / 2
    # what the rounded floats compute
    reference = tiny(name)
    with torch.no_grad():
        reference.get_input_embeddings().weight.copy_(embedding.dequantize())
        if tied == []:
            reference.get_output_embeddings().weight.copy_(head.dequantize())
        expected = logits_of(reference.eval(), batch)
        model.eval()
        torch.testing.assert_close(logits_of(model, batch), expected, rtol=0, atol=2e-2 * expected.abs().max().item())
    pack_embeddings(model, bits)
    assert model.get_input_embeddings() is embedding
    moved = copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)  # copies, moves and casts keep the tie
    assert (moved.get_input_embeddings().planes is moved.get_output_embeddings().planes) == (tied != [])
    assert (moved.get_input_embeddings().scale is moved.get_output_embeddings().scale) == (tied != [])
    dequantize_layers(model)
    assert not packed_ends(model)
    assert type(model.get_input_embeddings()) is nn.Embedding and type(model.get_output_embeddings()) is nn.Linear
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (tied != [])
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, batch), expected)
    assert model.config.tie_word_embeddings == (tied != [])


def test_resizing_is_refused():
    model = tiny("gpt2")
    pack_embeddings(model, 8)
    with pytest.raises(TypeError, match="PackedEmbedding"):
        model.resize_token_embeddings(200)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model.lm_head.register_module("extra", nn.Identity()), None),
        (
            lambda model: setattr(model.model, "embed_tokens", nn.Embedding(100, 32, max_norm=1.0)),
            "'model.embed_tokens' is a Emb",
        ),
        (lambda model: setattr(model.model, "embed_tokens", _Scaled(100, 32)), "'model.embed_tokens' is a _Scaled"),
        (lambda model: setattr(model, "lm_head", _Head(32, 100)), "'lm_head' is a _Head"),
    ],
    ids=["plain", "max_norm", "scaled", "head"],
)
def test_ends_that_compute_more(change, message):
    model = tiny("llama")
    change(model)
    if message is None:
        pack_embeddings(model, 8)
        return
    with pytest.raises(ValueError, match=message):
        pack_embeddings(model, 8)
    assert not packed_ends(model)


class _Scaled(nn.Embedding):
    """As Gemma's."""


class _Head(nn.Linear):
    """Computes who knows what."""
