# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Execute a notebook from top to bottom; fail where a cell fails. `--write` keeps the outputs in the file."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    """Run the notebook named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true", help="write the outputs into the notebook")
    args = parser.parse_args()
    notebook = nbformat.read(args.notebook, as_version=4)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
    print(f"{args.notebook}: executed in {time.perf_counter() - start:.0f} s")
    if args.write:
        for cell in notebook.cells:  # progress bars and warnings hold this machine's paths
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, args.notebook)


if __name__ == "__main__":
    main()
