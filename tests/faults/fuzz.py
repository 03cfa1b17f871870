# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Damages saved folders in thousands of ways, loads each, and counts what became of it: `make fuzz`.

    python -m tests.faults.fuzz --count 10000 --workers 2 --table benchmarks/reliability.md
    python -m tests.faults.fuzz --kind PALP --seed 17          # one case again, with its traceback

Every case is a fork of a process that has all models and imports; a kind and a seed make it again.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Optional

import numpy as np

from tests.faults.mutations import LINK, Damage, damage


ROOT = Path(__file__).resolve().parents[2]
SAME, NAMED, NAMELESS, SILENT = "same answer", "refused by name", "refused, nameless", "silent difference"
CRASH, HANG, GROWTH = "crash", "hang", "growth"
OUTSIDE, RAN, WROTE = "read outside", "code ran", "wrote outside"
# What no digest can know: a number that another tool wrote, a setting that a person may have edited, and transformers' own
# settings.
FOREIGN, EDITED = "others' numbers", "edited setting"
OUTCOMES = (SAME, NAMED, NAMELESS, SILENT, FOREIGN, EDITED, CRASH, HANG, GROWTH, OUTSIDE, RAN, WROTE)
NEVER = (SILENT, CRASH, HANG, GROWTH, OUTSIDE, RAN, WROTE)
NAMELESS_SHARE = 0.02

_SECONDS, _CPU_SECONDS, _MEGABYTES, _ROOM_BYTES = 60, 20, 200, 4 << 30
# No user should see these, whatever their message.
_RAW = (
    "KeyError IndexError AttributeError RecursionError JSONDecodeError SafetensorError UnicodeDecodeError AssertionError "
    "MemoryError ZeroDivisionError OverflowError NotImplementedError UnpicklingError"
).split()
_MARKS = ("<!-- fuzz -->", "<!-- /fuzz -->")


_LEGEND = f"""\
*{SAME}*: the damage doesn't matter (a removed default, bytes that nobody reads), or what was lost is made again.
*{NAMED}*: an error whose text names the file, the field, the tensor or its layer. *{SILENT}*: another answer
without a word, or NaN. *{FOREIGN}*: well-formed numbers in files that other tools wrote, which carry no digest.
*{EDITED}*: a valid value in place of another in a JSON file, which a person may have put there, or one of
transformers' own settings in `config.json`. *{HANG}*: {_SECONDS} seconds, or {_CPU_SECONDS} of computing;
*{GROWTH}*: {_MEGABYTES} MB more than the whole folder takes. Each case is loaded and used in a process of its own;
whether a pickle was run, a file outside was read through an index, or one was written outside is watched, too."""


class Case(NamedTuple):
    """A damaged folder and what became of it."""

    kind: str
    seed: int
    variant: int
    file: str
    what: str
    outcome: str
    error: str = ""
    where: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0

    def __str__(self) -> str:
        lines = [f"{self.outcome}: {self.kind}, seed {self.seed} (variant {self.variant}), {self.file}: {self.what}"]
        if self.error:
            lines.append(f"    {self.error[:400]}")
        if self.where:
            lines.append(f"    at {self.where}")
        return "\n".join(lines)


