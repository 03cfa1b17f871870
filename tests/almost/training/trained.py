# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Data and flags for tests that train: a run's files as the stages write them, on a tiny model of seconds."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny.folders import save_tiny_model


# Small steps on the whole data, nothing shown, nothing recomputed.
FLAGS = (
    "--per_device_train_batch_size 4 --logging_steps 1 --disable_tqdm True --gradient_checkpointing False "
    "--dataloader_pin_memory False"
).split()
ANSWER, WORSE = "aaaa aa a.", "zz z"


def write_run(folder: Path) -> Path:
    """A base model, comparisons, demonstrations and queries; returns the folder."""
    save_tiny_model(folder / "base")
    pairs = [
        {"id": i, "prompt": _user(f"q {i}"), "chosen": _says(ANSWER), "rejected": _says(WORSE)} for i in range(24)
    ]
    write_lines(folder / "comparisons.jsonl", pairs)
    write_lines(
        folder / "comparisons.heldout.jsonl", [{**pair, "prompt": _user(f"new {pair['id']}")} for pair in pairs[:6]]
    )
    messages = [*_user("Hi you"), *_says("Yes."), *_user("And"), *_says("No b")]
    write_lines(folder / "demonstrations.jsonl", [{"id": i, "messages": messages} for i in range(12)])
    write_lines(folder / "rlsf_queries.jsonl", [{"id": i, "query": f"what {i}"} for i in range(8)])
    return folder


def write_lines(path: Path, rows) -> None:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
