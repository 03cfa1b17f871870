# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Experiments: settings in a folder each, at full size, quick and smoke.

`experiments/<task>/defaults.json` has what the task's experiments share, `experiments/<task>/<experiment>/config.json` what is
this one's own. Both have the same shape: settings by name, and under `"quick"` and `"smoke"` what these sizes replace.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.core.environment import ROOT


EXPERIMENTS = ROOT / "benchmarks" / "experiments"
FULL, QUICK, SMOKE = "full", "quick", "smoke"
SIZES = (FULL, QUICK, SMOKE)


def names(task: str, folder: Path = EXPERIMENTS) -> list[str]:
    """A task's experiments."""
    return sorted(path.parent.name for path in (folder / task).glob("*/config.json"))


def chosen(task: str, patterns: Sequence[str], size: str = FULL, folder: Path = EXPERIMENTS) -> list[str]:
    """The experiments that match one of the patterns; without a pattern all that are of this size.

    An experiment with `"quick": null` (or `"smoke": null`) is left out of that size, unless it is asked for.

    Raises:
        ValueError: If nothing matches a pattern; names what there is.
    """
    known = names(task, folder)
    found: list[str] = []
    for pattern in patterns:
        matching = fnmatch.filter(known, pattern)
        if not matching:
            near = difflib.get_close_matches(pattern, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
            raise ValueError(f"{task} has no experiment {pattern!r}; {hint}")
        found += [name for name in matching if name not in found]
    return (
        found
        if patterns
        else [name for name in known if size == FULL or _config(task, name, folder)[size] is not None]
    )


def settings(task: str, experiment: str, size: str = FULL, folder: Path = EXPERIMENTS) -> dict[str, Any]:
    """All settings of an experiment at a size.

    Raises:
        ValueError: If a config is no JSON, or a size replaces a setting that there isn't.
    """
    config = _config(task, experiment, folder)
    replaced = {} if size == FULL else config[size] or {}
    found = {name: value for name, value in config.items() if name not in (QUICK, SMOKE, "about")}
    for name in replaced:
        if name not in found:
            raise ValueError(f"{folder / task / experiment}: {size!r} replaces {name!r}, which is no setting of it.")
    return {**found, **replaced}


def about(task: str, experiment: str, folder: Path = EXPERIMENTS) -> str:
    """What an experiment is, in a line."""
    return _config(task, experiment, folder).get("about", "")


def _config(task: str, experiment: str, folder: Path) -> dict[str, Any]:
    own = _read(folder / task / experiment / "config.json")
    path = folder / task / "defaults.json"
    shared = _read(path) if path.is_file() else {}
    merged = {**shared, **own}
    for size in (QUICK, SMOKE):
        of_size = own.get(size, {})
        merged[size] = None if of_size is None else {**(shared.get(size) or {}), **of_size}
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
