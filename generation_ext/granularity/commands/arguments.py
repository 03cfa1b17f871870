# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the commands share: flags that name a model and a file, and how those are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from generation_ext.data_files import columns_of, fields_of, read_rows
from generation_ext.granularity.modeling import CDNPGConfig  # registers the model type
from peft_ext import command_line


@dataclass
class ModelArguments:
    """Which trained model."""

    model: Optional[str] = field(default=None, metadata={"help": "Folder of a trained model (or the first argument)."})


@dataclass
class DecodingArguments:
    """How paraphrases are searched."""

    num_beams: int = field(default=8, metadata={"help": "Beams; the paper's 8."})
    batch_size: int = field(default=32, metadata={"help": "Texts at a time."})


@dataclass
class DataArguments:
    """Which texts."""

    data: Optional[str] = field(default=None, metadata={"help": "Texts: .jsonl or .csv."})
    fields: list[str] = field(
        default_factory=list, metadata={"help": "Columns of source and target, as FIELD=COLUMN."}
    )
    limit: Optional[int] = field(default=None, metadata={"help": "Only so many rows."})


def parse(argv: Sequence[str], *kinds: type, positional: Optional[str] = None) -> tuple[Any, ...]:
    """Dataclasses from flags and a YAML file, see `peft_ext.command_line.parse`."""
    return command_line.parse(argv, *kinds, positional=positional, program="python -m generation_ext.granularity")


def load_model(folder: Optional[str]) -> tuple[Any, Any]:
    """A trained model in eval mode, and its tokenizer.

    Raises:
        ValueError, FileNotFoundError: If none is named, or the folder holds none that can be loaded.
    """
    if not folder:
        raise ValueError("model is missing: pass --model, the folder of a trained model.")
    path = Path(folder, "model") if Path(folder, "model", "config.json").is_file() else Path(folder)
    if not (path / "config.json").is_file():
        hint = " The run isn't finished: call train again." if Path(folder, "config.yaml").is_file() else ""
        raise FileNotFoundError(f"model={folder!r}: there is no model in that folder.{hint}")
    config = AutoConfig.from_pretrained(path)
    if not config.is_encoder_decoder:
        raise ValueError(f"model={folder!r} is a {config.model_type}, not an encoder-decoder model.")
    return AutoModelForSeq2SeqLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def has_granularities(model: Any) -> bool:
    """Whether a model is C-DNPG, and not its plain twin."""
    return isinstance(model.config, CDNPGConfig) and model.config.granularity_mode is not None


def read_texts(path: Optional[str], argument: str, names: Sequence[str], args: DataArguments) -> list[dict[str, str]]:
    """Rows with these fields.

    Raises:
        ValueError, FileNotFoundError: If there is no such file, or a row lacks a column.
    """
    if not path:
        raise ValueError(f"{argument} is missing: pass --{argument}.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}={path!r}: there is no such file.")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"limit={args.limit} must be at least 1.")
    columns = columns_of(("source", "target"), args.fields)
    columns = {name: columns[name] for name in names}
    rows = read_rows(Path(path))[: args.limit]
    return [fields_of(row, columns, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
