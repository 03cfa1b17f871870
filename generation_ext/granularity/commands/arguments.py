# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the commands share: flags that name a model and a file, and how those are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from generation_ext import columns
from generation_ext.columns import DataArguments, columns_of
from generation_ext.granularity import modeling  # noqa: F401 (registers the model type)
from peft_ext import command_line
from peft_ext.models import load_config


@dataclass
class ModelArguments(command_line.ModelArguments):
    """Which trained model: its folder, or the run's."""

    def load(self, kind: str = "seq2seq") -> tuple[Any, Any]:
        """The model in eval mode, and its tokenizer.

        Raises:
            ValueError, FileNotFoundError: If none is named, or the folder holds none that can be loaded.
        """
        if not self.model:
            raise ValueError("model is missing: pass --model, the folder of a trained model.")
        folder = Path(self.model)
        path = folder / "model" if (folder / "model" / "config.json").is_file() else folder
        if not (path / "config.json").is_file():
            hint = " The run isn't finished: call train again." if (folder / "config.yaml").is_file() else ""
            raise FileNotFoundError(f"model={self.model!r}: there is no model in that folder.{hint}")
        config = load_config(str(path))
        if not config.is_encoder_decoder:
            raise ValueError(f"model={self.model!r} is a {config.model_type}, not an encoder-decoder model.")
        return command_line.ModelArguments(str(path), self.adapter, self.dtype, self.device).load(kind)


@dataclass
class DecodingArguments:
    """How paraphrases are searched."""

    num_beams: int = field(default=8, metadata={"help": "Beams; the paper's 8."})
    batch_size: int = field(default=32, metadata={"help": "Texts at a time."})


def read_texts(path: Optional[str], argument: str, names: Sequence[str], args: DataArguments) -> list[dict[str, str]]:
    """Rows with these fields, see `generation_ext.columns.read_texts`."""
    of_fields = columns_of(("source", "target"), args.fields)
    return columns.read_texts(path, {name: of_fields[name] for name in names}, argument, args.limit)[1]
