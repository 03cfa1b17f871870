# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Five tasks of lm-evaluation-harness as files: YAML and JSON lines, nothing of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import yaml


WORDS = ["a fine film", "two lost hours", "é ü", "so so", "dull, dull", "a joy", "on and on", "it", "worse", "better"]
TASKS = ("choice", "cloze", "labels", "rolling", "generate")


def rows(count: int) -> list[dict[str, Any]]:
    """Inputs with four endings of different lengths, an option in two places, and which is right."""
    made = []
    for number in range(count):
        text = f"{WORDS[number % len(WORDS)]} {number}"
        endings = ["x", "ab ab", f"{WORDS[(number + 3) % len(WORDS)]} and more", "é"]
        made.append({"text": text, "endings": endings, "answer": number % 4, "side": number % 2})
    return made


def write_tasks(
    folder: Path, count: int = 12, shots: int = 3, sampler: Optional[str] = "first_n", prefix: str = "tiny"
) -> list[str]:
    """Write the tasks and their data; returns their names.

    Args:
        folder: Where to.
        count: Inputs of a task.
        shots: Demonstrations, from a split of their own.
        sampler: How they are chosen; None: the harness's own way, others for each input.
        prefix: Of the names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", 20), ("test", count)):
        lines = (json.dumps(row) for row in rows(number))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = {"data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}}
    shown: dict[str, Any] = {"split": "train"}
    if sampler:
        shown["sampler"] = sampler
    few_shot = {"num_fewshot": shots, "fewshot_split": "train", "fewshot_config": shown}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "training_split": "train"}
    choice = {"output_type": "multiple_choice", **few_shot, "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    tasks = {
        "choice": {
            **choice,
            "doc_to_text": "Text: {{text}}\nEnding:",
            "doc_to_choice": "{{endings}}",
            "doc_to_target": "{{answer}}",
        },
        # the option stands in the context, and what is scored behind it is the same
        "cloze": {
            "output_type": "loglikelihood",
            **few_shot,
            "doc_to_text": "{{endings[side]}}, says {{text}}, is",
            "doc_to_target": " {{text}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "labels": {
            **choice,
            "description": "Is it good?\n\n",
            "doc_to_text": "In: {{text}}\nOut:",
            "doc_to_choice": ["bad", "very good", "good", "goodness, who could tell that"],
            "doc_to_target": "{{answer}}",
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}} {{endings[2]}} {{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        },
        "generate": {
            "output_type": "generate_until",
            **few_shot,
            "doc_to_text": "{{text}}:",
            "doc_to_target": "{{endings[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    names = []
    for name, task in tasks.items():
        names.append(f"{prefix}_{name}")
        text = yaml.safe_dump({"task": names[-1], **common, **task}, sort_keys=False, allow_unicode=True)
        (folder / f"{names[-1]}.yaml").write_text(text, encoding="utf-8")
    return names
