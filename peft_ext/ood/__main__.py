# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m peft_ext.ood run | report --config study.yaml`."""

from __future__ import annotations

import sys
from functools import partial

from peft_ext.command_line import run_command


COMMANDS = {
    "run": "train the study's classifiers, measure all detectors behind them; resumes, several may run at once",
    "report": "write tables and plots of what is finished",
}

main = partial(run_command, "python -m peft_ext.ood", "peft_ext.ood.study.commands", COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
