# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the command lines of all packages share: a table of commands, flags with a YAML file, errors of one line."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Optional, TextIO, Union

from peft_ext import devices
from peft_ext.runs import plain
from peft_ext.version import __version__


_OURS = ("peft_ext", "generation_ext", "trl_ext")
# What trains under transformers' TrainingArguments has the word that all commands share, too: for `parse(aliases=)`.
BATCH_SIZE = {"batch_size": "per_device_train_batch_size"}
# Of transformers' TrainingArguments, what `--help` shows although no class of ours changes it.
_MUCH_USED = (
    *("output_dir", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "max_steps", "warmup_steps", "seed", "bf16", "gradient_checkpointing"),
    *("logging_steps", "save_steps", "report_to"),
)


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
    device: Optional[str] = field(default=None, metadata={"help": devices.HELP})

    def load(self, kind: str = "causal") -> tuple[Any, Any]:
        """The model in eval mode, and its tokenizer; see `peft_ext.models.load`.

        Raises:
            ValueError: If there is no such device.
        """
        from peft_ext import models

        device = devices.usable(self.device)
        model = models.load(self.model, adapter=self.adapter, kind=kind, dtype=self.dtype)
        return model.to(device), models.load_tokenizer(self.model)


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


class Command(NamedTuple):
    """A command that isn't a module of its table's package.

    Attributes:
        what: What it does, for `--help`.
        module: Has its `main(argv)`, or `COMMANDS`, a table of verbs that are modules of that package; with both, `main` is
            what happens without a verb.
    """

    what: str
    module: str


Commands = Mapping[str, Union[str, Command]]


def run_command(program: str, package: str, commands: Commands, argv: Optional[Sequence[str]] = None) -> int:
    """Run one of several commands; returns the exit status, see [`run_main`].

    Args:
        program: What the user typed, for messages.
        package: Where each command that is a text is a module of its name with a `main(argv)`. What that prints goes to the
            standard error, but for what it hands to [`show`]; a module with `OWNS_STDOUT` prints where it likes.
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
        near = difflib.get_close_matches(argv[0], commands, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; choose one of {', '.join(commands)}."
        print(f"{program}: error: unknown command {argv[0]!r}{hint}", file=sys.stderr)
        return 2
    command = commands[argv[0]]
    module = command.module if isinstance(command, Command) else f"{package}.{argv[0]}"
    program = f"{program} {argv[0]}"

    def run(rest: Sequence[str]) -> int:
        # imported here: what a command stands on takes seconds, --help should not
        found = importlib.import_module(module)
        verbs = getattr(found, "COMMANDS", None) if isinstance(command, Command) else None
        if verbs is not None and (not hasattr(found, "main") or (rest and not rest[0].startswith("-"))):
            return run_command(program, module, verbs, rest)
        # what libraries print, such as a Trainer's log, is no result
        with nullcontext() if getattr(found, "OWNS_STDOUT", False) else redirect_stdout(sys.stderr):
            return found.main(rest) or 0

    return run_main(run, argv[1:], program)


def run_main(main: Callable[[Sequence[str]], Optional[int]], argv: Sequence[str], program: str) -> int:
    """Run a script's or a command's `main`; returns the exit status.

    Mistakes of the user's (a missing file, a bad value) end with one line and status 2, not with a traceback; Ctrl-C with
    one line and status 130.

    Args:
        main: Takes the arguments; a status that it returns is ours.
        argv: The arguments.
        program: What the user typed, for messages.
    """
    outer = _typed.get() or _Typed()
    token = _typed.set(_Typed(program, out=outer.out or sys.stdout))
    try:
        return main(argv) or 0
    except KeyboardInterrupt:
        if outer.program:  # a command of a command: the outermost says it
            raise
        print(f"\n{program}: interrupted; the same command goes on where it can.", file=sys.stderr)
        return 130
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
    finally:
        _typed.reset(token)


def show(result: Any, text: str) -> None:
    """Print a command's result on the standard output: `text`, or under `--json` the values as one line of JSON."""
    typed = _typed.get() or _Typed()
    print(json.dumps(plain(result)) if typed.json else text, file=typed.out or sys.stdout)


def note(text: str) -> None:
    """Print what isn't the result, such as where it lies: on the standard error, so that the output can be piped."""
    print(text, file=sys.stderr)


def usage(program: str, commands: Commands) -> str:
    """The help text."""
    width = max(map(len, commands)) + 2
    lines = [f"  {name:<{width}}{what if isinstance(what, str) else what.what}" for name, what in commands.items()]
    return "\n".join(
        [
            f"usage: {program} <command> [--flag value ...] [--config file.yaml]",
            "",
            *lines,
            "",
            f"{program} <command> --help lists its flags; a YAML file of the same names takes their place, and flags "
            "override it. --json prints results as JSON.",
        ]
    )


