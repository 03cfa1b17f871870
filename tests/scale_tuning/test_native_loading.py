# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Adapters through transformers' own doors: `load_adapter`, `from_pretrained(adapter)`, pipelines."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, pipeline
from transformers.integrations.peft import PeftAdapterMixin

from peft_ext import AlphaTuningConfig, PeqaConfig, registration
from peft_ext.checkpoint.pack_quantized import is_packed
from peft_ext.scale_tuning.native_loading import extended
from tests.cases import (
    ONE_PER_ARCHITECTURE,
    TRANSFORMERS_CASES,
    adapter_parameters,
    assert_differs,
    assert_same,
    loss_of,
    move_adapter,
    over,
    tuner_layers,
)
from tests.tiny.folders import save_tiny, save_word_model
from tests.tiny.models import inputs, logits_of, tiny
from tests.tiny.multimodal import batch, multimodal


EARLIER = Path(__file__).parents[1] / "earlier" / "files"
AUTO = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForSequenceClassification}
WITH_CONFIG = over(TRANSFORMERS_CASES)
FEW = over([case for case in ONE_PER_ARCHITECTURE if case in TRANSFORMERS_CASES and not case.saves_modules])
KINDS = pytest.mark.parametrize("config", [PeqaConfig(bits=3), AlphaTuningConfig(bits=3)], ids=["peqa", "alphatuning"])


def logits(model, name="llama"):
    with torch.no_grad():
        return logits_of(model, inputs(name))


def saved(case, tmp_path, **overrides) -> torch.Tensor:
    """A base and an adapter on it, in folders; the tuned model's logits."""
    save_tiny(case.model, tmp_path / "base")
    base = AUTO.get(case.model, AutoModelForCausalLM).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, case.config(**overrides)).eval()
    move_adapter(model, strength=case.strength)
    model.save_pretrained(tmp_path / "adapter")
    return case.logits(model)


@pytest.fixture
def adapter(tmp_path):
    """The folder of a PEQA adapter on the tiny Llama."""
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4)).eval()
    move_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@WITH_CONFIG
def test_from_pretrained_of_an_adapter(case, tmp_path, caplog):
    expected = saved(case, tmp_path)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        model = AUTO.get(case.model, AutoModelForCausalLM).from_pretrained(tmp_path / "adapter")
    assert "MISSING" not in caplog.text and "UNEXPECTED" not in caplog.text
    assert_same(case.logits(model), expected, tolerance=1e-6)
    assert not model.training
    assert not any(
        parameter.requires_grad for layer in tuner_layers(model).values() for parameter in layer.parameters()
    )


@pytest.fixture
def newer_peft(monkeypatch):
    """transformers' other functions for adapters ask for a PEFT that may not be out yet, and for nothing of it."""
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0.21.0")


@FEW
def test_life_with_transformers_alone(case, tmp_path, newer_peft):
    """Another adapter, neither, the first again; what is saved is the one that is active."""
    expected = saved(case, tmp_path)
    model = AUTO.get(case.model, AutoModelForCausalLM).from_pretrained(tmp_path / "adapter", adapter_name="mine")
    assert model.active_adapters() == ["mine"]
    model.add_adapter(case.config(), "fresh")
    identity = case.logits(model.eval())
    assert_differs(identity, expected)
    model.set_adapter("mine")
    assert_same(case.logits(model), expected, tolerance=1e-6)
    model.disable_adapters()
    assert_same(case.logits(model), identity, tolerance=1e-6)
    model.enable_adapters()
    model.save_pretrained(tmp_path / "again")
    names = [load_file(tmp_path / folder / "adapter_model.safetensors").keys() for folder in ("adapter", "again")]
    assert names[0] == names[1]
    auto = AUTO.get(case.model, AutoModelForCausalLM)
    by_peft = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "again")
    for restored in (by_peft, auto.from_pretrained(tmp_path / "again")):
        assert_same(case.logits(restored), expected, tolerance=1e-6)
    model.delete_adapter("mine")
    assert list(model.peft_config) == ["fresh"]


