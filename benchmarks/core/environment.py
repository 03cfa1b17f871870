# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Machine, versions and source of a measurement: stored once in environments.json, named by rows through a digest."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from peft_ext.files import write_json
from peft_ext.runs import lock


ROOT = Path(__file__).resolve().parent.parent.parent
FILE = "environments.json"
_PACKAGES = ("torch", "transformers", "peft", "compressed-tensors", "bitsandbytes")
# What a measurement doesn't depend on, and what it writes itself: changes there don't make a commit another one.
_NO_SOURCE = (":(exclude)benchmarks/results", ":(exclude)docs", ":(exclude)notebooks", ":(exclude)*.md")


def environment() -> dict[str, Any]:
    """Machine, versions and source of what is measured now in this process."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": commit(),
    }


def digest(record: Mapping[str, Any]) -> str:
    """The name of an environment."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def read_environments(folder: Path) -> dict[str, dict[str, Any]]:
    """Environments by digest that the results in a folder name."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def remember(folder: Path, record: Mapping[str, Any]) -> str:
    """Store an environment beside the results, unless it is there; returns its digest."""
    name = digest(record)
    if name not in read_environments(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / f".{FILE}.lock"):
            write_json(folder / FILE, {**read_environments(folder), name: dict(record)})
    return name


def is_clean(record: Mapping[str, Any]) -> bool:
    """Whether the source was a commit, with nothing changed."""
    return "+" not in record["commit"] and record["commit"] != "unknown"


def describe(record: Mapping[str, Any], date: str) -> str:
    """An environment in one line, for under a table; what wasn't recorded is left out."""
    versions = [f"{name} {version}" for name, version in record["versions"].items() if version]
    machine = [record["cpu"]]
    machine += [f"{record['threads']} threads"] if record["threads"] else []
    machine += [f"{record['memory_gb']} GB"] if record["memory_gb"] else []
    software = [f"Python {record['python']}", *versions] if record["python"] else versions
    parts = [date, ", ".join(machine), ", ".join(software), f"commit {record['commit']}", record.get("note", "")]
    return "; ".join(filter(None, parts))


def cpu_model() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def commit() -> str:
    """The commit that was checked out when this was first called; with `+` and a digest of what was changed in its source."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD").strip()
        changed = _git("diff", "HEAD", "--", ".", *_NO_SOURCE)
        new = _git("ls-files", "--others", "--exclude-standard", "--", "*.py", "*.cpp", "*.h", "*.json", *_NO_SOURCE)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    for path in new.splitlines():
        changed += path + "\n" + (ROOT / path).read_text(encoding="utf-8", errors="replace")
    return f"{name}+{hashlib.sha256(changed.encode()).hexdigest()[:8]}" if changed else name


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _version(package: str) -> Optional[str]:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
