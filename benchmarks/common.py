# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What every benchmark needs: resumable results on disk, a record of the machine, Markdown tables, peak memory."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Optional

import torch

from peft_ext.files import written_whole
from peft_ext.runs import plain


ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("torch", "transformers", "peft", "compressed-tensors", "bitsandbytes")


class Results:
    """Rows of a benchmark in one JSON file, written after every row, so that a kill costs at most the row in work.

    Args:
        path: The JSON file. Rows that it holds already are not measured again.
        seed: Recorded with the environment.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.seed = path, seed
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            self.rows = json.loads(path.read_text(encoding="utf-8"))["rows"]

    def find(self, settings: Mapping[str, Any]) -> Optional[dict[str, Any]]:
        """The result that was measured under exactly these settings, or None."""
        wanted = plain(settings)
        return next((row["result"] for row in self.rows if row["settings"] == wanted), None)

    def add(self, settings: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Store a result, in place of an older one under the same settings, and write the file."""
        row = {"settings": plain(settings), "result": plain(result), "environment": environment(self.seed)}
        self.rows = [other for other in self.rows if other["settings"] != row["settings"]] + [row]
        write_json(self.path, {"rows": self.rows})
        return row["result"]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def argument_parser(
    doc: Optional[str], results: str, table: bool = True, budget: Mapping[str, int] = MappingProxyType({})
) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark that stores what it has measured.

    Args:
        doc: The help text.
        results: Name of the file.
        table: Whether what is stored can be printed alone.
        budget: Numbers that have a flag each, and their defaults.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in budget.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    if table:
        parser.add_argument("--table", action="store_true", help="measure nothing, print what is stored")
    parser.add_argument("--smoke", action="store_true", help="next to nothing: checks that the script runs")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--output", type=Path, default=RESULTS / results)
    return parser


def data_folder(variable: str = "PEFT_EXT_CLASSIFICATION_DATA", name: str = "") -> Optional[Path]:
    """The folder that an environment variable names, or the folder of data sets (or a set's) beside the repository."""
    named, beside = os.environ.get(variable), ROOT.parent / "shared" / "data" / name
    return Path(named) if named else beside if beside.is_dir() else None


def fresh_process(
    module: str, flags: Sequence[str], what: str, variables: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """Run a benchmark's worker in a process of its own; returns the JSON of its last line.

    Args:
        module: Such as `benchmarks.plan_memory`.
        flags: The worker's.
        what: What it does, for the error.
        variables: Added to its environment.

    Raises:
        RuntimeError: If it fails; shows the end of its stderr.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode:
        raise RuntimeError(f"{what} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(seed: int) -> dict[str, Any]:
    """Date, machine, versions and source of a measurement."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "seed": seed,
    }


def describe(record: Mapping[str, Any]) -> str:
    """An environment in one line, for under a table."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    return (
        f"{record['date']}; {record['cpu']}, {record['threads']} threads, {record['memory_gb']} GB; "
        f"Python {record['python']}, {versions}; commit {record['commit']}; seed {record['seed']}"
    )


def cpu_model() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> Optional[str]:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit that is checked out, with `+` if files differ from it."""
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column left-aligned, the others right."""
    lines = ["| " + " | ".join(headers) + " |", "|---|" + "---:|" * (len(headers) - 1)]
    lines += ["| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def verdict(claim: str, value: Optional[float], limit: float, unit: str = "", at_least: bool = False) -> str:
    """`claim: value (at most limit): met / not met`; without a value, that it was not measured."""
    bound = f"at {'least' if at_least else 'most'} {limit:.4g}{unit}"
    if value is None:
        return f"- {claim}: not measured ({bound})"
    met = value >= limit if at_least else value <= limit
    return f"- {claim}: {value:.4g}{unit} ({bound}): {'met' if met else '**not met**'}"


def log(message: str) -> None:
    """A line of progress on stderr, so that stdout holds the tables alone."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)
