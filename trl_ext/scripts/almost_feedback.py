# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Synthetic feedback for ALMoST: generators answer queries, and their answers become comparisons in TRL's preference format.

```bash
peft-ext almost feedback --queries_file run/queries.jsonl --output_dir run \\
    --generators prompt=faithful,shots=3 prompt=hhh,shots=5 prompt=hhh,shots=1,bits=3
```
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Optional

from peft_ext.command_line import parse, run_main, show
from peft_ext.runs import open_file
from trl_ext.almost.config import RENAMED, ComparisonsConfig, ResponsesConfig, recorded
from trl_ext.almost.data import comparisons, responses
from trl_ext.almost.writing.generators import parse_generators


@dataclass
class FeedbackArguments(ComparisonsConfig, ResponsesConfig):
    """Where queries come from, and comparisons go."""

    queries_file: Optional[str] = field(default=None, metadata={"help": "JSON lines of `id` and `query`; needed."})
    output_dir: Optional[str] = field(default=None, metadata={"help": "The folder to write to; needed."})

    def __post_init__(self) -> None:
        ResponsesConfig.__post_init__(self)
        ComparisonsConfig.__post_init__(self)
        parse_generators(self.generators)


def main(argv: Sequence[str]) -> None:
    """Parse the flags (and the YAML of `--config`), answer, compare, and say what the filters dropped."""
    (args,) = parse(argv, FeedbackArguments)
    if not args.queries_file or not args.output_dir:
        raise ValueError("queries_file or output_dir is missing: pass --queries_file and --output_dir.")
    folder = Path(args.output_dir).expanduser()
    names = {each.name for each in fields(ResponsesConfig)} - RENAMED.keys()
    settings = {name: value for name, value in recorded(args).items() if name in names}
    path = open_file(folder / "responses.jsonl", settings, renamed=RENAMED)
    responses.run(args, args.queries_file, path)
    counts = comparisons.run(args, args.generators, path, folder)
    show(counts, "\n".join(f"{name}: {count}" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], "peft-ext almost feedback"))
