# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m generation_ext.critic train | generate | evaluate`."""

from __future__ import annotations

import sys
from functools import partial

from peft_ext.command_line import run_command


COMMANDS = {
    "train": "train a critic for a frozen language model on any reward; goes on after a kill",
    "generate": "generate text with one critic or several",
    "evaluate": "how well a critic foresees the reward, and what it gains at each strength",
}

main = partial(run_command, "python -m generation_ext.critic", "generation_ext.critic.commands", COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
