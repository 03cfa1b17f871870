# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PEQA on SmolLM2-135M: what README promises of sizes, counts and reloading, and that tuning helps."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_ext import PeqaConfig, calibrate
from peft_ext.models import DEFAULT_MODEL, load_model, load_tokenizer, resolve_model
from peft_ext.perplexity import perplexity
from peft_ext.text import PYTHON_DOCS, load_text, token_blocks


pytestmark = pytest.mark.real

SCALES = 155_520  # one for every output channel of SmolLM2's linear layers

STOCK = """
import sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert "peft_ext" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.fixture(scope="module", autouse=True)
def _two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def blocks():
    """Training and held-out blocks of 128 tokens."""
    try:
        resolve_model(DEFAULT_MODEL)
    except ImportError as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer()
    splits = load_text(PYTHON_DOCS)
    return token_blocks(tokenizer, splits.train, 128), token_blocks(tokenizer, splits.held_out, 128)[:4]


@pytest.fixture(scope="module")
def tuned(blocks):
    """SmolLM2 at 3 bits, calibrated on few blocks and tuned for a few steps; with perplexities before and after."""
    train, held_out = blocks
    config = PeqaConfig(bits=3, init_method="calibrated", task_type="CAUSAL_LM")
    model = calibrate(load_model(dtype=torch.float32), config, train[-16:].split(8), progressbar=False)
    model = get_peft_model(model, config)
    before = perplexity(model, held_out)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    model.train()
    for batch in train[::17][:32].split(4):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return model, before, perplexity(model, held_out)


def test_tuning_scales_alone_lowers_the_held_out_perplexity(tuned, blocks):
    _, before, after = tuned
    rounded = get_peft_model(load_model(dtype=torch.float32), PeqaConfig(bits=3))
    assert after < 0.9 * before < 0.9 * perplexity(rounded, blocks[1])


def test_one_number_per_output_channel(tuned, tmp_path):
    model, _, _ = tuned
    trained, total = model.get_nb_trainable_parameters()
    assert trained == SCALES
    assert total == load_model().num_parameters() + 3 * SCALES  # weights as such, base scales, zero points, deltas
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 4 * SCALES + 64 * 1024


def test_packed_base_and_adapter_reload(tuned, blocks, tmp_path, fresh_process):
    model, _, _ = tuned
    ids = blocks[1][:1, :32]
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size < 165e6  # 113 MB of it is the embedding
    torch.save(ids, tmp_path / "ids.pt")
    fresh_process(STOCK, tmp_path / "merged", tmp_path / "ids.pt", tmp_path / "logits.pt")
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-3, atol=1e-3)
    again = PeftModel.from_pretrained(load_model(str(tmp_path / "merged")), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-3, atol=1e-3)
