# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Runs snippets of Python, each in a fork of a process that has imported PEFT and transformers but never peft_ext.

As good as a fresh process, without the seconds that importing these takes each time. `tests/conftest.py` starts it.
One JSON line in: {"code", "argv", "processes": [{"out", "environment"}, ...]}; one JSON line out: the first exit code that
isn't 0, or 0. A snippet runs in all these processes at once; the output of each goes to the files `out` and `out` + ".err".
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback

import compressed_tensors  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel, Trainer  # noqa: F401


SECONDS = 300


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        running = {_fork(request, **process) for process in request["processes"]}
        print(json.dumps(_wait(running)), flush=True)


def _fork(request: dict, out: str, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid == 0:
        os.environ.update(environment)
        _run(request, out)
    return pid


def _wait(running: set[int]) -> int:
    """Until all have ended; where one fails, the others would wait for it for ever."""
    failed = 0
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in running:
                os.kill(other, signal.SIGKILL)
    return failed


def _run(request: dict, out: str) -> None:
    """In the child: never returns."""
    status = 1
    try:
        signal.alarm(SECONDS)
        for descriptor, name in ((1, out), (2, out + ".err")):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), descriptor)
        sys.argv = ["-c", *request["argv"]]
        exec(compile(request["code"], "<fresh process>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
