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

from peft_ext.command_line import run_main, show
from trl_ext.almost.training import reward


def main(argv: Sequence[str]) -> None:
    """Parse the flags (and the YAML of `--config`), and train."""
    result = reward.run(*reward.parse(argv))
    show(result, f"{result['pairs']} pairs; held-out accuracy: {result.get('held_out_accuracy', 'not measured')}")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], "peft-ext almost reward"))
