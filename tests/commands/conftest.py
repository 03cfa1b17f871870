# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A finished run and packed checkpoints of a tiny model, as `tune` and `quantize` leave them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.rows import write_rows
from tests.cases import move_adapter
from tests.tiny.folders import save_chat_model, save_tiny_model


TOKENS = torch.tensor([[5, 6, 7, 8]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float()


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("commands") / "float")


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """A float chat model, and texts."""
    folder = tmp_path_factory.mktemp("places")
    save_chat_model(folder / "chat")
    write_rows(folder / "texts.jsonl", [{"text": f"Text number {number}. " * 12} for number in range(40)])
    return folder


@pytest.fixture
def flags(places):
    """`--model`, `--data` and small counts, of `quantize` and `tune`."""
    common = {"model": places / "chat", "data": places / "texts.jsonl", "held_out_blocks": 2, "calibration_blocks": 4}
    return [part for name, value in common.items() for part in (f"--{name}", str(value))]


def make_run(folder: Path, float_folder: Path, config) -> torch.Tensor:
    """Write a run folder; returns the tuned model's logits."""
    base = get_peft_model(AutoModelForCausalLM.from_pretrained(float_folder), config).unload()
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(float_folder).save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    move_adapter(model)
    model.save_pretrained(folder / "adapter")
    (folder / "config.yaml").write_text(yaml.safe_dump({"bits": config.bits}))
    (folder / "metrics.json").write_text("{}")
    return logits(model)


@pytest.fixture(scope="session")
def run(float_folder, tmp_path_factory):
    """A run of PEQA at 3 bits in groups of 32, and what it computes."""
    folder = tmp_path_factory.mktemp("commands") / "run"
    return folder, make_run(folder, float_folder, PeqaConfig(bits=3, group_size=32, task_type="CAUSAL_LM"))


@pytest.fixture(scope="session")
def binary_run(float_folder, tmp_path_factory):
    """A run of AlphaTuning at 2 bits."""
    folder = tmp_path_factory.mktemp("commands") / "binary"
    return folder, make_run(folder, float_folder, AlphaTuningConfig(bits=2, task_type="CAUSAL_LM"))
