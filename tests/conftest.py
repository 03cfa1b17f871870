# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Set-up for all tests: no network, few threads, the same random numbers at every run."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


# Before any Hugging Face library is imported: no test may reach for a hub.
for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A hub cache of the tests' own, which nothing is in but what the fixture `hub` puts there.
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="peft-ext-hub-")
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


@pytest.fixture(autouse=True)
def _log_levels():
    """A command that makes other libraries quiet, as `ood run` does, doesn't for the tests after it."""
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "datasets", "peft_ext")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)


@pytest.fixture(scope="module", autouse=True)
def _long_lived():
    """What is imported by now stays: a trainer's every `gc.collect()` walked a million objects of it, half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _hub_cache():
    yield
    shutil.rmtree(os.environ["HF_HUB_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def hub():
    """Tiny models under the ids of real ones (`tests.tiny.hub.MODELS`), for all processes."""
    from tests.tiny.hub import fill_cache

    fill_cache(Path(os.environ["HF_HUB_CACHE"]))


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
def launch():
    """Runs a launcher, `python -m module arguments...`, from the project's root; returns its output.

    Seconds for each process that it starts: two tests do, others take `run_module`.
    """

    def run(module: str, *args: object) -> str:
        command = [sys.executable, "-m", module, *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment(), timeout=300)
        assert done.returncode == 0, f"{module} ended with {done.returncode}:\n{done.stderr[-6000:]}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def fresh_process(tmp_path_factory):
    """Runs Python code in processes that have not imported peft_ext (see `fork_server.py`); returns their output.

    The code sees further arguments as `sys.argv[1:]`, each process its own of the `environments`. A failure shows the
    processes' own tracebacks.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this platform has no fork")
    folder = tmp_path_factory.mktemp("fresh_process")
    command = [sys.executable, "-m", "tests.fork_server"]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_environment()
    )

    def run(code: str, *args: object, environments: Sequence[dict[str, str]] = ({},)) -> str:
        outs = [folder / f"output-{number}" for number in range(len(environments))]
        processes = [{"out": str(out), "environment": own} for out, own in zip(outs, environments)]
        server.stdin.write(json.dumps({"code": code, "argv": list(map(str, args)), "processes": processes}) + "\n")
        server.stdin.flush()
        status = json.loads(server.stdout.readline())
        errors = "\n".join(out.with_suffix(".err").read_text()[-6000:] for out in outs) if status else ""
        assert status == 0, f"the process ended with {status}:\n{errors}"
        return "".join(out.read_text() for out in outs)

    yield run
    server.stdin.close()
    server.wait(timeout=60)


@pytest.fixture(scope="session")
def run_module(fresh_process):
    """Runs `python -m module arguments...` in a process of its own, or in several at once, from the project's root; returns
    its output. With `ranks`, they know of each other by the variables that torchrun sets."""
    code = "import runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"

    def run(module: str, *args: object, processes: int = 1, ranks: bool = False) -> str:
        environments = _ranks(processes) if ranks else [{}] * processes
        return fresh_process(code, module, *args, environments=environments)

    return run


def _ranks(processes: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