def parse(
    argv: Sequence[str],
    *kinds: type,
    positional: Optional[str] = None,
    aliases: Optional[Mapping[str, str]] = None,
    program: Optional[str] = None,
) -> tuple[Any, ...]:
    """Dataclasses from flags, and from a YAML file (`--config`) where there is no flag, as TRL's scripts parse them.

    `--json` is for [`show`].
    `--help` lists the flags that are ours or have a default of ours; `--help_all` those of transformers and TRL as well.

    Args:
        argv: The arguments after the command's name.
        kinds: Dataclasses.
        positional: Flag that a first argument without dashes stands for.
        aliases: Other spellings of flags -> the flag, without dashes.
        program: What the user typed, for messages; by default what [`run_main`] was told.
    """
    try:
        from trl import TrlParser
    except ImportError as error:
        raise ImportError("the command line needs: pip install 'peft-ext[cli]'") from error
    typed = _typed.get() or _Typed()
    if "--json" in argv:
        _typed.set(typed._replace(json=True))  # until the command ends, see run_main
    argv = [_spelled(argument, aliases or {}) for argument in argv if argument != "--json"]
    if positional and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}", *argv]

    class Parser(TrlParser):
        def print_help(self, file: Optional[TextIO] = None) -> None:
            super().print_help(file or typed.out)

        def set_defaults_with_config(self, **config: Any) -> list[str]:
            return super().set_defaults_with_config(**{(aliases or {}).get(key, key): config[key] for key in config})

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
            flags, rest = super().parse_known_args(args, namespace)
            devices.settle(flags)
            return flags, rest

    parser = Parser(kinds, prog=program or typed.program or "peft-ext", allow_abbrev=False)
    if "--help_all" in argv:
        argv = ["--help"]
    elif {"-h", "--help"} & set(argv):
        _hide_inherited(parser, kinds)
    try:
        found = parser.parse_args_and_config(argv)
    except ValueError as error:
        unknown = _unknown_flags(argv, parser) if "are not used by the HfArgumentParser" in str(error) else ""
        raise (ValueError(unknown) if unknown else error) from error
    training = [each for each in found if hasattr(each, "use_cpu")]
    for each in found if training else ():
        if each is not training[0] and hasattr(each, "device"):
            devices.check_training_device(each.device, training[0])
    return found


class _Typed(NamedTuple):
    """What the user typed: the command, and whether results are to be JSON; and where results go."""

    program: str = ""
    json: bool = False
    out: Optional[TextIO] = None


_typed: ContextVar[Optional[_Typed]] = ContextVar("typed", default=None)


def _spelled(argument: str, aliases: Mapping[str, str]) -> str:
    name, equals, value = argument.partition("=")
    known = aliases.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
    return argument if known is None else f"--{known}{equals}{value}"


def _unknown_flags(argv: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Says which flags there are not, and which are near them; empty if every flag is known."""
    known = [option for action in parser._actions for option in action.option_strings]
    said = []
    for flag in (argument.partition("=")[0] for argument in argv if argument.startswith("--")):
        if flag not in known and flag != "--config":
            near = difflib.get_close_matches(flag, known, 1)
            said.append(
                f"there is no flag {flag}" + (f"; did you mean {near[0]}?" if near else "; --help_all lists them.")
            )
    return " ".join(said)


def _hide_inherited(parser: argparse.ArgumentParser, kinds: Sequence[type]) -> None:
    """Leave those of `TrainingArguments`' hundred and fifty out of the help that are neither ours nor much used."""
    from transformers import TrainingArguments

    hidden_names: set[str] = set()
    for kind in kinds:
        if issubclass(kind, TrainingArguments):
            ours = {
                name
                for base in kind.__mro__
                if base.__module__.split(".")[0] in _OURS
                for name in vars(base).get("__annotations__", {})
            }
            hidden_names |= {each.name for each in fields(kind)} - ours - set(_MUCH_USED)
    hidden = [action for action in parser._actions if action.dest in hidden_names]
    for action in hidden:
        action.help = argparse.SUPPRESS
    if hidden:
        parser.epilog = f"--help_all lists {len(hidden)} more flags, those of transformers and TRL."


def _is_refusal(error: TypeError) -> bool:
    """A check's refusal, raised by our own code, rather than a bug that deserves its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith(_OURS)


def _failed(program: str, message: str) -> int:
    """One line, whatever libraries (YAML's parser, torch) spread over several."""
    lines = (line.strip() for line in message.splitlines())
    print(f"{program}: error: {' '.join(filter(None, lines))}", file=sys.stderr)
    return 2
