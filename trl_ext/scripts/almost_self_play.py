# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Demonstrations for ALMoST: a model plays a person and an assistant, a reward model chooses the best of N answers.

```bash
python -m trl_ext.scripts.almost_self_play --queries_file run/queries.jsonl --reward_model run/reward_model \\
    --samples 4 --output_file run/demonstrations.jsonl
```
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from peft_ext.command_line import parse, run_command
from trl_ext.almost.config import SelfPlayConfig
from trl_ext.almost.data.self_play import self_play
from trl_ext.almost.rewards import RewardModel
from trl_ext.almost.store import open_alone, read_rows
from trl_ext.almost.writing.loading import load_backend


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
    (args,) = parse(argv, SelfPlayArguments, program="almost_self_play")
    if not args.queries_file:
        raise ValueError("queries_file is missing: pass --queries_file.")
    path, queries = open_alone(args.output_file, args), read_rows(args.queries_file)
    backend = load_backend(args.model_name_or_path, backend=args.backend, batch_size=args.batch_size, dtype=args.dtype)
    reward = None
    if args.samples > 1:
        reward = RewardModel.from_pretrained(
            args.reward_model,
            dtype=args.reward_dtype,
            policy_tokenizer=backend.tokenizer,
            batch_size=args.reward_batch_size,
        ).score
    counts = self_play(backend, args, queries, path, reward)
    best = counts.pop("best of")
    for name, count in counts.items():
        print(f"{name}: {count}")
    for n, numbers in best.items():
        print(f"reward of the best of {n}: {numbers['mean']:.4f} (standard error {numbers['standard_error']:.4f})")


if __name__ == "__main__":
    sys.exit(
        run_command(
            "trl_ext.scripts", "trl_ext.scripts", {"almost_self_play": ""}, ["almost_self_play", *sys.argv[1:]]
        )
    )
