# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The job list: exclusive claims, killed workers, cut-off lines, two processes."""

from __future__ import annotations

import json
import subprocess
import sys

from peft_ext.ood.manifest import DONE, FAILED, Manifest
from tests.conftest import ROOT


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


def test_what_a_kill_interrupts_is_free_again(tmp_path):
    code = "import os, sys; from peft_ext.ood.manifest import Manifest; "
    code += "print(Manifest(sys.argv[1]).claim('ab').job, flush=True); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert killed.stdout.strip() == "a" and killed.returncode == -9
    manifest = Manifest(tmp_path)
    assert manifest.status("a") == "started"
    assert manifest.claim("ab").job == "a"


def test_a_line_that_was_cut_off(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.claim("a").finish(DONE)
    with open(manifest.path, "ab") as file:
        file.write(b'{"job": "b", "sta')
    assert set(manifest.last()) == {"a"}
    manifest.claim("b").finish(DONE)
    assert manifest.status("b") == DONE
    lines = manifest.path.read_text().splitlines()
    assert len(lines) == 5 and json.loads(lines[-1])["job"] == "b"


def test_two_processes_share_the_work(tmp_path):
    code = """
import sys, time
from peft_ext.ood.manifest import Manifest
manifest = Manifest(sys.argv[1])
while (claim := manifest.claim(map(str, range(30)))) is not None:
    time.sleep(0.005)
    claim.finish("done")
"""
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    events = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert sorted(event["job"] for event in events if event["status"] == "done") == sorted(map(str, range(30)))
    assert sum(event["status"] == "started" for event in events) == 30
