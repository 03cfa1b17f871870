# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m benchmarks`: runs tasks, shows their tables, and holds their claims against the bounds."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

from benchmarks.core import environment, experiments
from benchmarks.core.claims import Claim, markdown_table
from benchmarks.core.experiments import FULL, QUICK, SMOKE
from benchmarks.core.run import RESULTS, NotHere, Run, log
from benchmarks.core.task import Task
from peft_ext.command_line import parse, show


ALL = "all"
PROGRAM = "python -m benchmarks"
# Where results of the smaller sizes lie; those of the full size are part of the repository.
_ELSEWHERE = environment.ROOT / "runs" / "benchmarks"
# A quick task that takes longer hangs.
_QUICK_SECONDS = 240


class Entry(NamedTuple):
    """A line of the table of tasks: what it is about, and the module that has its `TASK`, imported when it is asked for."""

    title: str
    module: str

    def load(self) -> Task:
        """The task."""
        return importlib.import_module(self.module).TASK


Tasks = Mapping[str, Entry]
_Names = list[str]  # `list` is a flag below


@dataclass
class Arguments:
    """Which benchmarks, at which size."""

    task: Optional[str] = field(default=None, metadata={"help": f"A task of --list, or {ALL!r}; the first word."})
    experiments: _Names = field(
        default_factory=list,
        metadata={"help": "Names of its experiments, or patterns such as 'smollm2*'; all by default."},
    )
    list: bool = field(default=False, metadata={"help": "List the tasks and their experiments."})
    quick: bool = field(default=False, metadata={"help": "Every claim at a small size: 10 minutes for all tasks."})
    smoke: bool = field(default=False, metadata={"help": "Next to nothing: checks that the tasks run."})
    table: bool = field(default=False, metadata={"help": "Measure nothing, show what is stored."})
    dirty_again: bool = field(
        default=False, metadata={"help": "Measure again what was measured on sources that are in no commit."}
    )
    seed: Optional[int] = field(
        default=None,
        metadata={"help": "Instead of the experiment's; results are stored beside those of its own seed."},
    )
    output_dir: Optional[Path] = field(
        default=None,
        metadata={"help": "Where results lie; by default benchmarks/results, at other sizes runs/benchmarks."},
    )

    @property
    def size(self) -> str:
        """Which of an experiment's sizes."""
        return SMOKE if self.smoke else QUICK if self.quick else FULL

    @property
    def folder(self) -> Path:
        """Where results lie."""
        return self.output_dir or (RESULTS if self.size == FULL else _ELSEWHERE / self.size)


def main(argv: Sequence[str], tasks: Tasks, configs: Path = experiments.EXPERIMENTS) -> int:
    """Run, or show, or list; returns the exit code: 1 if a task failed.

    Args:
        argv: The arguments.
        tasks: The table of tasks.
        configs: The folder of experiments.

    Raises:
        ValueError: For a task or an experiment that there isn't.
    """
    (arguments,) = parse(_positional(argv), Arguments)
    if arguments.list or arguments.task is None:
        show(*_listed(tasks, configs))
        return 0
    if arguments.quick and arguments.smoke:
        raise ValueError("--quick and --smoke are two sizes; pass one.")
    names = list(tasks) if arguments.task == ALL else [arguments.task]
    for name in names:
        if name not in tasks:
            near = difflib.get_close_matches(name, tasks, 1)
            hint = f"did you mean {near[0]!r}?" if near else "--list shows what there is."
            raise ValueError(f"there is no benchmark {name!r}; {hint}")
    if not arguments.table and arguments.folder == RESULTS and "+" in environment.commit():
        raise ValueError(
            "results of the repository come from commits alone, and files differ from the last one; commit them, or pass "
            "--output_dir."
        )
    if arguments.task == ALL:
        return _run_all(arguments, tasks, configs)
    task = tasks[names[0]].load()
    runs = open_runs(names[0], arguments.experiments, arguments.size, arguments.folder, arguments.seed, configs)
    if not runs:
        raise ValueError(
            f"{names[0]} has no experiment of {arguments.size} size; leave the flag out for the full one."
        )
    try:
        if not arguments.table:
            measure(task, runs, arguments.dirty_again)
    except NotHere as error:
        raise ValueError(str(error)) from error
    tables, claims = task.tables(runs), task.claims(runs)
    text = "\n\n".join(f"### {title}\n\n{table}" for title, table in tables.items())
    lines = "\n".join(claim.line for claim in claims)
    described = "\n".join(dict.fromkeys(run.described for run in runs if run.rows))
    show(
        {"claims": [claim._asdict() for claim in claims], "results": [str(run.path) for run in runs]},
        "\n\n".join(filter(None, [text, lines, described])),
    )
    return 0


def _positional(argv: Sequence[str]) -> list[str]:
    """`task experiment ... --flag` as flags."""
    words = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
    task, found, rest = argv[: min(words, 1)], argv[1:words], argv[words:]
    return [*(["--task", *task] if task else []), *(["--experiments", *found] if found else []), *rest]


def open_runs(
    name: str,
    patterns: Sequence[str] = (),
    size: str = FULL,
    folder: Path = RESULTS,
    seed: Optional[int] = None,
    configs: Path = experiments.EXPERIMENTS,
) -> list[Run]:
    """The runs of a task's experiments with what is stored of them."""
    runs = []
    for experiment in experiments.chosen(name, patterns, size, configs):
        settings = experiments.settings(name, experiment, size, configs)
        if seed is not None and settings.get("seed") != seed:
            settings["seed"], experiment = seed, f"{experiment}_seed{seed}"
        runs.append(Run(name, experiment, settings, size, folder))
    return runs


