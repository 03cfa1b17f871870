# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Set-up for all tests: no network, few threads, the same random numbers at every run."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path


# Before any Hugging Face library is imported: no test may reach for a hub.
for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Products with packed weights to float precision; tests/quant/test_kernel.py looks at the fast mode.
os.environ.setdefault("PEFT_EXT_KERNEL", "exact")

import pytest  # noqa: E402
import torch  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """`slow` is what runs the real model for long or a whole benchmark; first, since a worker that gets one last keeps the
    other waiting, and since workers take tests from each other's end, which leaves their costly fixtures whole."""
    for item in items:
        if item.path.parent.name in ("real", "benchmarks"):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _long_lived():
    """What is imported by now stays: a trainer's every `gc.collect()` walked a million objects of it, half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models are slower on several threads, and workers of pytest-xdist share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run_module():
    """Runs `python -m module arguments...` in a process of its own, from the project's root; returns its output."""

    def run(module: str, *args: object) -> str:
        command = [sys.executable, "-m", module, *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment(), timeout=300)
        assert done.returncode == 0, f"{module} ended with {done.returncode}:\n{done.stderr[-6000:]}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def fresh_process(tmp_path_factory):
    """Runs Python code in a process that has not imported peft_ext (see `fork_server.py`); returns its output.

    The code sees further arguments as `sys.argv[1:]`. A failure shows the process's own traceback.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this platform has no fork")
    out = tmp_path_factory.mktemp("fresh_process") / "output"
    command = [sys.executable, "-m", "tests.fork_server"]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_environment()
    )

    def run(code: str, *args: object) -> str:
        server.stdin.write(json.dumps({"code": code, "argv": list(map(str, args)), "out": str(out)}) + "\n")
        server.stdin.flush()
        status = json.loads(server.stdout.readline())
        assert status == 0, f"the process ended with {status}:\n{out.with_suffix('.err').read_text()[-6000:]}"
        return out.read_text()

    yield run
    server.stdin.close()
    server.wait(timeout=60)
