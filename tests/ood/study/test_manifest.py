# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The job list: exclusive claims, killed workers, cut-off lines, two processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest

from peft_ext.ood.study.manifest import DONE, FAILED, Manifest


FORKS = hasattr(os, "fork")
FORK = multiprocessing.get_context("fork") if FORKS else None
needs_fork = pytest.mark.skipif(not FORKS, reason="this platform has no fork")


def test_claims_are_exclusive_and_in_order(tmp_path):
    first, second = Manifest(tmp_path), Manifest(tmp_path)
    one, two = first.claim("abc"), second.claim("abc")
    assert (one.job, two.job) == ("a", "b")
    one.finish(DONE, seconds=1.0)
    two.finish(FAILED, reason="no memory")
    assert first.claim("ab") is None
    again = second.claim("ab", again=[FAILED])
    assert again.job == "b" and first.claim("ab", again=[FAILED]) is None
    again.finish(DONE)
    assert {job: event["status"] for job, event in first.last().items()} == {"a": DONE, "b": DONE}


def _claim_and_die(folder, queue) -> None:
    queue.put(Manifest(folder).claim("ab").job)
    queue.close()
    queue.join_thread()
    os.kill(os.getpid(), signal.SIGKILL)


@needs_fork
def test_what_a_kill_interrupts_is_free_again(tmp_path):
    queue = FORK.Queue()
    killed = FORK.Process(target=_claim_and_die, args=(tmp_path, queue))
    killed.start()
    killed.join(60)
    assert queue.get(timeout=10) == "a" and killed.exitcode == -signal.SIGKILL
    manifest = Manifest(tmp_path)
    assert manifest.status("a") == "started"
    assert manifest.claim("ab").job == "a"


def test_a_line_that_was_cut_off(tmp_path, caplog):
    manifest = Manifest(tmp_path)
    manifest.claim("a").finish(DONE)
    with open(manifest.path, "ab") as file:
        file.write(b'{"job": "b", "sta')
    assert set(manifest.last()) == {"a"}
    manifest.claim("b").finish(DONE)
    assert manifest.status("b") == DONE
    assert '{"job": "b", "sta' in caplog.text, "nobody was told what was dropped"
    events = [json.loads(line) for line in manifest.path.read_text().splitlines()]
    assert [event["job"] for event in events] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\r"])
def test_a_reason_may_hold_any_character(tmp_path, character):
    """JSON leaves ends of lines unescaped that aren't `\\n`."""
    manifest = Manifest(tmp_path)
    manifest.claim("a").finish(FAILED, reason=f"no{character}memory")
    assert manifest.last()["a"]["status"] == FAILED and manifest.last()["a"]["reason"] == f"no{character}memory"
    assert manifest.claim("a") is None, "a failed job was claimed again"


def _work(folder) -> None:
    manifest = Manifest(folder)
    while (claim := manifest.claim(map(str, range(30)))) is not None:
        time.sleep(0.005)
        claim.finish(DONE)


@needs_fork
def test_two_processes_share_the_work(tmp_path):
    workers = [FORK.Process(target=_work, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    events = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert sorted(event["job"] for event in events if event["status"] == DONE) == sorted(map(str, range(30)))
    assert sum(event["status"] == "started" for event in events) == 30
    assert len({event["process"] for event in events}) == 2
