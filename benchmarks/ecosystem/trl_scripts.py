# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""TRL's own `trl sft` and `trl dpo` behind `peft-ext run` on a packed base: a LoRA is trained, and the base stays packed.

TRL's command line makes LoRA configs alone; what of ours it can train is in `docs/tools.md`.

    python -m benchmarks.ecosystem.trl_scripts
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.common import Results, argument_parser, describe, log, markdown_table, verdict
from benchmarks.ecosystem.common import Folders, checked, prepare, run_tool
from peft_ext.models import DEFAULT_MODEL
from peft_ext.quant.conversion import packed_layers


ANSWERS = [("red", "blue"), ("four", "five"), ("a cat", "a stone"), ("north", "soup")] * 4
TOLERANCE = 1e-3


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Train, load, print."""
    parser = argument_parser(__doc__, "ecosystem_trl.json", budget={"steps": 4})
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default, hub id, folder or .gguf file")
    args = parser.parse_args(argv)
    results = Results(args.output, args.seed)
    if not args.table:
        with tempfile.TemporaryDirectory() as folder:
            made = prepare(Path(folder) / "models", args.model)
            for method in ("sft", "dpo"):
                settings = {"script": method, "model": args.model, "steps": args.steps}
                if results.find(settings) is None:
                    log(method)
                    results.add(settings, _train(made, method, args.steps, Path(folder)))
    print(_table(results))


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


def _table(results: Results) -> str:
    lines, verdicts = [], []
    for row in results.rows:
        method, found = row["settings"]["script"], row["result"]
        losses = found["losses"]
        lines.append([f"trl {method}", found["adapter"], found["packed"], f"{losses[0]:.3f}", f"{losses[-1]:.3f}"])
        if method == "dpo":
            claim = "first DPO loss beside log 2"
            verdicts.append(verdict(claim, abs(losses[0] - math.log(2)), TOLERANCE))
    parts = [markdown_table(["Script", "Trains", "Packed layers", "First loss", "Last loss"], lines), *verdicts]
    return "\n\n".join([*parts, describe(results.rows[-1]["environment"])] if results.rows else parts)


if __name__ == "__main__":
    main()