def measure(task: Task, runs: Sequence[Run], dirty_again: bool = False) -> None:
    """Measure what runs lack (and what comes from sources in no commit), and draw the task's pictures."""
    environment.commit()  # of the source as it is loaded now, not as it is hours later
    for run in runs:
        if run.size != FULL:
            run.forget_others()
        if dirty_again:
            run.forget_dirty()
        with contextlib.redirect_stdout(sys.stderr):  # trainers print there, too
            task.measure(run)
    if task.draw is not None and any(run.rows for run in runs):
        folder = runs[0].path.parent
        folder.mkdir(parents=True, exist_ok=True)
        task.draw(runs, folder)


class Outcome(NamedTuple):
    """What became of a task among all: `trouble` is empty, or says why it wasn't measured; `failed` if that is a fault."""

    task: str
    seconds: float
    trouble: str
    failed: bool


def _run_all(arguments: Arguments, tasks: Tasks, configs: Path) -> int:
    """Every task in a process of its own, one after the other: what fails is told, and the rest goes on."""
    outcomes = []
    for number, name in enumerate(tasks, start=1):
        if not experiments.chosen(name, (), arguments.size, configs):
            continue
        if not arguments.table:
            log(f"{number} of {len(tasks)}: {name}")
            outcomes.append(_isolated(name, tasks[name], arguments, configs))
            log(f"{name}: {outcomes[-1].trouble or 'done'}, {outcomes[-1].seconds:.0f} s")
    rows, lines = [], []
    troubled = {one.task for one in outcomes if one.trouble}
    for name, entry in tasks.items():
        for claim, full in _claims_with_full(name, entry, arguments, configs):
            met = {True: "met", False: "**not met**", None: "-"}[claim.met]
            large = claim.value is None and full is not None and full.value is not None and name not in troubled
            figure = f"{FULL} size only" if large and arguments.size != FULL else claim.figure
            rows.append([name, claim.name, figure, claim.wanted, met, full.figure if full else None])
    lines.append(markdown_table(["Task", "Claim", f"{arguments.size} size", "Wanted", "", "full size"], rows))
    lines += [f"- {one.task}: {one.trouble}" for one in outcomes if one.trouble]
    text = "\n".join(lines)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "claims.md").write_text(text + "\n", encoding="utf-8")
    show({"claims": rows, "not measured": [one._asdict() for one in outcomes if one.trouble]}, text)
    return int(any(one.failed for one in outcomes))


def _claims_with_full(
    name: str, entry: Entry, arguments: Arguments, configs: Path
) -> list[tuple[Claim, Optional[Claim]]]:
    """A task's claims at the size that was asked for, each with that of the results in the repository; first those of this size,
    then what only the full size has."""
    try:
        task = entry.load()
        claims = task.claims(open_runs(name, (), arguments.size, arguments.folder, configs=configs))
        full = {claim.name: claim for claim in task.claims(open_runs(name, configs=configs))}
        known = {claim.name for claim in claims}
        claims += [c._replace(value=None) for c in full.values() if c.name not in known and c.value is not None]
    except Exception as error:
        log(f"{name}: its claims can't be told: {error!r}")
        return []
    return [(claim, full.get(claim.name)) for claim in claims]


def _isolated(name: str, entry: Entry, arguments: Arguments, configs: Path) -> Outcome:
    """Measure a task in a child of this process: forked where that is possible, so that nothing is imported again."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(sender, name, entry, arguments, configs))
    begin = time.monotonic()
    process.start()
    sender.close()
    try:
        process.join(_QUICK_SECONDS if arguments.size != FULL else None)
        hangs = process.is_alive()
    finally:
        _end(process)
    seconds = time.monotonic() - begin
    if hangs:
        return Outcome(name, seconds, f"ended after {_QUICK_SECONDS} s", True)
    try:
        trouble, failed = receiver.recv()
    except EOFError:
        trouble, failed = f"its process ended with {process.exitcode}", True
    return Outcome(name, seconds, trouble, failed)


def _in_child(sender: Any, name: str, entry: Entry, arguments: Arguments, configs: Path) -> None:
    os.setsid()  # so that its own workers end with it
    try:
        task = entry.load()
        runs = open_runs(name, (), arguments.size, arguments.folder, arguments.seed, configs)
        measure(task, runs, arguments.dirty_again)
        sender.send(("", False))
    except (NotHere, ImportError) as error:
        sender.send((f"not possible here: {error}", False))
    except Exception as error:
        traceback.print_exc()
        sender.send((f"failed: {(str(error) or repr(error)).splitlines()[0][:500]}", True))


def _end(process: Any) -> None:
    """End a child and its workers."""
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
    process.join()


def _listed(tasks: Tasks, configs: Path) -> tuple[dict[str, Any], str]:
    found = {name: experiments.names(name, configs) for name in tasks}
    lines = [f"{name}: {entry.title}" for name, entry in tasks.items()]
    shown = []
    for line, (name, names) in zip(lines, found.items()):
        shown.append(line)
        for experiment in names:
            about = experiments.about(name, experiment, configs)
            shown.append(f"    {experiment}{': ' * bool(about)}{about}")
    usage = f"usage: {PROGRAM} <task or {ALL!r}> [<experiment> ...] [--quick | --smoke] [--table] [--seed N] [--output_dir DIR]"
    return found, "\n".join([usage, "", *shown])
