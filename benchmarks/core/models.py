# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the `model` of an experiment stands for on this machine."""

from __future__ import annotations

from pathlib import Path

from benchmarks.core.run import RESULTS, NotHere


# SmolLM2 off the lattice that its file has; `benchmarks.float_base` makes it.
FLOAT_BASE = "smollm2-135m-float"


def named(model: str, results: Path = RESULTS) -> str:
    """What `peft_ext.models.load` takes for a name: the folder of [`FLOAT_BASE`], any other as it is.

    Raises:
        NotHere: If that base hasn't been made on this machine.
    """
    if model != FLOAT_BASE:
        return model
    folder = results / "float_base" / "smollm2.work" / FLOAT_BASE
    if not (folder / "config.json").is_file():
        raise NotHere(
            f"{FLOAT_BASE} isn't here yet; `python -m benchmarks float_base` makes it (40 minutes on one core)."
        )
    return str(folder)
