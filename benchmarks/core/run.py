# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A run: an experiment's settings, and the rows that were measured under them, on disk after each."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from benchmarks.core import environment
from benchmarks.core.environment import ROOT
from benchmarks.core.experiments import FULL, SMOKE
from peft_ext.files import write_json, written_whole
from peft_ext.runs import differences, plain


RESULTS = ROOT / "benchmarks" / "results"
DATA_VARIABLE = "PEFT_EXT_DATA"


class NotHere(Exception):
    """What a measurement needs isn't on this machine; the message says what, and how to get it."""


class Run:
    """The rows of one experiment, written after each, so that a kill costs at most the row in work.

    Settings are attributes: `run.steps`. A row that is stored isn't measured again (but see [`forget_others`], which the
    runner calls at the smaller sizes).

    Args:
        task: Its name.
        experiment: Its name.
        settings: See `experiments.settings`.
        size: Of `experiments.SIZES`.
        folder: Where results lie: `<folder>/<task>/<experiment>.json`, and `<folder>/environments.json` for all.

    Raises:
        ValueError: If the file holds rows under other settings.
    """

    def __init__(
        self, task: str, experiment: str, settings: Mapping[str, Any], size: str = FULL, folder: Path = RESULTS
    ) -> None:
        self.task, self.experiment, self.size, self.folder = task, experiment, size, Path(folder)
        self.settings: dict[str, Any] = plain(settings)
        for name in self.settings:
            if hasattr(type(self), name) or name in vars(self) or name == "rows":
                raise ValueError(f"{task}/{experiment}: no setting can be called {name!r}; runs have that already.")
        self.path = self.folder / task / f"{experiment}.json"
        self.environments = environment.read_environments(self.folder)
        self.rows: list[dict[str, Any]] = []
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            rows, settings = stored["rows"], stored["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error!r}); remove it to measure again.") from error
        other = differences(settings, self.settings)
        if other and self.size == FULL:
            first = other[0]
            raise ValueError(
                f"{self.path} was measured under other settings ({first}); give the experiment another name, or remove "
                "the file to measure again."
            )
        self.rows = [] if other else rows

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings", {})
        if name in settings:
            return settings[name]
        raise AttributeError(
            f"experiment {self.__dict__.get('task')}/{self.__dict__.get('experiment')} has no setting {name!r}"
        )

    @property
    def smoke(self) -> bool:
        """Whether this only checks that the task runs, on tiny random models."""
        return self.size == SMOKE

    def find(self, key: Mapping[str, Any]) -> Optional[Any]:
        """The result that is stored under this key, or None."""
        row = self.row(key)
        return None if row is None else row["result"]

    def row(self, key: Mapping[str, Any]) -> Optional[dict[str, Any]]:
        """The row that is stored under this key, with its date and environment, or None."""
        wanted = plain(key)
        return next((row for row in self.rows if row["key"] == wanted), None)

    def forget_others(self) -> None:
        """Forget rows of another machine, other versions or another source, so that they are measured again."""
        here = environment.digest(environment.environment())
        kept = [row for row in self.rows if row["environment"] == here]
        if not kept:
            shutil.rmtree(self.path.with_suffix(".work"), ignore_errors=True)
        self.rows = kept

    def add(self, key: Mapping[str, Any], result: Any) -> Any:
        """Store a result, in place of an older one under the same key, and write the file; returns it."""
        row = {
            "key": plain(key),
            "result": plain(result),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "environment": environment.remember(self.folder, environment.environment()),
        }
        self.environments = environment.read_environments(self.folder)
        self.rows = [other for other in self.rows if other["key"] != row["key"]] + [row]
        self.write()
        return row["result"]

    def forget_dirty(self) -> None:
        """Forget rows of sources that are in no commit, so that they are measured again."""
        dirty = self.dirty
        self.rows = [row for row in self.rows if row not in dirty]

    def write(self) -> None:
        """Write the file, a row in a line."""
        head = {"task": self.task, "experiment": self.experiment, "size": self.size, "settings": self.settings}
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as partial:
            partial.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{rows}\n]}}\n', encoding="utf-8")

    @property
    def work(self) -> Path:
        """A folder for what rows hand to later rows; made anew under other settings: what was made under the earlier ones, which
        may be hours of work, is set aside at full size."""
        folder = self.path.with_suffix(".work")
        record = folder / "settings.json"
        if record.is_file() and (other := differences(json.loads(record.read_text(encoding="utf-8")), self.settings)):
            if self.size == FULL:
                aside = next(
                    path
                    for number in itertools.count(1)
                    if not (path := folder.with_name(f"{folder.stem}.earlier-{number}.work")).exists()
                )
                folder.rename(aside)
                log(f"{folder} was made under other settings ({other[0]}); it is {aside.name} now.")
            else:
                shutil.rmtree(folder)
        if not record.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(record, self.settings)
        return folder

    @property
    def dirty(self) -> list[dict[str, Any]]:
        """The rows whose source was no commit."""
        return [row for row in self.rows if not environment.is_clean(self.environments[row["environment"]])]

    @property
    def described(self) -> str:
        """The newest row's date, machine, versions and commit in one line; empty without rows."""
        if not self.rows:
            return ""
        row = self.rows[-1]
        return environment.describe(self.environments[row["environment"]], row["date"])


def data_folder(name: str) -> Path:
    """The folder of a data set: in the folder that `PEFT_EXT_DATA` names, or in shared/data beside the repository.

    Raises:
        NotHere: If it isn't there.
    """
    named = os.environ.get(DATA_VARIABLE)
    for folder in (Path(named),) if named else (ROOT.parent / "shared" / "data",):
        if (folder / name).is_dir():
            return folder / name
    where = f"{DATA_VARIABLE}={named!r} has no folder {name!r}" if named else f"no data set {name!r}"
    raise NotHere(f"{where}; set {DATA_VARIABLE} to a folder that holds it.")


def log(message: str) -> None:
    """A line of progress on stderr, so that stdout holds the tables alone."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)
