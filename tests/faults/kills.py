# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Long pieces of work, killed and started again: is the old or the new version there, and does the end stay the same?

    python -m tests.faults.kills --each 20 --table benchmarks/reliability.md
    python -m tests.faults.kills --operation "tune (peqa)" --seed 7     # one case again, with what it said

Each piece of work runs in a fork of a process that has all imports. It is killed before a file event beneath its folder (a
file opened for writing, renamed, removed; a folder made) or at a moment between its first event and its last; a seed makes
the case again. Then it is started again, and what it leaves is compared with what an unbroken run leaves.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Optional

import numpy as np

from peft_ext.files import digests
from peft_ext.runs import differences


SECONDS = 300  # after which a piece of work hangs: it then says where, and ends
HUNG = "Timeout ("  # what faulthandler says then
EVENT, MOMENT = "file event", "moment"
PASSED = "goes on"
_MARKS = ("<!-- kills -->", "<!-- /kills -->")
# In the names of what differs between any two runs; `train_loss` is Trainer's mean since it was started.
_TIMES = ("second", "time", "runtime", "process", "flos", "train_loss")


class Operation(NamedTuple):
    """A piece of work.

    Attributes:
        work: Does it in a folder, or goes on with it.
        before: Leaves an older version there, which the work replaces.
        use: Loads what is there, and gives what a use of it gives, as numbers; None: there is nothing to load on the way.
        skip: Names of files, or their endings, that differ between any two runs.
        tolerance: How far numbers of a use may be apart, as a share, where going on is promised up to rounding.
    """

    work: Callable[[Path], Any]
    before: Optional[Callable[[Path], Any]] = None
    use: Optional[Callable[[Path], np.ndarray]] = None
    skip: tuple[str, ...] = ()
    tolerance: float = 0.0


class Case(NamedTuple):
    """What became of a kill.

    Attributes:
        operation: Which piece of work.
        seed: Makes it again.
        kind: `EVENT` or `MOMENT`.
        at: The event's number and what it was, or the seconds.
        outcome: `PASSED`, or what went wrong.
    """

    operation: str
    seed: int
    kind: str
    at: str
    outcome: str


