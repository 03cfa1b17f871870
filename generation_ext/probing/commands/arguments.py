# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the commands share: flags that name a language model and the columns of a file, and how those are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from generation_ext.data_files import fields_of, read_rows
from peft_ext import command_line, models


RUN = "run.json"


@dataclass
class ModelArguments:
    """Which language model."""

    model: Optional[str] = field(
        default=None,
        metadata={"help": "Hub id, folder or .gguf file; the classifier's own, or SmolLM2-135M-Instruct."},
    )
    adapter: Optional[str] = field(default=None, metadata={"help": "Folder of a PEFT adapter for it."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})
    memory_limit: Optional[int] = field(
        default=None, metadata={"help": "Bytes that a pass may take beside the weights; a quarter of what is free."}
    )


@dataclass
class DataArguments:
    """Which texts."""

    data: Optional[str] = field(default=None, metadata={"help": "Texts: .jsonl or .csv."})
    fields: list[str] = field(
        default_factory=list, metadata={"help": "Columns of the template's slots, as FIELD=COLUMN."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the classes."})
    limit: Optional[int] = field(default=None, metadata={"help": "Only so many rows."})


def parse(argv: Sequence[str], *kinds: type, positional: Optional[str] = None) -> tuple[Any, ...]:
    """Dataclasses from flags and a YAML file, see `peft_ext.command_line.parse`."""
    return command_line.parse(argv, *kinds, positional=positional, program="python -m generation_ext.probing")


def load_model(args: ModelArguments) -> tuple[Any, Any]:
    """The language model (or encoder) in eval mode, and its tokenizer.

    Raises:
        ValueError, FileNotFoundError, ImportError: If there is no such model or adapter.
    """
    if args.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={args.dtype!r} is unknown; choose one of auto, float32, bfloat16, float16.")
    if args.adapter is not None and not Path(args.adapter, "adapter_config.json").is_file():
        raise FileNotFoundError(f"adapter={args.adapter!r} has no adapter_config.json, as save_pretrained writes it.")
    config = models.load_config(args.model)
    kinds = config.architectures or []
    if config.is_encoder_decoder or not any("CausalLM" in kind or "LMHead" in kind for kind in kinds or ["CausalLM"]):
        from transformers import AutoModel

        model: Any = AutoModel.from_pretrained(args.model, dtype=args.dtype)
    else:
        model = models.load_model(args.model, dtype=args.dtype)
    if args.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter)
    return model.eval(), models.load_tokenizer(args.model)


def labelled(
    path: str, argument: str, columns: Mapping[str, str], label_column: str, limit: Optional[int]
) -> tuple[list[dict[str, str]], list[Optional[str]]]:
    """Texts and their classes; None where a row has none.

    Raises:
        FileNotFoundError, ValueError: If there is no such file, or a row lacks a column.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}={path!r}: there is no such file.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1.")
    rows = read_rows(Path(path))[:limit]
    texts = [fields_of(row, columns, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
    labels = [row.get(label_column) for row in rows]
    return texts, [None if label is None else str(label) for label in labels]
