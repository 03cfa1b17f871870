# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Work that is killed goes on and ends as it would have: one kill of each kind here, 20 by `make faults`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from peft_ext.files import written_whole
from tests.conftest import ROOT
from tests.faults import kills
from tests.faults.kills import EVENT, MOMENT, PASSED, Case, Harness, Operation, put_between, table


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("half", [0, 1])
def test_every_long_piece_of_work_goes_on(half):
    pytest.importorskip("sklearn", reason="the OOD study needs it")
    from tests.faults.operations import NAMES

    command = [sys.executable, "-m", "tests.faults.kills", "--each", "1", "--operation", *NAMES[half::2]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# ---- the harness itself


def _number(folder: Path) -> np.ndarray:
    texts = sorted(path.read_text() for path in (folder / "a").iterdir())
    if len(set(texts)) != 1:
        raise ValueError(f"a mixture: {texts}")
    return np.array([float(texts[0])])


def _whole(number: int):
    def work(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        with written_whole(folder / "a") as new:
            new.mkdir()
            for name in "xyz":
                (new / name).write_text(str(number))

    return work


def _in_place(number: int):
    def work(folder: Path) -> None:
        (folder / "a").mkdir(parents=True, exist_ok=True)
        for name in "xyz":
            (folder / "a" / name).write_text(str(number))

    return work


def _never_again(folder: Path) -> None:
    folder.mkdir()
    (folder / "b").write_text("1")


def _appends(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for _ in range(3):
        with open(folder / "b", "a") as file:
            file.write("1")


def test_the_harness_sees_what_is_wrong(tmp_path):
    operations = {
        "whole": Operation(_whole(2), _whole(1), _number),
        "in place": Operation(_in_place(2), _in_place(1), _number),
        "never again": Operation(_never_again),
        "appends": Operation(_appends),
    }
    harness = Harness(tmp_path, operations)
    outcomes = {name: {case.outcome for case in harness.cases(name, EVENT, range(6))} for name in operations}
    assert outcomes["whole"] == {PASSED}
    assert any("can be read: ValueError: a mixture" in outcome for outcome in outcomes["in place"])
    assert any(outcome.startswith("started again, it fails: FileExistsError") for outcome in outcomes["never again"])
    assert any(outcome.startswith("another end: b.b: was") for outcome in outcomes["appends"])
    assert {case.outcome for case in harness.cases("whole", MOMENT, range(3))} == {PASSED}


def _hangs(folder: Path) -> None:
    while True:
        time.sleep(0.01)


def _crashes(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(("work", "status"), [(_hangs, 1), (_crashes, -signal.SIGSEGV)])
def test_work_that_ends_by_itself_says_where(work, status, tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "SECONDS", 0.2)
    harness = Harness(tmp_path, {"work": Operation(work)})
    with pytest.raises(RuntimeError, match=rf"without a kill \(status {status}\)(?s:.*) in {work.__name__}\b"):
        harness.whole("work")
    assert harness.last_words().startswith("Timeout") == (work is _hangs)


def test_the_table_goes_between_its_marks(tmp_path):
    cases = [Case("a", 0, EVENT, "1", PASSED), Case("a", 0, MOMENT, "1", "lost"), Case("b", 0, EVENT, "1", PASSED)]
    assert "| a | 1 | 1 | 1 of 2 |" in table(cases) and "| all | 2 | 1 | 2 of 3 |" in table(cases)
    page = tmp_path / "page.md"
    page.write_text("# Page\n\nbefore\n\n<!-- m -->\nold\n<!-- /m -->\n\nafter\n")
    put_between(page, ("<!-- m -->", "<!-- /m -->"), "new")
    assert page.read_text() == "# Page\n\nbefore\n\n<!-- m -->\nnew\n<!-- /m -->\n\nafter\n"
