# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PEQA on a real language model: SmolLM2-135M-Instruct, 3 bits, on Python's own documentation."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_ext import PeqaConfig, calibrate
from peft_ext.models import load
from peft_ext.perplexity import perplexity
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.uniform import dequantize, quantize
from tests.cases import adapter_parameters, assert_same


pytestmark = pytest.mark.real

# One scale for every output channel of q, k, v, o, gate, up and down in 30 blocks.
SCALES = 30 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)
LINEAR_WEIGHTS = 30 * 576 * (576 + 192 + 192 + 576 + 1536 + 1536 + 1536)


class Run(NamedTuple):
    """What a short run leaves: perplexities on held-out text, folders, and logits to compare with."""

    rounded: float
    start: float
    tuned: float
    trainable: int
    total: int
    packed_bytes: int
    folder: object
    prompt: torch.Tensor
    adapter_logits: torch.Tensor
    base_logits: torch.Tensor
    merged_logits: torch.Tensor


@pytest.fixture(scope="module")
def run(smollm2, tokenizer, blocks, tmp_path_factory) -> Run:
    """Calibrate on a few blocks, train a few steps, save the adapter and the packed base."""
    torch.manual_seed(0)
    train = blocks.train[torch.randperm(len(blocks.train), generator=torch.Generator().manual_seed(0))]
    held_out = blocks.held_out[:8]
    rounded = perplexity(get_peft_model(smollm2(), PeqaConfig(bits=3)), held_out)

    model = smollm2()
    config = PeqaConfig(bits=3, init_method="calibrated", task_type="CAUSAL_LM")
    calibrate(model, config, [{"input_ids": train[:8]}], progressbar=False)
    model = get_peft_model(model, config)
    start = perplexity(model, held_out)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        batch = train[16 + 4 * step : 20 + 4 * step]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    folder = tmp_path_factory.mktemp("smollm2")
    prompt = held_out[:1, :16]
    with torch.no_grad():
        adapter_logits = model(input_ids=prompt).logits
        with model.disable_adapter():
            base_logits = model(input_ids=prompt).logits
    trainable, total = model.get_nb_trainable_parameters()
    packed = sum(m.planes.nbytes for m in model.modules() if isinstance(m, PackedLinear))
    tuned = perplexity(model, held_out)
    model.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "base")
    unloaded = model.unload()
    unloaded.save_pretrained(folder / "base")
    again = PeftModel.from_pretrained(unloaded, folder / "adapter")
    merged = again.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    with torch.no_grad():
        merged_logits = merged(input_ids=prompt).logits
    torch.save(prompt, folder / "prompt.pt")
    return Run(
        rounded, start, tuned, trainable, total, packed, folder, prompt, adapter_logits, base_logits, merged_logits
    )


def test_one_scale_per_output_channel_is_trained(run):
    assert run.trainable == SCALES == 155_520
    assert run.total == 134_515_008 + 3 * SCALES  # the float model's parameters; scales, zero points, deltas


def test_three_bits_take_three_bits(run):
    assert run.packed_bytes == LINEAR_WEIGHTS * 3 // 8


def test_calibration_beats_rounding_and_tuning_beats_both(run):
    assert run.start < 0.5 * run.rounded
    assert run.tuned < 0.95 * run.start


def test_the_adapter_file_is_small(run):
    size = (run.folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 4 * SCALES < size <= 4 * SCALES + 64 * 1024


def test_merged_is_the_adapter(run):
    assert_same(run.merged_logits, run.adapter_logits, tolerance=1e-4)


STOCK = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    logits = model(input_ids=torch.load(sys.argv[2])).logits
assert "peft_ext" not in sys.modules
torch.save(logits, sys.argv[3])
"""


@pytest.mark.parametrize("which", ["base", "merged"])
def test_stock_transformers_loads_the_packed_checkpoint(run, which, fresh_process):
    config = json.loads((run.folder / which / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    fresh_process(STOCK, run.folder / which, run.folder / "prompt.pt", run.folder / "logits.pt")
    expected = run.base_logits if which == "base" else run.merged_logits
    assert_same(torch.load(run.folder / "logits.pt"), expected, tolerance=1e-4)


def test_the_packed_checkpoint_is_small(run):
    size = sum(path.stat().st_size for path in (run.folder / "base").glob("*.safetensors"))
    embeddings = 49152 * 576 * 4
    assert size < embeddings + run.packed_bytes + 4 * (2 * SCALES) + 1_000_000


def test_base_and_adapter_from_disk(run):
    model = PeftModel.from_pretrained(load(str(run.folder / "base"), dtype=torch.float32), run.folder / "adapter")
    with torch.no_grad():
        assert_same(model(input_ids=run.prompt).logits, run.adapter_logits, tolerance=1e-4)
        with model.disable_adapter():
            assert_same(model(input_ids=run.prompt).logits, run.base_logits, tolerance=1e-4)
    assert sum(parameter.numel() for parameter in adapter_parameters(model).values()) == SCALES
    generated = model.generate(input_ids=run.prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 20)


def test_float_zero_points_represent_the_default_model(smollm2):
    """Its weights are a Q4_1 file's: 4 bits in groups of 32, each with a minimum. What is left is float32's rounding."""
    layers = [
        layer for name, layer in smollm2().named_modules() if name.startswith("model.layers.7.") and "proj" in name
    ]
    assert len(layers) == 7
    off = {"int": 0.0, "float": 0.0}
    for layer in layers:
        weight = layer.weight.detach()
        largest = weight.view(len(weight), -1, 32).abs().amax(-1).repeat_interleave(32, 1)
        for zero in off:
            gap = (dequantize(*quantize(weight, 4, 32, zero=zero)) - weight).abs() / largest
            off[zero] = max(off[zero], gap.max().item())
    assert off["float"] <= 4 * 2**-24 and off["int"] > 0.03
