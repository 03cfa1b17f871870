# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Synthetic feedback for ALMoST: a ladder of generators answers queries, and becomes comparisons in TRL's preference format.

```bash
python -m trl_ext.scripts.almost_feedback --queries_file run/queries.jsonl --output_dir run \\
    --ladder prompt=faithful,shots=3 prompt=hhh,shots=5 prompt=hhh,shots=1,bits=3
```
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Optional

from peft_ext.command_line import parse, run_command
from trl_ext.almost.config import ComparisonsConfig, ResponsesConfig
from trl_ext.almost.data.comparisons import build_comparisons, write_comparisons, write_responses
from trl_ext.almost.rewards import RewardModel
from trl_ext.almost.store import open_alone, read_rows
from trl_ext.almost.writing.generators import Rung, parse_ladder
from trl_ext.almost.writing.loading import load_backend


@dataclass
class FeedbackArguments(ComparisonsConfig, ResponsesConfig):
    """Where queries come from, and comparisons go."""

    queries_file: Optional[str] = field(default=None, metadata={"help": "JSON lines of `id` and `query`; needed."})
    output_dir: Optional[str] = field(default=None, metadata={"help": "The folder to write to; needed."})

    def __post_init__(self) -> None:
        ResponsesConfig.__post_init__(self)
        ComparisonsConfig.__post_init__(self)
        parse_ladder(self.ladder)


def main(argv: Sequence[str]) -> None:
    """Parse the flags (and the YAML of `--config`), answer, compare, and say what the filters dropped."""
    (args,) = parse(argv, FeedbackArguments, program="almost_feedback")
    if not args.queries_file or not args.output_dir:
        raise ValueError("queries_file or output_dir is missing: pass --queries_file and --output_dir.")
    folder = Path(args.output_dir).expanduser()
    names = {each.name for each in fields(ResponsesConfig)}
    path = open_alone(str(folder / "responses.jsonl"), {k: v for k, v in asdict(args).items() if k in names})

    def load(rung: Rung):
        model = rung.model or args.model_name_or_path
        return load_backend(model, rung.bits, rung.group_size, args.backend, args.batch_size, args.dtype)

    write_responses(load, args, read_rows(args.queries_file), path)
    reward = None
    if args.as_is_reward_model:
        reward = RewardModel.from_pretrained(args.as_is_reward_model, batch_size=args.reward_batch_size).score
    rows, counts = build_comparisons(read_rows(path), args.ladder, args, reward)
    for name, count in {**counts, **write_comparisons(rows, folder, args)}.items():
        print(f"{name}: {count}")


if __name__ == "__main__":
    sys.exit(
        run_command("trl_ext.scripts", "trl_ext.scripts", {"almost_feedback": ""}, ["almost_feedback", *sys.argv[1:]])
    )
