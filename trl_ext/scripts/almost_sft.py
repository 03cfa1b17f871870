# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Fine-tunes a model on ALMoST's demonstrations.

```bash
accelerate launch -m peft_ext.cli almost sft \\
    --model_name_or_path smollm2-135m-instruct --use_peft --learning_rate 2e-4 \\
    --dataset_name run/demonstrations.jsonl \\
    --output_dir run/sft
```
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from peft_ext.command_line import run_main, show
from trl_ext.almost.training import sft


def main(argv: Sequence[str]) -> None:
    """Parse the flags (and the YAML of `--config`), and train."""
    result = sft.run(*sft.parse(argv))
    show(result, f"{result['demonstrations']} demonstrations, {result['steps']} steps")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], "peft-ext almost sft"))
