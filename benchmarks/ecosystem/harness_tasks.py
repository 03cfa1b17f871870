# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Tasks of lm-evaluation-harness out of local files: YAML and JSON lines, nothing of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import yaml

from benchmarks.core.run import data_folder
from peft_ext.rows import read_rows


# The harness's own way to choose demonstrations takes others for each input; `first_n` the same for all.
SAME, OTHERS = "first_n", None
SST2, SST5 = ["negative", "positive"], ["very negative", "negative", "neutral", "positive", "very positive"]
_SHOWN_WORDS = (20, 30)  # of a demonstration, about 40 tokens


def data_of(named: Optional[str]) -> Path:
    """The folder that holds `sst2`, `sst5` and `wikitext2`: the one that is named, or that of all data sets.

    Raises:
        NotHere: If one of them isn't there.
    """
    return Path(named) if named else [data_folder(name) for name in ("sst2", "sst5", "wikitext2")][0].parent


def write_harness_tasks(folder: Path, data: Path, count: int, shots: int = 8) -> list[str]:
    """Write tasks and their data.

    Args:
        folder: Where to.
        data: Holds `sst2`, `sst5` and `wikitext2`.
        count: Inputs of each task.
        shots: Demonstrations before an input.

    Returns:
        Names: `choice` (labels of one token), `labels` (of different lengths), `cloze` (the last word of a sentence),
        `rolling` (whole paragraphs, no demonstrations), `generate`, and `labels_others`, which shows other demonstrations
        to each input.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sentiment = {"doc_to_text": "Review: {{text}}\nSentiment:", "doc_to_target": "{{answer}}", **_metrics("acc")}
    sst2 = _sentences(data / "sst2", SST2)
    sst5 = _sentences(data / "sst5", SST5)
    wiki = _paragraphs(data / "wikitext2")
    choice = {"output_type": "multiple_choice", **sentiment, "doc_to_choice": SST2}
    labels = {"output_type": "multiple_choice", **sentiment, "doc_to_choice": SST5}
    cloze = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{beginning}}",
        "doc_to_target": " {{last}}",
        **_metrics("perplexity", "acc"),
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        **_metrics("word_perplexity"),
    }
    generate = {
        "output_type": "generate_until",
        "doc_to_text": "Review: {{text}}\nSentiment:",
        "doc_to_target": " {{label}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        **_metrics("exact_match"),
    }
    return [
        _write(folder, "choice", choice, sst2, count, shots, SAME),
        _write(folder, "labels", labels, sst5, count, shots, SAME),
        _write(folder, "cloze", cloze, wiki, count, shots, SAME),
        _write(folder, "rolling", rolling, wiki, count, 0, SAME),
        _write(folder, "generate", generate, sst2, count, shots, SAME),
        _write(folder, "labels_others", labels, sst5, count, shots, OTHERS),
    ]


def _write(
    folder: Path,
    name: str,
    task: Mapping[str, Any],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    count: int,
    shots: int,
    sampler: Optional[str],
) -> str:
    for split, size in (("train", 200), ("test", count)):
        lines = [json.dumps(row) for row in rows[split][:size]]
        (folder / f"{name}_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{name}_{split}.jsonl") for split in ("train", "test")}
        },
        "training_split": "train",
        "test_split": "test",
        "fewshot_split": "train",
        "num_fewshot": shots,
        **({"fewshot_config": {"sampler": sampler, "split": "train"}} if sampler else {}),
        **task,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(text, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return name


def _metrics(*names: str) -> dict[str, Any]:
    return {"metric_list": [{"metric": name} for name in names]}


def _sentences(folder: Path, labels: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Sentences with the number of their label; those that are shown of the length of a demonstration."""
    splits = {}
    for split in ("train", "test"):
        rows = [row for row in read_rows(folder / f"{split}.jsonl") if row["label"] in labels]
        if split == "train":
            rows = [row for row in rows[:4000] if _SHOWN_WORDS[0] <= len(row["text"].split()) <= _SHOWN_WORDS[1]]
        splits[split] = [{**row, "answer": labels.index(row["label"])} for row in rows]
    return splits


def _paragraphs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Paragraphs of an encyclopedia, and their first sentences without their last words."""
    splits = {}
    for split, file in (("train", "valid"), ("test", "test")):
        rows = []
        for line in (folder / f"{file}.txt").read_text(encoding="utf-8").splitlines():
            text = re.sub(r"\s+", " ", line.replace("<unk>", "")).strip()
            words = text.split(" . ")[0].split()
            if "=" not in text and _SHOWN_WORDS[0] <= len(words) <= _SHOWN_WORDS[1] and words[-1].isalpha():
                rows.append({"text": text, "beginning": " ".join(words[:-1]), "last": words[-1]})
        splits[split] = rows
    return splits
