# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m peft_ext.ood run | report --config study.yaml`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Optional

from peft_ext.command_line import run_command


COMMANDS = {
    "run": "train the study's classifiers, measure all detectors behind them; resumes, several may run at once",
    "report": "write tables and plots of what is finished",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; returns the exit status, see `run_command`."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command("python -m peft_ext.ood", "peft_ext.ood.study.commands", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
