# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m generation_ext.critic train | generate | evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Optional

from peft_ext.command_line import run_command


COMMANDS = {
    "train": "train a critic for a frozen language model on any reward; goes on after a kill",
    "generate": "generate text with one critic or several",
    "evaluate": "how well a critic foresees the reward, and what it gains at each strength",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; returns the exit status, see `run_command`."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command("python -m generation_ext.critic", "generation_ext.critic.commands", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