class Harness:
    """Runs operations in a folder, always the same one, since paths become part of what they write.

    Args:
        room: A folder for all.
        operations: By their names.
    """

    def __init__(self, room: Path, operations: dict[str, Operation]) -> None:
        self.folder, self.log, self.said = room / "work", room / "log", room / "said"
        self.operations = operations
        self._before = room / "before"
        self._before.mkdir(parents=True)
        self._whole: dict[str, dict[str, Any]] = {}

    def cases(self, name: str, kind: str, seeds: Iterable[int]) -> Iterator[Case]:
        """Kill an operation, once for each seed."""
        for seed in seeds:
            yield self.case(name, kind, seed)

    def case(self, name: str, kind: str, seed: int) -> Case:
        """Kill an operation once, look at what is there, and start it again."""
        operation, whole, random = self.operations[name], self.whole(name), Random(f"{name}/{kind}/{seed}")
        events, seconds = whole["events"], whole["seconds"]
        event = random.randint(1, len(events)) if kind == EVENT else None
        moment = None if kind == EVENT else random.uniform(0, seconds)
        at = f"{event} of {len(events)}: {events[event - 1]}" if event else f"{moment:.3f} of {seconds:.3f} s"
        self._start_over(name)
        status = self._run(operation.work, event, moment)
        if status not in (-signal.SIGKILL, -signal.SIGALRM, 0):
            return Case(name, seed, kind, at, f"it failed by itself: {self.last_words()}")
        return Case(name, seed, kind, at, self._outcome(name))

    def whole(self, name: str) -> dict[str, Any]:
        """What an unbroken run does and leaves: its events, how long they take, its files, what a use of it gives."""
        if name in self._whole:
            return self._whole[name]
        operation, found = self.operations[name], {}
        before = self._before / name
        if operation.before is not None:
            self._must(lambda folder: operation.before(before), name)  # type: ignore[misc]
            found["old"] = self._used(operation, before)
        self._start_over(name)
        self._must(operation.work, name, tells=True)
        found |= json.loads(self.said.read_text())
        found["files"] = _contents(self.folder, operation.skip)
        if operation.use is not None:
            found["new"] = self._used(operation, self.folder)
        self._whole[name] = found
        return found

    def last_words(self) -> str:
        """The last line that a process said; of one that hung, where, innermost first."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        hung = next((at for at, line in enumerate(lines) if line.startswith(HUNG)), None)
        if hung is not None:
            return " / ".join(line.strip() for line in lines[hung:])[:2000]
        return lines[-1][:300] if lines else "nothing was said"

    def _outcome(self, name: str) -> str:
        operation, whole = self.operations[name], self._whole[name]
        if operation.use is not None and operation.before is not None:
            try:
                there = self._used(operation, self.folder)
            except RuntimeError as error:
                return f"neither version can be read: {error}"
            if not any(np.array_equal(there, whole[version]) for version in ("old", "new")):
                return "it is neither version"
        if self._run(operation.work) != 0:
            return f"started again, it fails: {self.last_words()}"
        left = [str(path.relative_to(self.folder)) for path in self.folder.rglob(".*-partial-*")]
        if left:
            return f"left behind: {left[0]}"
        if operation.use is not None:
            new = whole["new"]
            away = np.abs(self._used(operation, self.folder) - new).max(initial=0) / max(
                1.0, np.abs(new).max(initial=0)
            )
            if away > operation.tolerance:
                return f"another end: numbers differ by a share of {away:.2g}"
        if operation.before is not None:
            return PASSED
        changes = differences(whole["files"], _contents(self.folder, operation.skip))
        return f"another end: {'; '.join(map(str, changes))[:300]}" if changes else PASSED

    def _start_over(self, name: str) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if (self._before / name).exists():
            shutil.copytree(self._before / name, self.folder, symlinks=True)

    def _used(self, operation: Operation, folder: Path) -> np.ndarray:
        """What a use of a folder gives, in a process of its own.

        Raises:
            RuntimeError: If it can't be loaded.
        """
        answer = self.said.with_suffix(".npy")
        use = operation.use
        assert use is not None
        if self._run(lambda _: np.save(answer, np.asarray(use(folder), dtype=float))) != 0:
            raise RuntimeError(self.last_words())
        return np.load(answer)

    def _must(self, work: Callable[[Path], Any], name: str, tells: bool = False) -> None:
        for last in (False, True):
            status = self._run(work, tells=tells)
            if status == 0:
                return
            said = self.log.read_text(errors="replace")
            said = said if len(said) <= 8000 else f"{said[:4000]}\n...\n{said[-4000:]}"
            if last or HUNG not in said:
                raise RuntimeError(f"{name} fails without a kill (status {status}):\n{said}")
            # A fork inherits the locks that threads of libraries held; what the work does is judged by the next one.
            print(f"{name} hung without a kill; tried once more. Where it was:\n{said}", file=sys.stderr, flush=True)
            self._start_over(name)

    def _run(
        self,
        work: Callable[[Path], Any],
        event: Optional[int] = None,
        moment: Optional[float] = None,
        tells: bool = False,
    ) -> int:
        """Run in a fork; its status, negative for a signal."""
        process = os.fork()
        if process == 0:
            self._in_child(work, event, moment, tells)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def _in_child(
        self, work: Callable[[Path], Any], event: Optional[int], moment: Optional[float], tells: bool
    ) -> None:
        status = 1
        try:
            output = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            faulthandler.enable(2)
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=2)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            watch = _Watch(self.folder, event, moment) if event or moment is not None or tells else None
            work(self.folder)
            if tells and watch is not None:
                watch.on = False
                self.said.write_text(json.dumps({"events": watch.events, "seconds": watch.last - watch.first}))
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)


class _Watch:
    """Counts what happens to files beneath a folder, and kills the process at an event, or some time after the first."""

    def __init__(self, folder: Path, event: Optional[int], moment: Optional[float]) -> None:
        self._folder, self._event, self._moment = str(folder), event, moment
        self.events: list[str] = []
        self.first = self.last = 0.0
        self.on = True
        sys.addaudithook(self._saw)

    def _saw(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        path = _changed(event, args)
        if path is None or not path.startswith(self._folder):
            return
        self.last = time.perf_counter()
        if not self.events:
            self.first = self.last
            if self._moment is not None:
                signal.setitimer(signal.ITIMER_REAL, max(self._moment, 1e-6))
        self.events.append(f"{event} {Path(path).name}")
        if len(self.events) == self._event:
            os.kill(os.getpid(), signal.SIGKILL)


def _changed(event: str, args: tuple[Any, ...]) -> Optional[str]:
    """The path that an audit event is about to change."""
    if event == "open":
        writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        return _text(args[0]) if writes else None
    if event in ("os.rename", "os.link"):
        return _text(args[1])
    return _text(args[0]) if event in ("os.remove", "os.mkdir", "os.rmdir", "os.truncate") else None


def _text(path: Any) -> Optional[str]:
    return os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else None


def _contents(folder: Path, skip: tuple[str, ...]) -> dict[str, Any]:
    """What the files of a folder hold, but for times; JSON as its values."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.endswith((*skip, ".png", "README.md", "lock")):
            continue
        found[name] = (
            _without_times(json.loads(path.read_text())) if path.suffix == ".json" else digests(folder, [name])
        )
    return json.loads(json.dumps(found))


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if not any(part in key for part in _TIMES)}
        return {key: _without_times(each) for key, each in kept.items() if key not in ("inputs", "outputs")}
    return {str(place): _without_times(each) for place, each in enumerate(value)} if isinstance(value, list) else value


