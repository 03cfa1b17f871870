# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Demonstrations for ALMoST: a model plays a person and an assistant, a reward model chooses the best of N answers.

```bash
peft-ext almost self_play --queries_file run/queries.jsonl --reward_model run/reward_model \\
    --samples 4 --output_file run/demonstrations.jsonl
```
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from peft_ext.command_line import parse, run_main, show
from peft_ext.runs import open_file
from trl_ext.almost.config import SelfPlayConfig, recorded
from trl_ext.almost.data import self_play


@dataclass
class SelfPlayArguments(SelfPlayConfig):
    """Where queries come from, who chooses, and where demonstrations go."""

    queries_file: Optional[str] = field(default=None, metadata={"help": "JSON lines of `id` and `query`; needed."})
    reward_model: Optional[str] = field(
        default=None, metadata={"help": "Who chooses: a folder or a hub id; not needed with --samples 1."}
    )
    output_file: Optional[str] = field(default=None, metadata={"help": "The .jsonl file to write; needed."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples > 1 and not self.reward_model:
            raise ValueError(
                f"reward_model is missing: pass --reward_model, which chooses among samples={self.samples}."
            )


def main(argv: Sequence[str]) -> None:
    """Parse the flags (and the YAML of `--config`), play, and say what choosing gains."""
    (args,) = parse(argv, SelfPlayArguments)
    if not args.queries_file:
        raise ValueError("queries_file is missing: pass --queries_file.")
    counts = self_play.run(args, args.queries_file, open_file(args.output_file, recorded(args)), args.reward_model)
    lines = [f"{name}: {count}" for name, count in counts.items() if name != "best of"]
    for n, numbers in counts["best of"].items():
        lines.append(
            f"reward of the best of {n}: {numbers['mean']:.4f} (standard error {numbers['standard_error']:.4f})"
        )
    show(counts, "\n".join(lines))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], "peft-ext almost self_play"))
