# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_ext import PeqaConfig
from peft_ext.language_model import backbone, base_fingerprint, identity, inference, start_token
from tests.tiny.models import HIDDEN, VOCAB, inputs, tiny


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


def tuned(seed: int, **options):
    """A tiny model with a random LoRA."""
    base = copy.deepcopy(tiny("llama"))
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **options))


def test_the_identity_of_an_adapter_is_its_weights():
    one, other = tuned(1), tuned(2)
    assert identity(one) == identity(tuned(1))
    assert identity(one) != identity(other)  # of the same name, on the same base
    assert identity(one) != identity(tiny("llama"))
    assert identity(tuned(1, lora_alpha=3)) != identity(one)
    assert identity(tuned(1, modules_to_save=["lm_head"])) != identity(one)
    assert base_fingerprint(one) == base_fingerprint(other)


def test_the_identity_follows_what_is_active():
    model = tuned(1)
    with model.disable_adapter():
        assert identity(model) == identity(tiny("llama"))
    before = identity(model)
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False))
    assert identity(model) == before
    model.set_adapter("second")
    assert identity(model) != before


def test_the_identity_tells_bases_apart_that_share_their_embeddings():
    model = copy.deepcopy(tiny("llama"))
    prints = {identity(model), identity(copy.deepcopy(model).bfloat16())}
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    packed = get_peft_model(copy.deepcopy(tiny("llama")), PeqaConfig(bits=4, task_type="CAUSAL_LM"))
    prints |= {identity(model), identity(packed)}
    assert len(prints) == 4


def test_inference_gives_every_module_its_own_mode_back():
    model = copy.deepcopy(tiny("llama")).train()
    model.model.layers[0].eval()
    with pytest.raises(KeyError), inference(model):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training


@pytest.mark.parametrize("start", [None, 7])
def test_the_start_token_is_the_one_that_generate_takes(start):
    model = copy.deepcopy(tiny("t5"))
    model.config.decoder_start_token_id, model.generation_config.decoder_start_token_id = 3, start
    model.generation_config.bos_token_id = 5
    written = model.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=1, do_sample=False)
    assert start_token(model) == written[0, 0]
