# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Runs snippets of Python, each in a fork of a process that has imported PEFT and transformers but never peft_ext.

As good as a fresh process, without the seconds that importing these takes each time. `tests/conftest.py` starts it.
One JSON line in: {"code", "argv", "out"}; one JSON line out: the exit code. The snippet's output goes to the files
`out` and `out` + ".err".
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import compressed_tensors  # noqa: F401
import peft  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel  # noqa: F401


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(request)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps(code), flush=True)


def _run(request: dict) -> None:
    """In the child: never returns."""
    status = 1
    try:
        for descriptor, name in ((1, request["out"]), (2, request["out"] + ".err")):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), descriptor)
        sys.argv = ["-c", *request["argv"]]
        exec(compile(request["code"], "<fresh process>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
