# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the command lines of all packages share: a table of commands, flags with a YAML file, errors of one line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from peft_ext.version import __version__


_OURS = ("peft_ext", "generation_ext", "trl_ext")


@dataclass
class ModelArguments:
    """Which language model."""

    model: Optional[str] = field(
        default=None,
        metadata={
            "help": "Hub id, folder, .gguf file, adapter or run of peft-ext tune; by default SmolLM2-135M-Instruct."
        },
    )
    adapter: Optional[str] = field(default=None, metadata={"help": "Folder of a PEFT adapter for it."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})

    def load(self, kind: str = "causal") -> tuple[Any, Any]:
        """The model in eval mode, and its tokenizer; see `peft_ext.models.load`."""
        from peft_ext import models

        model = models.load(self.model, adapter=self.adapter, kind=kind, dtype=self.dtype)
        return model, models.load_tokenizer(self.model)


@dataclass
class TextArguments:
    """What text goes on from, and how its tokens are chosen."""

    prompt: list[str] = field(
        default_factory=list, metadata={"help": "One or more prompts; without it, lines of the standard input."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens to generate at most."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the most likely token."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass to sample from."})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Penalty of tokens that stand in the text already."}
    )
    seed: Optional[int] = field(default=None, metadata={"help": "Seed of sampling."})

    def prompts(self) -> list[str]:
        """The prompts of the flags, or the lines of the standard input.

        Raises:
            ValueError: If there is none, or one is empty; or for `max_new_tokens`.
        """
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        prompts = self.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not prompts or not all(prompts):
            raise ValueError("no prompt, or an empty one: pass --prompt TEXT, or lines on the standard input.")
        return prompts

    def options(self) -> dict[str, Any]:
        """Of `generate`."""
        names = ["max_new_tokens", "do_sample", "repetition_penalty"]
        if self.do_sample:
            names += ["temperature", "top_p"]
        return {name: getattr(self, name) for name in names}


def run_command(program: str, package: str, commands: Mapping[str, str], argv: Optional[Sequence[str]] = None) -> int:
    """Run one of several commands; returns the exit status, see [`run_main`].

    Args:
        program: What the user typed, for messages.
        package: Where each command is a module of its name with a `main(argv)`.
        commands: Name -> what it does.
        argv: The command, and its arguments; None: those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(program, commands))
        return 0
    if argv[0] == "--version":
        print(f"{program} {__version__}")
        return 0
    if argv[0] not in commands:
        print(f"{program}: error: unknown command {argv[0]!r}\n\n{usage(program, commands)}", file=sys.stderr)
        return 2
    # imported here: what a command stands on takes seconds, --help should not
    return run_main(
        lambda rest: importlib.import_module(f"{package}.{argv[0]}").main(rest), argv[1:], f"{program} {argv[0]}"
    )


def run_main(main: Callable[[Sequence[str]], Optional[int]], argv: Sequence[str], program: str) -> int:
    """Run a script's or a command's `main`; returns the exit status.

    Mistakes of the user's (a missing file, a bad value) end with one line and status 2, not with a traceback.

    Args:
        main: Takes the arguments; a status that it returns is ours.
        argv: The arguments.
        program: What the user typed, for messages.
    """
    try:
        return main(argv) or 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, TypeError) and not _is_refusal(error):
            raise
        return _failed(program, str(error))
    except Exception as error:
        # a damaged file or YAML; their classes come from libraries that --help should not import
        if type(error).__module__.split(".")[0] not in ("safetensors", "yaml"):
            raise
        # safetensors has one class for everything; what the system refused (a full disk) has its number in the message
        message = str(error) if "os error" in str(error) else f"a file is damaged: {error}"
        return _failed(program, message)


def usage(program: str, commands: Mapping[str, str]) -> str:
    """The help text."""
    lines = [f"  {name:<10}{what}" for name, what in commands.items()]
    return "\n".join(
        [
            f"usage: {program} <command> [--flag value ...] [--config file.yaml]",
            "",
            *lines,
            "",
            f"{program} <command> --help lists its flags; a YAML file of the same names takes their place, and flags "
            "override it.",
        ]
    )


def parse(
    argv: Sequence[str], *kinds: type, positional: Optional[str] = None, program: str = "peft-ext"
) -> tuple[Any, ...]:
    """Dataclasses from flags, and from a YAML file (`--config`) where there is no flag, as TRL's scripts parse them.

    Args:
        argv: The arguments after the command's name.
        kinds: Dataclasses.
        positional: Flag that a first argument without dashes stands for.
        program: What the user typed, for messages.
    """
    try:
        from trl import TrlParser
    except ImportError as error:
        raise ImportError("the command line needs: pip install 'peft-ext[cli]'") from error
    argv = list(argv)
    if positional and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}", *argv]
    return TrlParser(kinds, prog=program).parse_args_and_config(argv)


def _is_refusal(error: TypeError) -> bool:
    """A check's refusal, raised by our own code, rather than a bug that deserves its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith(_OURS)


def _failed(program: str, message: str) -> int:
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2
