# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Runs the steps of one page in the working folder: Python in one session, each command in a process of its own."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Callable


def run(page: str, steps: list[tuple[str, object, int]]) -> None:
    """Run `(kind, what, line)` one after the other; ends the process where one fails, naming the line."""
    run_command = _command_runner()
    names = {"__name__": "__main__"}
    sys.argv = ["python"]
    for kind, what, line in steps:
        if kind == "python":
            exec(compile("\n" * (line - 1) + str(what), page, "exec"), names)
        elif status := run_command(what):
            print(f"{page}, line {line}: {' '.join(what)} ended with {status}", file=sys.stderr)
            sys.exit(1)


def _command_runner() -> Callable[[list[str]], int]:
    """A function that runs `python -m` in a fork of this process as it is now: later, it may have threads that a fork lacks."""
    requests, answers = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(requests[1])
        with os.fdopen(requests[0]) as lines:
            for line in lines:
                import trl.trainer.grpo_trainer  # noqa: F401 (seconds, once instead of in every command's process)
                import trl.trainer.sft_trainer  # noqa: F401

                os.write(answers[1], b"%d\n" % _run_module(line.rstrip("\n").split("\0")))
        os._exit(0)
    os.close(requests[0])
    replies = os.fdopen(answers[0])

    def run_command(words: list[str]) -> int:
        os.write(requests[1], ("\0".join(words) + "\n").encode())
        return int(replies.readline())

    return run_command


def _run_module(words: list[str]) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
