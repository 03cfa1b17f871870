# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Works off a study's cells, which several processes may share, whatever comes of each."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

from accelerate.utils import broadcast_object_list

from peft_ext.ood.study.cell import measure_cell, processes
from peft_ext.ood.study.grid import Cell, StudyConfig
from peft_ext.ood.study.manifest import DONE, FAILED, FINISHED, SKIPPED, Claim, Manifest
from peft_ext.ood.study.methods import NotPossibleError
from peft_ext.ood.study.results import write_result


def run(
    config: StudyConfig, *, retry: bool = False, wait: float = 10.0, log: Optional[Callable[[str], None]] = None
) -> dict[str, int]:
    """Work off all cells that are neither finished nor in another process's hands.

    Processes that a launcher started together (`accelerate launch`, torchrun) train each cell together, on batches of their
    number times `batch_size`; the first of them writes.

    Args:
        config: The study.
        retry: Run cells that failed, or were skipped, once more.
        wait: Seconds between looks at cells that others are working on, where some wait for their learning rate.
        log: Takes a line of progress; None: stderr.

    Returns:
        How many cells this call saw to each end: `{"done": ..., "failed": ..., "skipped": ...}`.

    Raises:
        FileNotFoundError: If the study's `data_dir` is no folder: without this, its sets would be looked for on the hub.
    """
    if config.data_dir and not Path(config.data_dir).is_dir():
        raise FileNotFoundError(
            f"data_dir={config.data_dir!r} is no folder; leave it out to read the sets from the hub."
        )
    log = log or _log
    state = processes()
    manifest = Manifest(config.output_dir)
    cells = {cell.id: cell for cell in config.cells()}
    again = manifest.jobs(FAILED, SKIPPED) if retry else set()
    counts = dict.fromkeys(FINISHED, 0)
    while True:
        claim = _claim(config, manifest, cells, again) if state.is_main_process else None
        job, waiting = _shared(claim.job if claim else None, _waits(config, manifest, cells) if not claim else False)
        if job is None:
            if not waiting:
                return counts
            time.sleep(wait)
            continue
        again.discard(job)
        status, more = _attempt(config, cells[job], state.is_main_process)
        log(f"{job}: {status}" + (f" ({more['reason']})" if "reason" in more else f" in {more['seconds']:.0f} s"))
        counts[status] += 1
        if claim:
            claim.finish(status, **more)
        gc.collect()


def _claim(config: StudyConfig, manifest: Manifest, cells: Mapping[str, Cell], again: set[str]) -> Optional[Claim]:
    finished, ready = manifest.jobs(*FINISHED) - again, []
    for job, cell in cells.items():
        search = config.searching_cell(cell)
        if search is None or search.id in finished:
            ready.append(job)
    fresh = manifest.claim(job for job in ready if job not in again)
    return fresh or manifest.claim((job for job in ready if job in again), again=(FAILED, SKIPPED))


def _waits(config: StudyConfig, manifest: Manifest, cells: Mapping[str, Cell]) -> bool:
    """Whether a cell waits for another, which a process works on, to choose its learning rate."""
    finished = manifest.jobs(*FINISHED)
    return any(config.searching_cell(cell) is not None for job, cell in cells.items() if job not in finished)


def _shared(job: Optional[str], waiting: bool) -> tuple[Optional[str], bool]:
    """The main process's decision, in all processes of a launcher."""
    values: list[Any] = [job, waiting]
    if processes().num_processes > 1:
        broadcast_object_list(values)
    return values[0], values[1]


def _attempt(config: StudyConfig, cell: Cell, writes: bool) -> tuple[str, dict[str, Any]]:
    """Run a cell, whatever comes of it."""
    start = time.time()
    try:
        result, tensors = measure_cell(config, cell)
        if writes:
            write_result(config, cell, result, tensors)
    except NotPossibleError as error:
        return SKIPPED, {"reason": str(error)}
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr)
        return FAILED, {"reason": f"{type(error).__name__}: {error}"}
    return DONE, {"seconds": round(time.time() - start, 1)}


def _log(message: str) -> None:
    if processes().is_main_process:
        print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)
