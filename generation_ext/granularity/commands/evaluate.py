# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`evaluate`: a model's paraphrases against references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from generation_ext.granularity.commands.arguments import (
    DataArguments,
    DecodingArguments,
    ModelArguments,
    read_texts,
)
from generation_ext.granularity.metrics import paraphrase_metrics
from generation_ext.granularity.training import paraphrase
from peft_ext.command_line import parse, show
from peft_ext.files import check_writable, write_json


@dataclass
class EvaluateArguments(ModelArguments, DataArguments, DecodingArguments):
    """Arguments of `evaluate`."""

    output: Optional[str] = field(default=None, metadata={"help": "JSON file for the figures."})


def main(argv: Sequence[str]) -> None:
    """Paraphrase, measure, print."""
    (args,) = parse(argv, EvaluateArguments, positional="model")
    pairs = read_texts(args.data, "data", ("source", "target"), args)
    if args.output:
        check_writable(Path(args.output), "output")
    sources, targets = ([pair[name] for pair in pairs] for name in ("source", "target"))
    model, tokenizer = args.load()
    paraphrases = paraphrase(model, tokenizer, sources, batch_size=args.batch_size, num_beams=args.num_beams)
    metrics = {"pairs": len(pairs), **paraphrase_metrics(paraphrases, targets, sources)}
    width = max(map(len, metrics))
    lines = (
        f"{name:>{width}}  {value}" if name == "pairs" else f"{name:>{width}}  {value:.2f}"
        for name, value in metrics.items()
    )
    show(metrics, "\n".join(lines))
    if args.output:
        write_json(Path(args.output), metrics)
