# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Evaluates a run of ALMoST, or any models: HHH alignment, TruthfulQA MC1, win rate on the Vicuna questions.

```bash
peft-ext almost eval --run_dir run --data_dir data  # with hhh, truthfulqa, vicuna
peft-ext almost eval --models run/rlsf --tasks win_rate --output_dir out \
    --judge https://api.openai.com/v1 --judge_model gpt-4o
```
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from peft_ext.command_line import note, run_main, show
from trl_ext.almost.evaluation import run as evaluation


def main(argv: Sequence[str]) -> None:
    """Parse the flags (and the YAML of `--config`), evaluate, and print a table."""
    (args,) = evaluation.parse(argv)
    results = evaluation.run(args)
    show(results, table(results))
    note(f"\n{args.output_dir}/evaluation.json has all of it.")


def table(results: dict[str, Any]) -> str:
    """Results as a Markdown table."""
    lines = [
        "| Model | HHH | TruthfulQA MC1 | win rate | length-controlled | length | repeated 3-grams |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, tasks in results.items():
        win = tasks.get("win_rate", {})
        cells = [
            _percent(tasks.get("hhh")),
            _percent(tasks.get("truthfulqa")),
            _percent(win.get("win_rate")),
            _percent(win.get("length_controlled")),
            "{:.0f} / {:.0f}".format(*win["length"]) if win else "-",
            _repetition(win),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _repetition(win: dict[str, Any]) -> str:
    """The model's, and its baseline's; of a result that an earlier version kept, neither."""
    if "repetition" not in win:
        return "-"
    own, difference = win["repetition"]["value"], win["repetition_difference"]["value"]
    return f"{100 * own:.1f} % / {100 * (own - difference):.1f} %"


def _percent(result: Any) -> str:
    if not result:
        return "-"
    low, high = result["interval"]
    return f"{100 * result['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], "peft-ext almost eval"))
