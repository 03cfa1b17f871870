# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Trains ALMoST's reward model on comparisons: whole, as LoRA (`--use_peft`) or as PEQA (`--peqa_bits 4`).

```bash
accelerate launch -m peft_ext.cli almost reward \\
    --model_name_or_path smollm2-135m-instruct --use_peft --learning_rate 2e-4 \\
    --dataset_name run/comparisons.jsonl --eval_dataset_name run/comparisons.heldout.jsonl \\
    --output_dir run/reward_model
```
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from peft_ext.command_line import run_main, show
from trl_ext.almost.training import reward


# Of a correlation with length, from which on the way out is named.
MUCH = 0.5


def main(argv: Sequence[str]) -> None:
    """Parse the flags (and the YAML of `--config`), and train."""
    result = reward.run(*reward.parse(argv))
    accuracy = result.get("held_out_accuracy", "not measured")
    show(result, f"{result['pairs']} pairs; held-out accuracy: {accuracy}{_length(result)}")


def _length(result: dict[str, Any]) -> str:
    """How held-out scores go with length; nothing of a training that an earlier version finished."""
    found = result.get("held_out_correlation")
    if not found:
        return ""
    way_out = "" if "length_control" in result or found["log_tokens"] < MUCH else " (--length_control keeps it out)"
    return f"; correlation of scores with length among equally good answers: {found['log_tokens']:.2f}{way_out}"


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], "peft-ext almost reward"))
