# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A recipe, a model and data of seconds, on which the benchmark of ALMoST runs from end to end; its numbers mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from benchmarks.in_context import smoke_model
from peft_ext.rows import write_rows


_TRAINING = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
# Random weights write rubbish, so that the filters have to let rubbish through.
_RECIPE: dict[str, Any] = {
    "batch_size": 8,
    "chat_format": "plain",
    "launcher": "inline",
    "queries": {"count": 12, "shots": 1, "max_new_tokens": 12, "min_chars": 0, "rouge_threshold": 1.0},
    "rlsf_queries": {"count": 4},
    "responses": {
        "max_new_tokens": 8,
        "generators": [{"shots": 1}, {"shots": 0}, {"shots": 0, "bits": 3}],
    },
    "comparisons": {"heuristic_filter": False, "length_aware": False, "heldout_share": 0.25},
    "reward_model": {**_TRAINING, "max_length": 128, "length_control": True},
    "self_play": {
        "count": 4,
        "samples": 2,
        "max_turns": 1,
        "prompt": "hhh",
        "shots": 0,
        "max_new_tokens": 8,
        "repetition_weight": 0.5,
    },
    "sft": {**_TRAINING, "max_length": 128},
    "rlsf": {**_TRAINING, "num_generations": 2, "max_completion_length": 4, "repetition_weight": 0.5},
    "evaluation": {"max_new_tokens": 8},
}


def write_smoke(folder: Path) -> tuple[Path, Path]:
    """The recipe's file and the data's folder."""
    model, tokenizer = smoke_model()
    if not (folder / "model").is_dir():
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**_RECIPE, "model_name_or_path": str(folder / "model")}), encoding="utf-8")
    subsets = ("helpful", "honest", "harmless", "other")
    hhh = [
        {"id": n, "subset": name, "prompt": f"Question {n}?", "chosen": "Yes, gladly.", "rejected": "No."}
        for n, name in enumerate(subsets)
    ]
    truth = [
        {"id": n, "question": f"Is {n} a number?", "best_answer": "Yes.", "incorrect_answers": ["No.", "Never."]}
        for n in range(3)
    ]
    questions = [{"id": n, "category": "generic", "turns": [f"What is {n}?"]} for n in range(4)]
    data = folder / "data"
    for name, rows in (("hhh/test", hhh), ("truthfulqa/test", truth), ("vicuna/questions", questions)):
        write_rows(data / f"{name}.jsonl", rows)
    return recipe, data
