# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A list of jobs that several processes may work off, be killed and started again: one JSON line for every event.

A job that is being worked on is locked by a file that the system unlocks when the process ends, however it ends; so what a
kill interrupted is free again at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional, Union

from peft_ext.rows import append_rows, read_grown_rows
from peft_ext.runs import lock


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
        self._writing = lock(self._locks / "manifest.lock")

    def last(self) -> dict[str, dict[str, Any]]:
        """The last event of every job. A line that a kill cut off doesn't count."""
        return {event["job"]: event for event in read_grown_rows(self.path, skip_damaged=True) if "job" in event}

    def jobs(self, *statuses: str) -> set[str]:
        """The jobs whose last event has one of these statuses."""
        return {job for job, event in self.last().items() if event.get("status") in statuses}

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
        statuses = set(FINISHED) - set(again)
        finished = self.jobs(*statuses)
        for job in jobs:
            if job in finished:
                continue
            claimed = lock(self._locks / f"{job}.lock")
            try:
                claimed.acquire(timeout=0)
            except TimeoutError:
                continue
            if self.status(job) in statuses:  # by another process, in between
                claimed.release()
                continue
            self.add(job, "started")
            return Claim(self, job, claimed)
        return None

    def add(self, job: str, status: str, **more: Any) -> None:
        """Write an event."""
        event = {"job": job, "status": status, "time": round(time.time(), 1), "process": os.getpid(), **more}
        with self._writing:
            read_grown_rows(self.path, cut=True, skip_damaged=True)  # takes off what a kill left of a line
            append_rows(self.path, [event])


class Claim:
    """A job that this process works on, until `finish`."""

    def __init__(self, manifest: Manifest, job: str, lock: Any) -> None:
        self.job = job
        self._manifest, self._lock = manifest, lock

    def finish(self, status: str, **more: Any) -> None:
        """Write how it ended, and let go of it."""
        self._manifest.add(self.job, status, **more)
        self._lock.release()