def table(cases: Iterable[Case]) -> str:
    """Counts by operation, as Markdown."""
    counts: dict[str, collections.Counter[Any]] = collections.defaultdict(collections.Counter)
    for case in cases:
        counts[case.operation][case.kind] += 1
        counts[case.operation][PASSED] += case.outcome == PASSED
    lines = ["| work | killed at file events | at moments | goes on to the same end |", "|---|---|---|---|"]
    for name, count in counts.items():
        lines.append(
            f"| {name} | {count[EVENT]} | {count[MOMENT]} | {count[PASSED]} of {count[EVENT] + count[MOMENT]} |"
        )
    total = sum(counts.values(), collections.Counter())
    lines.append(f"| all | {total[EVENT]} | {total[MOMENT]} | {total[PASSED]} of {total[EVENT] + total[MOMENT]} |")
    return "\n".join(lines)


def put_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks of a page, or add both at its end."""
    content = page.read_text(encoding="utf-8") if page.is_file() else "# Reliability\n"
    if marks[0] not in content:
        content = f"{content.rstrip()}\n\n## Kills\n\n{marks[0]}\n{marks[1]}\n"
    before, _, rest = content.partition(marks[0])
    page.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.partition(marks[1])[2]}", encoding="utf-8")


def main(argv: Optional[list[str]] = None) -> int:
    """Kill operations, print what became of them; 1 if any didn't go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20, help="kills of each kind of each operation")
    parser.add_argument("--operation", nargs="+", help="only these")
    parser.add_argument("--kind", choices=(EVENT, MOMENT), help="with --seed: of the one case")
    parser.add_argument("--seed", type=int, help="one case of each operation and kind, and what it said")
    parser.add_argument("--table", type=Path, help="a page, between whose marks the table is put")
    args = parser.parse_args(argv)
    from tests.faults.operations import operations

    with tempfile.TemporaryDirectory() as room:
        harness = Harness(Path(room), operations(Path(room)))
        cases = []
        for name in args.operation or harness.operations:
            for kind in (args.kind,) if args.kind else (EVENT, MOMENT):
                for case in harness.cases(name, kind, range(args.each) if args.seed is None else [args.seed]):
                    cases.append(case)
                    if case.outcome != PASSED:
                        print(f"{case.operation}, {case.kind} {case.seed} ({case.at}): {case.outcome}", flush=True)
                    if args.seed is not None:
                        print(case, harness.log.read_text(errors="replace"), sep="\n")
            print(f"{name}: done", file=sys.stderr, flush=True)
    shown = table(cases)
    print(shown)
    if args.table is not None:
        put_between(args.table, _MARKS, shown)
    return int(any(case.outcome != PASSED for case in cases))


if __name__ == "__main__":
    sys.exit(main())
