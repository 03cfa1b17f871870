# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""AlphaTuning on a real language model: SmolLM2-135M-Instruct, the first blocks at 2 bits, on Python's documentation."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_ext import AlphaTuningConfig, calibrate
from peft_ext.models import load
from peft_ext.perplexity import perplexity
from tests.cases import assert_same


pytestmark = pytest.mark.real

LAYERS = 4
ALPHAS = LAYERS * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(init_method: str) -> AlphaTuningConfig:
    return AlphaTuningConfig(
        bits=2,
        init_method=init_method,
        target_modules=TARGETS,
        layers_to_transform=list(range(LAYERS)),
        task_type="CAUSAL_LM",
    )


def test_calibrate_tune_save_and_load(smollm2, blocks, tmp_path):
    train, held_out = blocks.train, blocks.held_out[:6]
    greedy = perplexity(get_peft_model(smollm2(), config("greedy")), held_out)

    model, calibrated = smollm2(), config("calibrated")
    calibrate(model, calibrated, [{"input_ids": train[:8]}], progressbar=False)
    model = get_peft_model(model, calibrated)
    assert model.get_nb_trainable_parameters()[0] == ALPHAS
    start = perplexity(model, held_out)
    assert start < 0.5 * greedy
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        batch = train[8 + 4 * step : 12 + 4 * step]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = perplexity(model.eval(), held_out)
    assert tuned < 0.97 * start

    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size <= 4 * ALPHAS + 64 * 1024
    with torch.no_grad():
        expected = model(input_ids=held_out[:1]).logits
    model.unload().save_pretrained(tmp_path / "base")
    base = load(str(tmp_path / "base"), dtype=torch.float32)
    restored = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert_same(restored(input_ids=held_out[:1]).logits, expected, tolerance=1e-4)
    text = restored.generate(input_ids=held_out[:1, :16], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert text.shape == (1, 20)
