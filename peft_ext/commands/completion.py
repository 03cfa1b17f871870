# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext completion bash`: a script that completes commands, verbs and flags in a shell.

peft-ext completion bash > ~/.local/share/bash-completion/completions/peft-ext
peft-ext completion zsh >> ~/.zshrc
"""

from __future__ import annotations

import contextvars
import importlib
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field

from peft_ext.command_line import Command, Commands, parse, show


SHELLS = ("bash", "zsh")
_SCRIPT = """# peft-ext: completion of commands, verbs and flags; made by `peft-ext completion`
_peft_ext() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" known
    case "${{COMP_WORDS[*]:1:COMP_CWORD-1}} " in
{cases}
        *) known="{commands}" ;;
    esac
    COMPREPLY=($(compgen -W "$known" -- "$current"))
}}
complete -o default -F _peft_ext peft-ext
"""


@dataclass
class CompletionArguments:
    """Arguments of `peft-ext completion`."""

    shell: str = field(default="bash", metadata={"help": f"{' or '.join(SHELLS)} (or the first argument)."})


def main(argv: Sequence[str]) -> None:
    """Print the script; asks every command for its flags, which takes a while."""
    (args,) = parse(argv, CompletionArguments, positional="shell")
    if args.shell not in SHELLS:
        raise ValueError(f"shell={args.shell!r} is unknown; choose one of {', '.join(SHELLS)}.")
    from peft_ext.cli import COMMANDS

    known = dict(_known(COMMANDS, "peft_ext.commands", ()))
    # the longest words first: a verb's flags come before its group's
    cases = [f'        "{words} "*) known="{flags}" ;;' for words, flags in sorted(known.items(), reverse=True)]
    script = _SCRIPT.format(cases="\n".join(cases), commands=" ".join(COMMANDS))
    if args.shell == "zsh":
        script = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n" + script
    show({"shell": args.shell, "script": script}, script.rstrip("\n"))


def _known(commands: Commands, package: str, before: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Words that stand on the line -> what may follow them."""
    for name, command in commands.items():
        words = (*before, name)
        module = importlib.import_module(command.module if isinstance(command, Command) else f"{package}.{name}")
        verbs = getattr(module, "COMMANDS", None) if isinstance(command, Command) else None
        if verbs:
            yield from _known(verbs, module.__name__, words)
        flags = [] if verbs and not hasattr(module, "main") else _flags(words)
        yield " ".join(words), " ".join([*(verbs or ()), *flags])


def _flags(words: Sequence[str]) -> list[str]:
    from peft_ext.cli import main as peft_ext

    shown = io.StringIO()
    with redirect_stdout(shown):
        try:
            # a context of its own: the help goes where the command's results would
            contextvars.Context().run(peft_ext, [*words, "--help"])
        except SystemExit:
            pass
    return sorted(set(re.findall(r"(?<![\w-])--\w+", shown.getvalue())))
