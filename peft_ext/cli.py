# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The `peft-ext` command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Optional

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
    """Run a command; returns the exit status.

    Mistakes of the user's (a missing file, a bad value) end with one line and status 2, not with a traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"peft-ext {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"peft-ext: error: unknown command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        # imported here: torch and transformers take seconds, --help should not
        command = importlib.import_module(f"peft_ext.commands.{argv[0]}")
        command.main(argv[1:])
    except (ValueError, OSError, ImportError) as error:
        return _failed(argv[0], str(error))
    except Exception as error:
        # a damaged file or YAML; their classes come from libraries that --help should not import
        if type(error).__module__.split(".")[0] not in ("safetensors", "yaml"):
            raise
        # safetensors has one class for everything; what the system refused (a full disk) has its number in the message
        return _failed(argv[0], str(error) if "os error" in str(error) else f"a file is damaged: {error}")
    return 0


def _failed(command: str, message: str) -> int:
    print(f"peft-ext {command}: error: {message}", file=sys.stderr)
    return 2


def usage() -> str:
    """The help text."""
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: peft-ext <command> [--flag value ...] [--config file.yaml]",
            "",
            *lines,
            "",
            "peft-ext <command> --help lists its flags; a YAML file of the same names takes their place.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