class Fuzzer:
    """Builds whole folders, and judges damaged copies of them.

    Args:
        room: An empty folder to work in.
        kinds: Those to work on; None: all.
    """

    def __init__(self, room: Path, kinds: Optional[Iterable[str]] = None) -> None:
        from tests.faults import saved

        self.room = room
        saved.set_room(room / "models")
        for name in ("models", "whole"):
            (room / name).mkdir()
        self.kinds = {kind: saved.KINDS[kind] for kind in kinds or saved.KINDS}
        self._answers: dict[tuple[str, int], np.ndarray] = {}
        self._peaks: dict[tuple[str, int], float] = {}
        for kind, variants in self.kinds.items():
            for number, variant in enumerate(variants):
                whole = self._whole(kind, number)
                with _quiet(room / "log"):
                    variant.build(whole)
                    # here, so that forks find everything imported
                    variant.use(self._copy(whole))
        gc.collect()
        gc.freeze()
        for kind, variants in self.kinds.items():
            for number, variant in enumerate(variants):
                found = _in_fork(lambda: _plain(variant.use(self._copy(self._whole(kind, number)))), room / "log")  # noqa: B023
                if "value" not in found.report:
                    raise RuntimeError(f"{kind}, variant {number} doesn't work undamaged: {found}")
                self._answers[kind, number] = np.asarray(found.report["value"], dtype=float)
                self._peaks[kind, number] = found.megabytes

    def run(self, kind: str, seed: int, loud: bool = False) -> Case:
        """One case."""
        random = Random(f"{kind}/{seed}")
        number = random.randrange(len(self.kinds[kind]))
        variant = self.kinds[kind][number]
        outside = self.room / "outside"
        shutil.rmtree(outside, ignore_errors=True)
        folder, marker = self._copy(self._whole(kind, number)), self.room / "ran"
        done = damage(folder, random, variant.skip, outside, str(marker))
        if done.outside:
            shutil.copytree(self._whole(kind, number), outside, dirs_exist_ok=True)
        before = _listing(self.room, done)
        expected = self._answers[kind, number]
        found = _in_fork(lambda: _judged(variant.use, folder, expected, done), self.room / "log", loud)
        outcome = found.ended or _weighed(found.report["outcome"], done, variant.foreign)
        growth = found.megabytes - self._peaks[kind, number]
        if growth > _MEGABYTES:
            outcome = GROWTH
        if marker.exists():
            marker.unlink()
            outcome = RAN
        elif _listing(self.room, done) != before:
            outcome = WROTE
        error, where = found.report.get("error", ""), found.report.get("where", "")
        return Case(kind, seed, number, done.file, done.what, outcome, error, where, found.seconds, growth)

    def _whole(self, kind: str, number: int) -> Path:
        return self.room / "whole" / f"{kind.replace(' ', '_')}-{number}"

    def _copy(self, whole: Path) -> Path:
        folder = self.room / "case"
        if folder.is_symlink() or folder.exists():
            shutil.rmtree(folder)
        if whole.exists():
            shutil.copytree(whole, folder)
        return folder


class _Found(NamedTuple):
    report: dict[str, Any]
    ended: str
    seconds: float
    megabytes: float


def _in_fork(work: Callable[[], dict[str, Any]], log: Path, loud: bool = False) -> _Found:
    """Run in a fork with limits; its report, or how it ended."""
    start = time.monotonic()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            _limit()
            with contextlib.nullcontext() if loud else _quiet(log):
                report = json.dumps(work()).encode()
            while report:
                report = report[os.write(writer, report) :]
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as pipe:
        content = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    seconds, ended = time.monotonic() - start, ""
    if os.WIFSIGNALED(status):
        signal_ = os.WTERMSIG(status)
        late = (signal.SIGALRM, signal.SIGXCPU)
        ended = HANG if signal_ in late or (signal_ == signal.SIGKILL and seconds >= _SECONDS) else CRASH
    elif os.WEXITSTATUS(status) or not content:
        ended = CRASH
    return _Found(json.loads(content or b"{}"), ended, seconds, usage.ru_maxrss / 1024)


def _limit() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_SECONDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS + 1))
    with open("/proc/self/statm", encoding="ascii") as file:
        room = int(file.read().split()[0]) * resource.getpagesize() + _ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))


