# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Functions in processes of their own: the one door for measurements that nothing else may disturb.

    python -m benchmarks.core.worker <module>:<function> <arguments as JSON>

The process imports the module and nothing else, calls the function with the arguments and prints what it returns as JSON, as its
last line.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Union


_ROOT = Path(__file__).resolve().parent.parent.parent


def command(function: Union[str, Callable[..., Any]], arguments: Mapping[str, Any]) -> list[str]:
    """The command line of a worker.

    Args:
        function: A module's own function, or `module:name` if its module must not be imported here.
        arguments: By name; what JSON knows.
    """
    name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
    return [sys.executable, "-W", "ignore", "-m", "benchmarks.core.worker", name, json.dumps(dict(arguments))]


def variables(more: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The environment of a worker: this process's, with `more`, and with this repository's modules."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def fresh_process(
    function: Union[str, Callable[..., Any]],
    arguments: Mapping[str, Any],
    what: str,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """What a function returns in a process of its own.

    Args:
        function: See [`command`].
        arguments: See [`command`].
        what: What it does, for the error.
        more: Added to its environment.

    Raises:
        RuntimeError: If it fails; shows the end of its stderr.
    """
    done = subprocess.run(
        command(function, arguments), cwd=_ROOT, capture_output=True, text=True, env=variables(more), check=False
    )
    if done.returncode:
        raise RuntimeError(f"{what} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def loaded_modules() -> list[str]:
    """What a worker has imported before its function's module: nothing but Python's own."""
    return sorted(sys.modules)


def main() -> None:
    """Call the function that the command line names."""
    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
