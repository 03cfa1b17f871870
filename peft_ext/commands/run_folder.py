# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A run folder: what `tune` writes; and the models, runs among them, that other commands read.

base/         the packed base, a compressed-tensors checkpoint with its tokenizer
adapter/      the tuned scales
config.yaml   the arguments
metrics.json  what was measured; there once the run is complete
loss.png      the loss curve
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from peft_ext.command_line import ModelArguments
from peft_ext.files import check_folder_writable
from peft_ext.runs import RunFolder


@dataclass
class AnyModelArguments(ModelArguments):
    """Which model to use: whatever `peft_ext.models.load` takes."""

    run: Optional[str] = field(
        default=None, metadata={"help": "Run folder of `peft-ext tune`; --model and the first argument take it, too."}
    )

    def __post_init__(self) -> None:
        if self.run is None:
            return
        if self.model or self.adapter:
            raise ValueError(f"run={self.run!r} names base and adapter already; leave out --model and --adapter.")
        if RunFolder(self.run).settings is None:
            raise FileNotFoundError(f"run={self.run!r} is no run of peft-ext tune: it has no config.yaml.")
        self.model = self.run


def settings_of(model: Optional[str]) -> dict[str, Any]:
    """What a run was started with; nothing for any other model."""
    if model is None or not (Path(model).expanduser() / "config.yaml").is_file():
        return {}
    return RunFolder(model).settings or {}


def new_folder(output_dir: Optional[str]) -> Path:
    """The folder that `--output_dir` names: new or empty, and checked before any long work.

    Raises:
        ValueError, OSError: If it is missing, something else, or can't be written.
    """
    if not output_dir:
        raise ValueError("output_dir is missing: pass --output_dir, the new folder to write to.")
    folder = Path(output_dir).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output_dir={str(folder)!r} is a file or not empty; pass a new folder.")
    check_folder_writable(folder, "output_dir")
    return folder
