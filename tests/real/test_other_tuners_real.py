# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""LoRA on SmolLM2-135M at 3 bits: trained for a few steps, saved, loaded."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_ext import PeqaConfig
from peft_ext.perplexity import perplexity
from peft_ext.quant.conversion import packed_layers


pytestmark = pytest.mark.real


def test_lora_on_three_bits(smollm2, blocks, tmp_path):
    train, held_out = blocks
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    base = get_peft_model(smollm2(), PeqaConfig(bits=3, group_size=64)).unload()
    packed = packed_layers(base)
    assert len(packed) == 210
    start = perplexity(base, held_out[:8])

    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters()[0] == 2_442_240
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for batch in train[:20].split(4):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    tuned = perplexity(model, held_out[:8])
    print(f"perplexity {start:.2f} -> {tuned:.2f}")
    assert tuned < 0.7 * start

    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=held_out[:1, :16]).logits
        again = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
        assert torch.equal(again(input_ids=held_out[:1, :16]).logits, expected)
    assert list(packed_layers(again).values()) == list(packed.values())
