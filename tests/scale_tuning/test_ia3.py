# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Adapters of one scale per channel as (IA)^3: stock PEFT computes the same, and what (IA)^3 isn't is refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.quant.conversion import dequantize_layers
from peft_ext.scale_tuning.ia3 import ia3_vectors, save_ia3
from tests.cases import assert_differs, assert_same, move_adapter
from tests.tiny.models import HEADS, HIDDEN, tiny
from tests.tiny.moe import tiny_moe


TOKENS = torch.tensor([[5, 6, 7, 8]])
STOCK = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
found = []
for base, adapter in zip(sys.argv[1::2], sys.argv[2::2]):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        found.append(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten().tolist())
assert "peft_ext" not in sys.modules
print(json.dumps(found))
"""


def float_model(name: str):
    if name == "llama":
        return tiny("llama")
    kind = {"mistral": MistralConfig, "qwen3": Qwen3Config, "qwen2": Qwen2Config}[name]
    torch.manual_seed(0)
    config = kind(
        vocab_size=100,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        head_dim=HIDDEN // HEADS,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tuned(name: str, folder, config=None) -> PeftModel:
    """An adapter on a packed base in a folder."""
    config = config or PeqaConfig(bits=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(float_model(name), config).unload().save_pretrained(folder)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    move_adapter(model)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("sym", [True, False])
def test_stock_peft_computes_the_same(sym, tmp_path, fresh_process):
    expected, arguments = {}, []
    for name in ("llama", "mistral", "qwen3"):
        config = PeqaConfig(bits=4, sym=sym, target_modules="all-linear", task_type="CAUSAL_LM")
        model = tuned(name, tmp_path / name, config)
        expected[name] = logits(model)
        with model.disable_adapter():
            assert_differs(logits(model), expected[name])
        arguments += [tmp_path / name, save_ia3(model, tmp_path / f"{name}-ia3")]
    found = json.loads(fresh_process(STOCK, *arguments))
    for values, name in zip(found, expected, strict=True):
        assert_same(torch.tensor(values), expected[name].flatten(), tolerance=1e-5)


def test_it_goes_onto_the_dequantised_base_too(tmp_path):
    """And merges there as PEFT merges it."""
    model = tuned("llama", tmp_path / "base")
    expected = logits(model)
    save_ia3(model, tmp_path / "ia3")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    make_saveable(dequantize_layers(packed))
    packed.save_pretrained(tmp_path / "floats")
    floats = AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    assert_same(
        logits(PeftModel.from_pretrained(floats, tmp_path / "ia3").merge_and_unload()), expected, tolerance=1e-5
    )


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("llama", PeqaConfig(bits=4, group_size=32), "2 scales for an output.*group_size=32"),
        ("llama", PeqaConfig(bits=4, trained="scales+zeros"), "has tuned zero points"),
        ("llama", AlphaTuningConfig(bits=2), "is a binary coding"),
        ("llama", PeqaConfig(bits=4, modules_to_save=["norm"]), "modules_to_save="),
        ("qwen2", PeqaConfig(bits=4, target_modules="all-linear"), "'model.layers.0.self_attn.q_proj' has a bias"),
    ],
    ids=["groups", "zeros", "binary", "modules", "bias"],
)
def test_what_is_no_ia3(name, config, message, tmp_path):
    model = get_peft_model(float_model(name), config)
    with pytest.raises(ValueError, match=f"no \\(IA\\)\\^3 adapter: .*{message}.*--to compressed-tensors"):
        save_ia3(model, tmp_path / "ia3")
    assert not list(tmp_path.iterdir())


def test_a_float_base_is_no_base_for_it(tmp_path):
    float_model("llama").save_pretrained(tmp_path / "floats")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "floats"), PeqaConfig(bits=4))
    with pytest.raises(ValueError, match="its base .*floats' is floats.*model.unload"):
        save_ia3(model, tmp_path / "ia3")


def test_experts_that_stock_transformers_fuses():
    model = get_peft_model(
        tiny_moe("qwen2_moe"), PeqaConfig(bits=4, target_modules=["gate_proj", "up_proj", "down_proj"])
    )
    with pytest.raises(ValueError, match="stock transformers has no layer .*experts"):
        ia3_vectors(model)
