# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Mines queries for ALMoST: a model continues a list of ten, filters keep what is well formed and new.

```bash
peft-ext almost queries --count 1000 --output_file run/queries.jsonl
```
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from peft_ext.command_line import parse, run_main, show
from peft_ext.runs import open_file
from trl_ext.almost.config import QueriesConfig, recorded
from trl_ext.almost.data import queries


@dataclass
class QueriesArguments(QueriesConfig):
    """Where queries go."""

    output_file: Optional[str] = field(default=None, metadata={"help": "The .jsonl file to write; needed."})
    avoid: Optional[list[str]] = field(
        default=None, metadata={"help": "Files of queries that new ones must not be close to, either."}
    )


def main(argv: Sequence[str]) -> None:
    """Parse the flags (and the YAML of `--config`), mine, and say what the filters dropped."""
    (args,) = parse(argv, QueriesArguments)
    counts = queries.run(args, open_file(args.output_file, recorded(args)), args.avoid or [])
    show(counts, "\n".join(f"{name}: {count}" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:], "peft-ext almost queries"))
