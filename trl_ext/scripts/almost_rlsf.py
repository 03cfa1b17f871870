# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Raises the reward of ALMoST's SFT policy on new queries: RLOO, or GRPO with `--trainer grpo`.

```bash
accelerate launch -m peft_ext.cli almost rlsf \\
    --model_name_or_path run/sft --reward_model run/reward_model --use_peft \\
    --dataset_name run/rlsf_queries.jsonl \\
    --output_dir run/rlsf
```
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from peft_ext.command_line import run_main, show
from trl_ext.almost.training import rlsf


def main(argv: Sequence[str]) -> None:
    """Parse the flags (and the YAML of `--config`), and train."""
    result = rlsf.run(*rlsf.parse(argv))
    lines = (
        f"{name}: {result[name]['start']:.4g} at the start, {result[name]['end']:.4g} at the end"
        for name in ("reward", "repetition_penalty", "kl", "length")
        if name in result
    )
    show(result, "\n".join(lines))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], "peft-ext almost rlsf"))
