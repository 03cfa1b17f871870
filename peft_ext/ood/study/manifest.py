# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A list of jobs that several processes may work off, be killed and started again: one JSON line for every event.

A job that is being worked on is locked by a file that the system unlocks when the process ends, however it ends; so what a
kill interrupted is free again at once.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional, Union

from filelock import FileLock, Timeout


DONE, FAILED, SKIPPED = "done", "failed", "skipped"
FINISHED = (DONE, FAILED, SKIPPED)


class Manifest:
    """The events of all jobs, in `manifest.jsonl`.

    Args:
        folder: Where it and the locks lie; made if need be.
    """

    def __init__(self, folder: Union[str, os.PathLike]) -> None:
        self.path = Path(folder) / "manifest.jsonl"
        self._locks = Path(folder) / "locks"
        self._locks.mkdir(parents=True, exist_ok=True)
        self._writing = FileLock(self._locks / "manifest.lock")

    def last(self) -> dict[str, dict[str, Any]]:
        """The last event of every job. A line that a kill cut off doesn't count."""
        events: dict[str, dict[str, Any]] = {}
        if not self.path.is_file():
            return events
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
                events[event["job"]] = event
            except (ValueError, KeyError, TypeError):
                continue
        return events

    def status(self, job: str) -> Optional[str]:
        """`"done"`, `"failed"`, `"skipped"`, `"started"`, or None if nobody has begun it."""
        return self.last().get(job, {}).get("status")

    def claim(self, jobs: Iterable[str], again: Iterable[str] = ()) -> Optional[Claim]:
        """Take the first job that is neither finished nor being worked on.

        Args:
            jobs: In the order of preference.
            again: Of these statuses, finished jobs are taken once more.

        Returns:
            None if there is none at the moment.
        """
        finished = set(FINISHED) - set(again)
        events = self.last()
        for job in jobs:
            if events.get(job, {}).get("status") in finished:
                continue
            lock = FileLock(self._locks / f"{job}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            if self.status(job) in finished:  # by another process, in between
                lock.release()
                continue
            self.add(job, "started")
            return Claim(self, job, lock)
        return None

    def add(self, job: str, status: str, **more: Any) -> None:
        """Write an event."""
        event = {"job": job, "status": status, "time": round(time.time(), 1), "process": os.getpid(), **more}
        line = json.dumps(event, ensure_ascii=False) + "\n"
        with self._writing, open(self.path, "ab") as file:
            if file.tell() and not self._ends_with_a_line():
                line = "\n" + line  # a kill cut the last one off
            file.write(line.encode("utf-8"))

    def _ends_with_a_line(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


class Claim:
    """A job that this process works on, until `finish`."""

    def __init__(self, manifest: Manifest, job: str, lock: Any) -> None:
        self.job = job
        self._manifest, self._lock = manifest, lock

    def finish(self, status: str, **more: Any) -> None:
        """Write how it ended, and let go of it."""
        self._manifest.add(self.job, status, **more)
        self._lock.release()
