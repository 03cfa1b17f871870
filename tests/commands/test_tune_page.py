# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Every command of docs/tune.md and docs/distillation.md, in one process: alone, each imports TRL anew."""

from __future__ import annotations

import json
import shlex

import pytest
import transformers

from peft_ext.cli import main
from tests.documents.pages import ROOT, blocks, commands
from tests.tiny.folders import save_chat_model


_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_ELSEWHERE = ("needs the hub", "waits for what is typed", "tests/commands/test_bits_budget.py runs it")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page's blocks, in the folder that its setup fills."""
    monkeypatch.chdir(tmp_path)
    save_chat_model(tmp_path / "model")
    found = blocks(ROOT / "docs" / "tune.md")
    for block in found:
        if block.language == "python":
            exec(block.code.replace(_MODEL, "model"), {})
    return [*found, *(block for block in blocks(ROOT / "docs" / "distillation.md") if block.language == "bash")]


def test_the_commands_run(page, tmp_path, capsys):
    transformers.utils.logging.disable_progress_bar()
    runs = [block for block in page if block.language == "bash" and block.not_run not in _ELSEWHERE]
    lines = [line.replace(_MODEL, "model") for block in runs for line in commands(block)]
    for line in lines:
        extra = ["--use_cpu", "True", "--disable_tqdm", "True"] if line.startswith("peft-ext tune") else []
        assert main([*shlex.split(line)[1:], *extra]) == 0, f"{line}\n{capsys.readouterr().err[-2000:]}"
    assert len(lines) == 21
    shapes = {
        run.name: json.loads((run / "metrics.json").read_text())["shape"] for run in (tmp_path / "runs").iterdir()
    }
    assert {run.name for run in (tmp_path / "runs").iterdir()} >= {"towards", "cached", "healed"}
    assert shapes["chats"] == shapes["lora"] == "messages" and shapes["notes"] == "text"
    assert shapes["pairs"] == shapes["talks"] == shapes["questions"] == shapes["splits"] == "prompt/completion"
