# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m generation_ext.critic train | generate | evaluate`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Optional


COMMANDS = {
    "train": "train a critic for a frozen language model on any reward; goes on after a kill",
    "generate": "generate text with one critic or several",
    "evaluate": "how well a critic foresees the reward, and what it gains at each strength",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; returns the exit status.

    Mistakes of the user's end with one line and status 2, not with a traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        print(f"generation_ext.critic: error: unknown command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        # imported here: torch and transformers take seconds, --help should not
        command = importlib.import_module(f"generation_ext.critic.commands.{argv[0]}")
        command.main(argv[1:])
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, TypeError) and not _is_ours(error):
            raise
        return _failed(argv[0], str(error))
    except Exception as error:
        # a damaged file or YAML; their classes come from libraries that --help should not import
        if type(error).__module__.split(".")[0] not in ("safetensors", "yaml"):
            raise
        return _failed(argv[0], f"a file is damaged: {error}")
    return 0


def usage() -> str:
    """The help text."""
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m generation_ext.critic <command> [--flag value ...] [--config file.yaml]",
            "",
            *lines,
            "",
            "<command> --help lists its flags; a YAML file of the same names takes their place, and flags override it.",
        ]
    )


def _is_ours(error: TypeError) -> bool:
    """A check's refusal, rather than a bug that deserves its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("generation_ext")


def _failed(command: str, message: str) -> int:
    print(f"generation_ext.critic {command}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
