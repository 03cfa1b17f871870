# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`embedding_bits`: packed with the layers, frozen, saved, loaded, exported."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from peft_ext import AdapterPool, AlphaTuningConfig, PeqaConfig, load, load_packed
from peft_ext.checkpoint.gguf import export_gguf
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.embedding import PackedEmbedding, packed_ends
from tests.cases import assert_differs, assert_same, move_adapter
from tests.checkpoint.test_gguf import float_model, load_back
from tests.tiny.models import inputs, logits_of, tiny
from tests.tiny.tokenizers import byte_tokenizer


CASES = {
    "llama-8": ("llama", PeqaConfig, {"bits": 4, "embedding_bits": 8}, 2),
    "llama-4": ("llama", PeqaConfig, {"bits": 4, "embedding_bits": 4, "group_size": 16}, 2),
    "gpt2-8": ("gpt2", PeqaConfig, {"bits": 4, "embedding_bits": 8, "fan_in_fan_out": True}, 1),
    "gpt2-binary": ("gpt2", AlphaTuningConfig, {"bits": 3, "embedding_bits": 8, "fan_in_fan_out": True}, 1),
    "t5-8": ("t5", PeqaConfig, {"bits": 4, "embedding_bits": 8}, 1),
}


def logits(name: str, model) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model.eval(), inputs(name))


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    name, kind, kwargs, weights = CASES[case]
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model = get_peft_model(tiny(name), kind(**kwargs, task_type="SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"))
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and not any(
        ".lm_head." in key or "embed" in key or "shared" in key or "wte" in key for key in trained
    )
    move_adapter(model)
    tuned = logits(name, model)
    model.save_pretrained(tmp_path / "adapter")
    base = model.unload()
    untuned = logits(name, base)
    assert_differs(untuned, tuned)
    base.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bcq"
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        stored = [key for key in file.keys() if key.endswith(".planes") and key.count(".") <= 2 and "block" not in key]
    assert len(stored) == weights  # a tied weight once
    for again in (auto.from_pretrained(tmp_path / "base"), load_packed(tmp_path / "base", auto_class=auto)):
        assert torch.equal(logits(name, again), untuned)
        assert again.get_memory_footprint() == base.get_memory_footprint()
        assert torch.equal(logits(name, PeftModel.from_pretrained(again, tmp_path / "adapter")), tuned)


def test_an_adapter_that_names_a_float_model_packs_its_embedding(tmp_path):
    float_model("llama", byte_tokenizer()).save_pretrained(tmp_path / "floats")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    model = get_peft_model(model, PeqaConfig(bits=4, embedding_bits=8, task_type="CAUSAL_LM"))
    move_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(again.get_base_model().get_input_embeddings(), PackedEmbedding)
    assert torch.equal(logits("llama", again), logits("llama", model))


def test_other_methods_on_such_a_base(tmp_path):
    """LoRA, a pool, more tuning: none of them takes the ends for layers of theirs."""
    base = get_peft_model(tiny("gpt2"), PeqaConfig(bits=4, embedding_bits=8, fan_in_fan_out=True)).unload()
    ends, layers = set(packed_ends(base)), set(packed_layers(base))
    assert len(ends) == 2 and not ends & layers
    tuned = get_peft_model(base, PeqaConfig(bits=4, fan_in_fan_out=True))
    assert set(tuned.peft_config["default"].target_modules) == layers
    base = tuned.unload()
    AdapterPool(base)
    lora = get_peft_model(base, LoraConfig(target_modules="all-linear", r=2))
    lora(**inputs("gpt2"), labels=inputs("gpt2")["input_ids"]).loss.backward()
    with pytest.raises(ValueError, match="PackedEmbedding|wte"):
        get_peft_model(lora.unload(), LoraConfig(target_modules=["wte"], r=2))


@pytest.mark.parametrize(
    "first, config, message",
    [
        (None, {"embedding_bits": 3}, "embedding_bits=3 is not supported; choose one of"),
        (
            None,
            {"embedding_bits": 8, "target_modules": ["lm_head", "q_proj"]},
            "'lm_head', which is packed with the embedding",
        ),
        (8, {"embedding_bits": 4}, "packed already with 8 bits, which are never rounded again"),
        (8, {"target_modules": ["lm_head"]}, "'lm_head', which is packed with the embedding"),
    ],
)
def test_refused(first, config, message):
    model = tiny("llama")
    if first is not None:
        model = get_peft_model(model, PeqaConfig(bits=4, embedding_bits=first)).unload()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, PeqaConfig(bits=4, **config))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_compressed_tensors_has_no_room():
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4, embedding_bits=8)).unload()
    with pytest.raises(ValueError, match="no room for a packed embedding.*format='bcq'"):
        make_saveable(model, "pack-quantized")


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("bits, expected", [(8, "Q8_0"), (4, "Q4_1")])
def test_as_a_gguf(name, bits, expected, tmp_path):
    tokenizer = byte_tokenizer()
    config = PeqaConfig(bits=4, sym=True, embedding_bits=bits)
    model = get_peft_model(float_model(name, tokenizer), config).unload().eval()
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", other_tensors="f32")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["token_embd.weight"] == expected
    assert types.get("output.weight") == (None if name == "llama-tied" else expected)
    assert_same(logits("llama", load_back(path)), logits("llama", model), tolerance=2e-2)


def test_a_config_and_files_that_disagree(tmp_path):
    get_peft_model(tiny("gpt2"), PeqaConfig(bits=4, embedding_bits=8, fan_in_fan_out=True)).unload().save_pretrained(
        tmp_path
    )
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for embeddings, message in (
        ({"transformer.wte": {"bits": 4, "group_size": -1, "sym": True}}, "layer 'transformer.wte'"),
        (
            {"transformer.wpe": {"bits": 8, "sym": True}},
            "'transformer.wpe', of which the checkpoint has no planes|'transformer.wte'",
        ),
    ):
        config["quantization_config"]["embeddings"] = embeddings
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_classes_and_tensors_from_memory(name, tmp_path):
    """A body alone, a classifier on it, and a state dict instead of files."""
    base = (
        get_peft_model(tiny(name), PeqaConfig(bits=4, embedding_bits=8, fan_in_fan_out=name == "gpt2")).unload().eval()
    )
    base.save_pretrained(tmp_path)
    ids = inputs(name)["input_ids"]
    with torch.no_grad():
        expected = base.base_model(input_ids=ids).last_hidden_state
        body = AutoModel.from_pretrained(tmp_path).eval()
        assert torch.equal(body(input_ids=ids).last_hidden_state, expected)
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(classifier.base_model(input_ids=ids).last_hidden_state, expected)
        config = AutoConfig.from_pretrained(tmp_path)
        again = type(base).from_pretrained(None, config=config, state_dict=dict(base.state_dict())).eval()
        assert torch.equal(again(input_ids=ids).logits, base(input_ids=ids).logits)


def test_plain_bases_keep_plain_embeddings_when_tensors_come_from_memory(tmp_path):
    base = get_peft_model(tiny("gpt2"), PeqaConfig(bits=4, fan_in_fan_out=True)).unload().eval()
    base.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    again = type(base).from_pretrained(None, config=config, state_dict=dict(base.state_dict())).eval()
    assert not packed_ends(again)
    assert torch.equal(logits("gpt2", again), logits("gpt2", base))
