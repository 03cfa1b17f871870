# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""TRL's own `trl sft` and `trl dpo` behind `peft-ext run` on a packed base: a LoRA is trained, and the base stays packed.

TRL's command line makes LoRA configs alone; what of ours it can train is in `docs/tools.md`.

    python -m benchmarks trl_scripts
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.core.claims import Claim, markdown_table
from benchmarks.core.run import Run, log
from benchmarks.core.task import Task, claims_of_each, tables_of_each
from benchmarks.ecosystem.common import Folders, checked, prepare, run_tool
from peft_ext.quant.conversion import packed_layers


ANSWERS = [("red", "blue"), ("four", "five"), ("a cat", "a stone"), ("north", "soup")] * 4
TOLERANCE = 1e-3


def measure(run: Run) -> None:
    """Train by each script, and load what came out."""
    missing = [script for script in run.scripts if run.find({"script": script}) is None]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        made = prepare(Path(folder) / "models", run.model)
        for script in missing:
            log(script)
            run.add({"script": script}, _train(made, script, run.steps, Path(folder)))


def write_data(folder: Path, method: str) -> Path:
    """A folder of JSON lines as `--dataset_name` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (good, bad) in enumerate(ANSWERS):
        prompt = [{"role": "user", "content": f"Question {number}?"}]
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (good, bad))
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows.append(row if method == "dpo" else {"messages": prompt + chosen})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def flags(method: str, model: Path, data: Path, output: Path, steps: int) -> list[str]:
    """The command line of `trl sft` or `trl dpo` for a LoRA on a model."""
    values = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": output,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "report_to": "none",
        "dtype": "float32",
        "bf16": "False",
        "gradient_checkpointing": "False",
    }
    found = ["trl", method, "--use_peft", "--use_cpu"]
    return found + [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def _train(made: Folders, method: str, steps: int, folder: Path) -> dict[str, Any]:
    output = folder / method
    data = write_data(folder / f"{method}_data", method)
    checked(run_tool(flags(method, made.base, data, output, steps)), f"trl {method}")
    state = json.loads(next(output.glob("checkpoint-*/trainer_state.json")).read_text())
    losses = [row["loss"] for row in state["log_history"] if "loss" in row]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.base), output)
    return {
        "losses": losses,
        "adapter": str(model.active_peft_config.peft_type.value),
        "packed": len(packed_layers(model)),
    }


def tables(run: Run) -> dict[str, str]:
    """What each script trained."""
    lines = []
    for row in run.rows:
        found = row["result"]
        losses = (f"{found['losses'][0]:.3f}", f"{found['losses'][-1]:.3f}")
        lines.append([f"trl {row['key']['script']}", found["adapter"], found["packed"], *losses])
    headers = ["Script", "Trains", "Packed layers", "First loss", "Last loss"]
    return {f"{run.steps} steps": markdown_table(headers, lines)}


def claims(run: Run) -> list[Claim]:
    """DPO starts where its reference is."""
    found = run.find({"script": "dpo"})
    return [Claim("first DPO loss beside log 2", found and abs(found["losses"][0] - math.log(2)), TOLERANCE)]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims))
