# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m generation_ext.probing train | predict`."""

from __future__ import annotations

import sys
from functools import partial

from peft_ext.command_line import run_command


COMMANDS = {
    "train": "fit a classifier on the hidden states of labelled texts; goes on after a kill",
    "predict": "classes and probabilities of texts",
}

main = partial(run_command, "python -m generation_ext.probing", "generation_ext.probing.commands", COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
