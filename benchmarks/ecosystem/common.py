# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the scripts of this folder share: a packed base with an adapter, and tools that run on them in processes of their
own, offline."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.core import worker
from benchmarks.core.environment import ROOT
from peft_ext import PeqaConfig
from peft_ext.checkpoint.gguf import export_gguf
from peft_ext.models import load, load_tokenizer


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
RUN = ("-m", "peft_ext.cli", "run", "--")
BITS, GROUP = 4, 64
_DELTA = 0.03
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Folders(NamedTuple):
    """A packed base, an adapter of it, both merged, and both in one folder as transformers calls an embedded adapter."""

    base: Path
    adapter: Path
    merged: Path
    embedded: Path


def prepare(folder: Path, model: str) -> Folders:
    """Pack a model, and put an adapter of random scales onto it; what is there already stays."""
    made = Folders(*(folder / name for name in Folders._fields))
    if made.embedded.is_dir():
        return made
    tokenizer = load_tokenizer(model)
    config = PeqaConfig(bits=BITS, group_size=GROUP, task_type="CAUSAL_LM")
    get_peft_model(load(model, dtype=torch.float32), config).unload().save_pretrained(made.base)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(made.base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += _DELTA * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(made.adapter)
    tuned.merge_and_unload().save_pretrained(made.merged)
    for each in (made.base, made.merged):
        tokenizer.save_pretrained(each)
    shutil.copytree(made.base, made.embedded)
    for name in _ADAPTER_FILES:
        shutil.copy(made.adapter / name, made.embedded)
    return made


def adapted(made: Folders) -> PeftModel:
    """Base and adapter, loaded by ourselves."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.base), made.adapter).eval()


def gguf(made: Folders) -> Path:
    """The merged model as a GGUF."""
    path = made.base.parent / "merged.gguf"
    if not path.is_file():
        model = AutoModelForCausalLM.from_pretrained(made.merged)
        export_gguf(model, load_tokenizer(str(made.merged)), path)
    return path


def variables(**more: str) -> dict[str, str]:
    """The environment of a tool: offline, with this checkout of the packages."""
    return worker.variables({**OFFLINE, **more})


def run_tool(arguments: Sequence[str | Path], **more: str) -> subprocess.CompletedProcess[str]:
    """A tool's command line behind `peft-ext run`, to its end, with more in its environment."""
    command = [sys.executable, *RUN, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=variables(**more), capture_output=True, text=True)


def checked(done: subprocess.CompletedProcess[str], what: str) -> subprocess.CompletedProcess[str]:
    """Raises RuntimeError with the end of its stderr if a tool failed."""
    if done.returncode:
        raise RuntimeError(f"{what} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done


@contextlib.contextmanager
def server(
    arguments: Sequence[str | Path], path: str = "/health", before: Sequence[str] = RUN, seconds: int = 600
) -> Iterator[str]:
    """A tool that serves on a free port of this machine, ended afterwards; gives its address.

    Args:
        arguments: Of its command line; `{port}` stands for the port.
        path: Answered once it is ready.
        before: What stands before them.
        seconds: To wait for it.
    """
    port = _free_port()
    command = [sys.executable, *before, *(str(each).replace("{port}", str(port)) for each in arguments)]
    process = subprocess.Popen(command, cwd=ROOT, env=variables(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + seconds
        while not _answers(address + path):
            if process.poll() is not None or time.monotonic() > end:
                output = process.stdout.read().decode(errors="replace") if process.poll() is not None else "no answer"
                raise RuntimeError(f"{' '.join(command[1:6])} ... doesn't serve:\n{output[-3000:]}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
