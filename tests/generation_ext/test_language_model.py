# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from generation_ext.language_model import backbone, base_fingerprint
from peft_ext import PeqaConfig
from tests.tiny_models import HIDDEN, VOCAB, inputs, tiny


MODELS = ("llama", "gpt2", "opt", "gpt_neox", "t5")


def lora_model(name: str) -> peft.PeftModel:
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny(name), config)


def packed_model(name: str) -> peft.PeftModel:
    return peft.get_peft_model(tiny(name), PeqaConfig(bits=4, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("name", MODELS)
def test_backbone_computes_what_the_output_head_reads(name):
    model = tiny(name)
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    last = []
    backbone(model).register_forward_hook(lambda module, args, output: last.append(output.last_hidden_state))
    model(**inputs(name))
    scale = HIDDEN**-0.5 if name == "t5" else 1.0  # T5 scales them for its tied head
    torch.testing.assert_close(last[-1] * scale, seen[-1])


@pytest.mark.parametrize("wrap", [lora_model, packed_model])
def test_backbone_of_a_peft_model(wrap):
    model = wrap("llama")
    assert backbone(model) is model.get_base_model().model


def test_backbone_refuses_what_is_no_language_model():
    with pytest.raises(TypeError, match="Linear"):
        backbone(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="without an output head"):
        backbone(tiny("llama").model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_fingerprint_survives_casts(name, dtype):
    assert base_fingerprint(tiny(name, dtype)) == base_fingerprint(tiny(name))
    assert base_fingerprint(tiny(name, dtype).float()) == base_fingerprint(tiny(name))


@pytest.mark.parametrize("wrap", [lora_model, packed_model])
def test_fingerprint_survives_adapters_and_packing(wrap):
    assert base_fingerprint(wrap("llama")) == base_fingerprint(tiny("llama"))


def test_fingerprint_survives_an_extended_vocabulary():
    model = tiny("llama")
    model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    assert base_fingerprint(model) == base_fingerprint(tiny("llama"))


def test_fingerprint_tells_models_apart():
    other = tiny("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight[4, 3] *= -1
    prints = [base_fingerprint(tiny(name)) for name in MODELS] + [base_fingerprint(other)]
    assert len(set(prints)) == len(prints)
