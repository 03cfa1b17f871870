# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The verbs of `peft-ext ood`, a module each."""

COMMANDS = {
    "run": "train the study's classifiers, measure all detectors behind them; resumes, several may run at once",
    "report": "write tables and plots of what is finished",
}
