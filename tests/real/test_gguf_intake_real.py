# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2's own file, Q4_1: its integers as a packed base compute what the dequantised model does, and are found in it."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_ext import PeqaConfig, load, report
from peft_ext.perplexity import perplexity
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.formats import Uniform
from peft_ext.quant.lattice import find_lattice
from peft_ext.quant.uniform import dequantize


pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def packed(tokenizer):
    return load(dtype=torch.float32, packed=True)


def test_the_untouched_model(packed, smollm2, blocks, tokenizer):
    layers = packed_layers(packed)
    assert len(layers) == 210 and {layer.number_format for layer in layers.values()} == {Uniform(4, 32, zero="float")}
    floats, held_out = smollm2(), blocks.held_out[:4]
    expected = perplexity(floats, held_out)
    assert perplexity(packed, held_out) == pytest.approx(expected, rel=1e-5)
    # the tuner starts there
    tuned = get_peft_model(packed, PeqaConfig(task_type="CAUSAL_LM"))
    assert perplexity(tuned, held_out) == pytest.approx(expected, rel=1e-5)
    assert report(tuned).summary == "packed 210 of 211 linear layers; left: lm_head (output layer)"
    ids = tokenizer("The capital of France is", return_tensors="pt")
    texts = [model.generate(**ids, max_new_tokens=8, do_sample=False).tolist() for model in (tuned, floats)]
    assert texts[0] == texts[1]


def test_the_integers_are_found_in_the_floats(packed, smollm2):
    floats = smollm2()
    for name in ("self_attn.k_proj", "self_attn.o_proj"):
        name = f"model.layers.7.{name}"
        weight, layer = floats.get_submodule(name).weight, packed.get_submodule(name)
        layer = getattr(layer, "base_layer", layer)  # the test before may have put a tuner there
        found = find_lattice(weight)
        assert (found.bits, found.sym, found.quantized.scale.shape) == (4, False, layer.scale.shape)
        largest = weight.detach().abs().max()
        torch.testing.assert_close(
            dequantize(*found.quantized), weight.detach(), rtol=0, atol=float(largest) * 2.0**-21
        )
