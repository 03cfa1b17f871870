# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m benchmarks <task> [<experiment> ...]`: the table of tasks; everything else is `benchmarks.core.runner`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Optional

from benchmarks.core import runner
from benchmarks.core.runner import Entry
from peft_ext.command_line import run_main


# Name -> what it is about, and its module. The order of `all`.
TASKS = {
    "peqa_quality": Entry(
        "Perplexity after tuning scales, against LoRA, QLoRA and rounding", "benchmarks.peqa_quality"
    ),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run_main(lambda rest: runner.main(rest, TASKS), argv, runner.PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
