# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext tune` on conversations with SmolLM2-135M-Instruct, whose chat template has no generation markers; and chat."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from peft_ext.cli import main
from peft_ext.examples import Columns, Encoder
from peft_ext.rows import read_rows, write_rows
from tests.test_examples import CHATS, MESSAGES, by_hand, records


pytestmark = pytest.mark.real
INSTRUCTIONS = Path("/work/shared/data/instructions/seed_tasks.jsonl")


def conversations(count: int) -> list[dict]:
    """Short instructions of Self-Instruct's seed tasks, or, without them, some of our own."""
    rows = read_rows(INSTRUCTIONS) if INSTRUCTIONS.is_file() else []
    pairs = [(row["instruction"], row["output"]) for row in rows if not row["input"] and len(row["output"]) < 200]
    pairs = pairs or [(f"Count from {n} to {n + 3}.", f"{n}, {n + 1}, {n + 2}, {n + 3}") for n in range(count)]
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs[:count]]
    return [{"messages": talk} for talk in talks]


def test_the_assistants_turns(tokenizer):
    examples = Encoder(tokenizer, Columns())(records(MESSAGES), "messages").examples
    assert examples == [by_hand(tokenizer, chat) for chat in CHATS]


def test_tune_and_chat(tokenizer, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "chat.jsonl", conversations(24))
    flags = ["--data", tmp_path / "chat.jsonl", "--max_length", 128, "--packing", "True", "--held_out", 0.25]
    flags += ["--max_steps", 6, "--per_device_train_batch_size", 2, "--init_method", "minmax", "--use_cpu", "True"]
    assert main(["tune", *map(str, flags), "--output_dir", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["perplexity"]
    assert 1 < found["float"] < found["quantized"] and found["tuned"] < found["quantized"]
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n"))
    arguments = ["--max_new_tokens", "12", "--do_sample", "False"]
    assert main(["chat", str(tmp_path / "run"), *arguments]) == 0
    assert "Paris" in capsys.readouterr().out
