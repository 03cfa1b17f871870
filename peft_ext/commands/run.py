# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext run`: another program with our methods known to PEFT and our formats known to transformers."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Optional

from peft_ext.startup.sitecustomize import watch


USAGE = """usage: peft-ext run [--] <program> [argument ...]
       peft-ext run [--] -m <module> [argument ...]

Runs a program of this environment as if it had imported peft_ext: it loads adapters of our methods and packed
checkpoints, and so do the Python processes that it starts.

program   a console script (lm_eval, trl, transformers, ...), a Python file, or any other executable
module    what python -m would run

  peft-ext run -- lm_eval --model hf --model_args pretrained=base,peft=adapter --tasks my_task --include_path tasks
  peft-ext run -- trl sft --model_name_or_path base --dataset_name data --use_peft --output_dir out
  accelerate launch -m peft_ext.cli run -- train.py --model base"""

OWNS_STDOUT = True  # the program's
STARTUP = Path(__file__).parents[1] / "startup"


def main(argv: Sequence[str]) -> int:
    """Run it; returns its exit status.

    Raises:
        ValueError: If there is no such program or module.
    """
    argv = list(argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        sys.exit(0)
    if argv[:1] == ["--"]:
        argv = argv[1:]
    if not argv or argv == ["-m"]:
        raise ValueError(f"nothing to run.\n\n{USAGE}")
    if argv[0] == "-m":
        return _run_module(argv[1], argv[2:])
    if argv[0].startswith("-"):
        raise ValueError(f"unknown flag {argv[0]!r}; flags of the program come after its name.\n\n{USAGE}")
    return _run_program(argv[0], argv[1:])


def _run_module(name: str, arguments: Sequence[str]) -> int:
    with _process([name, *arguments], os.getcwd()):
        _check_module(name)
        return _status(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))


def _run_program(name: str, arguments: Sequence[str]) -> int:
    if Path(name).is_file() and (os.sep in name or name.endswith(".py")):
        return _run_file(Path(name), arguments)
    scripts = metadata.entry_points(group="console_scripts", name=name)
    found = shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    if scripts:
        script = next(iter(scripts))
        with _process([found or name, *arguments]):
            # as the file does that pip writes for it
            return _status(lambda: sys.exit(script.load()()))
    if found is None:
        known = sorted({script.name for script in metadata.entry_points(group="console_scripts")})
        close = difflib.get_close_matches(name, known, n=3)
        meant = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"there is no program {name!r}: neither a file, nor in the environment {sys.prefix}, nor on PATH.{meant}"
        )
    return _run_file(Path(found), arguments)


def _run_file(path: Path, arguments: Sequence[str]) -> int:
    interpreter = _interpreter(path)
    if path.suffix != ".py" and interpreter is None:
        with _process():
            return _shell_status(subprocess.run([str(path), *arguments]).returncode)
    if interpreter is not None and os.path.isabs(interpreter) and "python" in os.path.basename(interpreter):
        if Path(interpreter).parent.resolve() != Path(sys.executable).parent.resolve() and path.suffix != ".py":
            raise ValueError(
                f"{path} is installed for another Python ({interpreter}), which has no peft_ext of this environment; "
                f"install it here ({sys.executable} -m pip install ...)."
            )
    with _process([str(path), *arguments], str(path.resolve().parent)):
        return _status(lambda: runpy.run_path(str(path), run_name="__main__"))


def _interpreter(path: Path) -> Optional[str]:
    """The Python that a script names in its first line, `python` where it leaves the choice to PATH; None if it is
    something else."""
    with path.open("rb") as file:
        first = file.readline(512)
    if not first.startswith(b"#!"):
        return None
    parts = first[2:].decode(errors="replace").split()
    if parts and os.path.basename(parts[0]) == "env":
        parts = [part for part in parts[1:] if not part.startswith("-")]
        return "python" if parts and os.path.basename(parts[0]).startswith("python") else None
    return parts[0] if parts and "python" in os.path.basename(parts[0]) else None


def _check_module(name: str) -> None:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
            if spec is None:
                raise ValueError(f"-m {name}: the package has no __main__; name one of its modules.")
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        spec = None
    if spec is None:
        raise ValueError(f"-m {name}: there is no such module in the environment {sys.prefix}.")


@contextlib.contextmanager
def _process(argv: Optional[Sequence[str]] = None, first_path: Optional[str] = None) -> Iterator[None]:
    """Arguments, paths and environment as the program would find them, and our methods in what it imports and starts."""
    watch()
    before = sys.argv, list(sys.path), os.environ.get("PYTHONPATH")
    paths = [str(STARTUP), *([before[2]] if before[2] else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    if argv is not None:
        sys.argv = list(argv)
    if first_path is not None:
        sys.path.insert(0, first_path)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before[0], before[1]
        if before[2] is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = before[2]


def _status(run: Callable[[], object]) -> int:
    """What the interpreter would exit with; an error is shown as it shows one."""
    try:
        run()
    except SystemExit as exit:
        if exit.code is None or isinstance(exit.code, int):
            return exit.code or 0
        print(exit.code, file=sys.stderr)
        return 1
    except Exception:
        # not ours to shorten to a line
        traceback.print_exc()
        return 1
    return 0


def _shell_status(code: int) -> int:
    """Of a process that a signal ended, what a shell says."""
    return code if code >= 0 else 128 - code
