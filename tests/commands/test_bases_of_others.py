# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""All commands on a base that somebody else has packed: its codes are taken over, and no float weight comes in between."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from peft_ext.cli import main
from peft_ext.models import load
from peft_ext.quant.conversion import packed_layers
from tests.checkpoint.test_loading import MAKERS, gptq
from tests.tiny.folders import save_tiny_model
from tests.tiny.tokenizers import byte_tokenizer


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=[] if name == "tensors" else pytest.mark.slow)
        for name, make in MAKERS.items()
    ],
)
def test_every_command(make, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "float"), dtype=torch.float16)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]
    kwargs = {} if make is gptq else {"dtype": torch.float16}
    base, run, out = tmp_path / "base", tmp_path / "run", tmp_path / "out"
    made = make(base, formats=dict.fromkeys(names, (4, 16, False)), model=model, **kwargs)
    byte_tokenizer().save_pretrained(base)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    blocks = ["--data", str(text), "--block_size", "32", "--held_out_blocks", "2"]
    kind = ["--bits", "4", "--group_size", "16"]
    for command in (
        ["tune", "--model", base, *blocks, *kind, "--max_steps", "2", "--output_dir", run],
        ["eval", "--model", base, "--data", text, "--block_size", "32"],
        ["generate", "--model", base, "--prompt", "ab", "--max_new_tokens", "2"],
        ["generate", "--run", run, "--prompt", "ab", "--max_new_tokens", "2"],
        ["export", run, "--to", "compressed-tensors", "--output_dir", out],
        ["quantize", "--model", base, *blocks, *kind, "--output_dir", tmp_path / "again"],
        ["plan", base, *kind, "--max_length", "64", "--context_length", "64"],
    ):
        assert main([str(part) for part in command]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["inspect", str(base), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["layers"]) == len(names)
    for folder in (run / "base", out, tmp_path / "again"):
        for name, layer in packed_layers(load(str(folder))).items():
            assert torch.equal(layer.codes().long(), made.layers[name].codes), (folder.name, name)