@contextlib.contextmanager
def _quiet(log: Path) -> Any:
    """What libraries print goes to a file."""
    kept = os.dup(1), os.dup(2)
    sys.stdout.flush(), sys.stderr.flush()
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    try:
        os.dup2(file, 1), os.dup2(file, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        for each in (file, *kept):
            os.close(each)


def _plain(answer: np.ndarray) -> dict[str, Any]:
    return {"value": np.asarray(answer, dtype=float).tolist()}


def _judged(use: Callable[[Path], np.ndarray], folder: Path, expected: np.ndarray, done: Damage) -> dict[str, Any]:
    try:
        answer = np.asarray(use(folder), dtype=float)
    except (KeyboardInterrupt, SystemExit) as error:
        return {"outcome": NAMELESS, "error": repr(error)}
    except BaseException as error:
        text = str(error)
        named = type(error).__name__ not in _RAW and _names(text, done, folder)
        report = {
            "outcome": NAMED if named else NAMELESS,
            "error": f"{type(error).__name__}: {text}",
            "where": _where(error),
        }
        traceback.print_exc()
        return report
    if answer.shape == expected.shape and np.allclose(answer, expected, rtol=1e-4, atol=1e-5):
        return {"outcome": SAME}
    if answer.shape != expected.shape:
        return {"outcome": SILENT, "error": f"an answer of {answer.shape} for one of {expected.shape}"}
    return {"outcome": SILENT, "error": f"the answer is off by {np.abs(answer - expected).max():.3g}"}


def _names(text: str, done: Damage, folder: Path) -> bool:
    """Whether a message names a file in the folder, a field or a tensor, or the layer that the tensor is of."""
    if Path(done.file).name in text or re.search(
        re.escape(f"{folder}/") + r"\S*\.(safetensors|json|jsonl|npy)\b", text
    ):
        return True
    for name in done.fields:
        if len(name) > 1 and name in text:
            return True
        parts = name.split(".")
        for first in range(len(parts) - 2):
            if ".".join(parts[first:]) in text or (len(parts) - first > 2 and ".".join(parts[first:-1]) in text):
                return True
    return False


def _where(error: BaseException) -> str:
    """The innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if any(f"/{name}/" in frame.filename for name in ("peft_ext", "generation_ext", "trl_ext"))
    ]
    last = (own or frames)[-1]
    inner = frames[-1]
    place = f"{Path(last.filename).as_posix().split(f'{ROOT}/')[-1]}:{last.lineno}"
    return place if last is inner else f"{place} (from {'/'.join(Path(inner.filename).parts[-2:])}:{inner.lineno})"


# Of config.json, what is ours; the rest is transformers', where one valid value is as good as another.
_OWN_SETTINGS = ("quantization_config", "packed_bits", "granularity")


def _weighed(outcome: str, done: Damage, foreign: bool) -> str:
    """What a use saw, in view of what no reader can know."""
    path = Path(done.file)
    if outcome == SAME and done.outside:
        return OUTSIDE
    if outcome != SILENT:
        return outcome
    others_setting = path.name == "config.json" and done.path and not str(done.path[0]).startswith(_OWN_SETTINGS)
    if others_setting or (done.payload and path.suffix == ".json"):
        return EDITED
    return FOREIGN if foreign and done.payload and path.suffix == ".safetensors" else SILENT


def _listing(room: Path, done: Damage) -> list[tuple[str, int, int]]:
    """All files beside the case's own; what a link in it points to is its own."""
    found = []
    for path in sorted([*room.iterdir(), *([] if done.what == LINK else (room / "outside").rglob("*"))]):
        if path.is_file() and path.name != "log":
            stat = path.stat()
            found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return found


# ---- many cases


def fuzz(room: Path, count: int, first_seed: int = 0, kinds: Optional[Iterable[str]] = None) -> Iterator[Case]:
    """`count` cases of each kind, from `first_seed` on."""
    fuzzer = Fuzzer(room, kinds)
    for kind in fuzzer.kinds:
        for seed in range(first_seed, first_seed + count):
            yield fuzzer.run(kind, seed)


def table(cases: Iterable[Case]) -> str:
    """Counts of outcomes by kind, as Markdown."""
    cases = list(cases)
    shown = [
        outcome
        for outcome in OUTCOMES
        if outcome in (*NEVER[:4], SAME, NAMED, NAMELESS) or any(case.outcome == outcome for case in cases)
    ]
    rows = [["folder", *shown, "all"], ["---", *["---:"] * (len(shown) + 1)]]
    kinds = list(dict.fromkeys(case.kind for case in cases))
    for kind in [*kinds, None]:
        counts = Counter(case.outcome for case in cases if kind in (None, case.kind))
        rows.append([kind or "**all**", *(str(counts[outcome]) for outcome in shown), str(sum(counts.values()))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def failures(cases: Iterable[Case]) -> list[Case]:
    """What must not happen at all."""
    return [case for case in cases if case.outcome in NEVER]


def nameless(cases: Iterable[Case]) -> tuple[list[Case], int]:
    """Errors that name neither file nor field, and how many errors there are in all."""
    refused = [case for case in cases if case.outcome in (NAMED, NAMELESS)]
    return [case for case in refused if case.outcome == NAMELESS], len(refused)


def _in_workers(options: argparse.Namespace, room: Path) -> Iterable[Case]:
    each = -(-options.count // len(options.kinds or kinds()))
    shares = [(each * n // options.workers, each * (n + 1) // options.workers) for n in range(options.workers)]
    running = []
    for number, (first, last) in enumerate(shares):
        output = room / f"worker-{number}.jsonl"
        command = [
            sys.executable,
            "-m",
            "tests.faults.fuzz",
            "--per_kind",
            str(last - first),
            "--first_seed",
            str(first + options.first_seed),
        ]
        command += ["--cases", str(output), *(["--kinds", *options.kinds] if options.kinds else [])]
        running.append((subprocess.Popen(command, cwd=ROOT), output))
    for process, _ in running:
        if process.wait():
            raise SystemExit(f"a worker ended with {process.returncode}")
    return [case for _, output in running for case in read_cases(output)]


def _written(cases: Iterable[Case], path: Optional[Path]) -> Iterator[Case]:
    """Each as it comes, in a file too."""
    with open(path or os.devnull, "w", encoding="utf-8") as file:
        for case in cases:
            file.write(json.dumps(case._asdict()) + "\n")
            file.flush()
            yield case


def kinds() -> list[str]:
    """All kinds of folder."""
    from tests.faults.saved import KINDS

    return list(KINDS)


def read_cases(path: Path) -> list[Case]:
    """Cases that `--cases` has written."""
    return [Case(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _into_page(page: Path, text: str) -> None:
    """Between the marks of a page, which is made if need be."""
    begin, end = _MARKS
    old = page.read_text(encoding="utf-8") if page.is_file() else f"# Reliability\n\n{begin}\n{end}\n"
    if begin not in old:
        old += f"\n{begin}\n{end}\n"
    head, rest = old.split(begin, 1)
    page.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def _summary(cases: list[Case], seconds: float) -> str:
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    without_name, refused = nameless(cases)
    line = (
        f"{len(cases):,} damaged folders (commit {commit}, {seconds / 60:.0f} minutes): {len(failures(cases))} that must not be; "
        f"{len(without_name)} of {refused:,} errors ({len(without_name) / max(refused, 1):.1%}) name neither file nor field."
    )
    return f"{line}\n\n{table(cases)}\n\n{_LEGEND}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="cases of all kinds together")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", help="those to work on")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="a page, between whose marks the table is put")
    parser.add_argument("--cases", type=Path, help="a .jsonl file for all cases")
    parser.add_argument("--per_kind", type=int, help="run here, in one process, so many of each kind")
    parser.add_argument("--kind", help="with --seed: run one case, and show its traceback")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--show", nargs="+", default=[*NEVER, NAMELESS], help="outcomes to list")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="peft-ext-fuzz-") as folder:
        if options.seed is not None:
            print(Fuzzer(Path(folder), [options.kind]).run(options.kind, options.seed, loud=True))
            return 0
        if options.per_kind is None:
            found = _in_workers(options, Path(folder))
        else:
            found = fuzz(Path(folder), options.per_kind, options.first_seed, options.kinds)
        cases = list(_written(found, options.cases))
    if options.per_kind is not None:
        return 0
    for case in cases:
        if case.outcome in options.show:
            print(case)
    summary = _summary(cases, time.monotonic() - start)
    print(summary)
    if options.table:
        _into_page(options.table, summary)
    without_name, refused = nameless(cases)
    return int(bool(failures(cases)) or len(without_name) > NAMELESS_SHARE * refused)


if __name__ == "__main__":
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[variable] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PEFT_EXT_KERNEL", "exact")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