@KINDS
def test_pipeline_of_an_adapter(config, tmp_path):
    base = save_word_model("llama", tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    move_adapter(model, strength=0.3)
    model.save_pretrained(tmp_path / "adapter")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    generate = pipeline("text-generation", model=str(tmp_path / "adapter"))
    prompt = "w5 w17 w40 w8"
    settings = {"do_sample": False, "max_new_tokens": 8}
    tokens = generate.tokenizer(prompt, return_tensors="pt")
    model_tokens = model.generate(**tokens, **settings)
    assert generate(prompt, return_tensors=True, **settings)[0]["generated_token_ids"] == model_tokens[0].tolist()
    assert not torch.equal(model.unload().generate(**tokens, **settings), model_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [PeqaConfig(bits=4, group_size=16, sym=True), PeqaConfig(bits=4), AlphaTuningConfig(bits=3)],
    ids=["symmetric", "asymmetric", "bcq"],
)
def test_on_a_packed_base(config, dtype, tmp_path):
    get_peft_model(tiny("llama", dtype), config).unload().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    move_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    layers = tuner_layers(restored)
    assert len(layers) == 14 and all(is_packed(layer.base_layer) for layer in layers.values())
    own = tuner_layers(model)
    for name, layer in layers.items():
        scale = own[f"base_model.model.{name}"].scale_of("default")
        assert_same(layer.scale_of("default"), scale, tolerance=1e-6)
    assert_same(logits(restored), logits(model), tolerance=1e-6 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["gemma3", "qwen2_vl", "llava", "whisper"])
def test_models_whose_files_have_other_names(name, packed, tmp_path):
    """transformers renames what it reads for them; an adapter's names are the model's own already."""
    model, kind = multimodal(name), type(multimodal(name))
    if packed:
        model = get_peft_model(model, PeqaConfig(bits=4)).unload()
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(kind.from_pretrained(tmp_path / "base"), PeqaConfig()).eval()
    move_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    restored = kind.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert_same(restored(**batch(name)).logits, model(**batch(name)).logits, tolerance=1e-6)


@pytest.mark.parametrize("kind", ["peqa", "peqa_on_floats", "alphatuning", "bottleneck"])
def test_what_an_earlier_version_wrote(kind, monkeypatch, tmp_path):
    shutil.copytree(EARLIER, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    folder = Path(kind) / "adapter" if (Path(kind) / "adapter").is_dir() else Path(kind)
    base = Path(kind) / "base" if (Path(kind) / "base").is_dir() else "base"
    expected, found = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    expected = PeftModel.from_pretrained(expected, folder).eval()
    found.load_adapter(str(folder))
    assert_same(logits(found), logits(expected), tolerance=1e-6)


@KINDS
def test_another_base_is_refused(config, tmp_path):
    model = get_peft_model(tiny("llama"), config).eval()
    move_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    other = tiny("llama")
    other.model.layers[1].self_attn.v_proj.weight.data.mul_(-1)
    other.save_pretrained(tmp_path / "other")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj.*other integer codes"):
        base.load_adapter(str(tmp_path / "adapter"))
    assert not getattr(base, "peft_config", {})  # nothing of it stays behind
    assert_same(logits(base), logits(get_peft_model(other, config).eval()))
    config_file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "other")}))
    for load in (AutoModelForCausalLM.from_pretrained, lambda folder: pipeline("text-generation", model=str(folder))):
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj.*other integer codes"):
            load(tmp_path / "adapter")


def _key(kind: str) -> str:
    return f"base_model.model.model.layers.1.self_attn.v_proj.peqa_{kind}"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t[_key("scale")].fill_(float("nan")), r"v_proj.*NaN"),
        (lambda t: t[_key("codes")].add_(1), r"v_proj.*other integer codes"),
        (lambda t: t.pop(_key("codes")), r"v_proj.*fingerprint"),
        (
            lambda t: t.update(
                {_key(part).replace("v_proj", "norm"): t[_key(part)].clone() for part in ("scale", "codes")}
            ),
            r"does not tune",
        ),
    ],
    ids=["nan", "fingerprint", "no-fingerprint", "other-layer"],
)
def test_tampered_file(adapter, change, match):
    """The fingerprint is compared to its last bit."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match):
        tiny("llama").load_adapter(str(adapter))


def test_a_second_adapter_that_fails_leaves_the_first(adapter):
    model = tiny("llama")
    model.load_adapter(str(adapter), "first")
    expected = logits(model)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[_key("codes")] += 1
    with pytest.raises(ValueError, match="other integer codes"):
        model.load_adapter(adapter_name="second", peft_config=model.peft_config["first"], adapter_state_dict=tensors)
    assert list(model.peft_config) == ["first"]
    assert_same(logits(model), expected)
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model, "first").values())


def test_trainable(adapter):
    """`is_trainable=True` goes on training from the file's numbers."""
    model = tiny("llama")
    model.load_adapter(str(adapter), is_trainable=True)
    restored = PeftModel.from_pretrained(tiny("llama"), adapter).eval()
    assert_same(logits(model), logits(restored), tolerance=1e-6)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_parameters(model))
    loss_of(model.train(), inputs("llama")).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter_parameters(model).values())


def test_a_state_dict_and_a_subfolder(adapter):
    expected = logits(PeftModel.from_pretrained(tiny("llama"), adapter).eval())
    by_hand, nested = tiny("llama"), tiny("llama")
    tensors = load_file(adapter / "adapter_model.safetensors")
    by_hand.load_adapter(peft_config=PeqaConfig.from_pretrained(adapter), adapter_state_dict=tensors)
    assert_same(logits(by_hand), expected, tolerance=1e-6)
    nested.load_adapter(str(adapter.parent), adapter_kwargs={"subfolder": adapter.name})
    assert_same(logits(nested), expected, tolerance=1e-6)


def test_asks_for_what_transformers_asks_for(adapter):
    model = tiny("llama")
    model.load_adapter(str(adapter))
    with pytest.raises(ValueError, match="Adapter with name default already exists"):
        model.load_adapter(str(adapter))
    with pytest.raises(ValueError, match="only supported for LoRA"):
        model.load_adapter(str(adapter), hotswap=True)
    with pytest.raises(ValueError, match="peft_model_id"):
        model.load_adapter(adapter_name="other")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="adapter_model.safetensors"):
        tiny("llama").load_adapter(str(adapter))


def test_other_methods_are_left_alone(tmp_path):
    model = get_peft_model(tiny("llama"), LoraConfig(init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    plain = tiny("llama")
    plain.load_adapter(str(tmp_path))
    assert_same(logits(plain), logits(model), tolerance=1e-6)


def test_extended_once():
    """However often the package is loaded again, transformers' own function is one step away."""
    wrapper = PeftAdapterMixin.load_adapter
    registration.extend_load_adapter(extended)
    try:
        assert PeftAdapterMixin.load_adapter.__wrapped__ is wrapper.__wrapped__
    finally:
        PeftAdapterMixin.load_adapter = wrapper
    assert wrapper.__wrapped__.__module__ == "transformers.integrations.peft"
