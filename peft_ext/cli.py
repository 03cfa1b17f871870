# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The `peft-ext` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Optional

from peft_ext.command_line import run_command
from peft_ext.version import __version__


COMMANDS = {
    "tune": "quantise a language model, tune its scales on a text, and compare before and after",
    "quantize": "write a packed checkpoint of a language model, calibrated on a text",
    "eval": "perplexity of a tuned model on a text",
    "generate": "generate text with a tuned model",
    "export": "write a tuned model for other engines: compressed-tensors, GGUF, bcq or plain floats",
    "inspect": "show what is in a checkpoint, an adapter or a run, without loading it",
    "plan": "memory that tuning and serving a model take, from its config alone",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; returns the exit status, see [`run_command`]."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--version"]:
        print(f"peft-ext {__version__}")
        return 0
    return run_command("peft-ext", "peft_ext.commands", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
