# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext eval`: perplexity of any model on held-out data, of the tokens that `tune` trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

from peft_ext.command_line import parse, show
from peft_ext.commands.run_folder import AnyModelArguments, settings_of
from peft_ext.commands.training_data import DataArguments, ExampleArguments, held_out_data
from peft_ext.data import PYTHON_DOCS
from peft_ext.files import check_writable, write_json
from peft_ext.models import load_tokenizer
from peft_ext.perplexity import example_perplexity


@dataclass
class EvalArguments(AnyModelArguments, DataArguments, ExampleArguments):
    """Arguments of `peft-ext eval`, which reads the held-out part of the data; of a run, its own data by default."""

    whole: bool = field(default=False, metadata={"help": "Read all of the data, not only what tune would hold out."})
    held_out: Optional[float] = field(
        default=None,
        metadata={
            "help": "Share of the data that is held out, where they have no validation split; the run's, or 0.1."
        },
    )
    blocks: int = field(default=64, metadata={"help": "Blocks (or examples) to read at most."})
    batch_size: int = field(default=4, metadata={"help": "Blocks (or examples) per forward pass."})
    output: Optional[str] = field(default=None, metadata={"help": "JSON file to write the result to."})


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    (args,) = parse(argv, EvalArguments, positional="model")
    if args.output:
        check_writable(Path(args.output), "output")
    if args.blocks < 1:
        raise ValueError(f"blocks={args.blocks} must be at least 1.")
    run = settings_of(args.model)
    if args.data is None:
        _take_data_of(args, run)
    share = args.held_out or run.get("held_out") or 0.1
    # data that can't be read, or are too short, fail before the model is loaded
    tokenizer = load_tokenizer(args.adapter if _has_tokenizer(args.adapter) else args.model)
    data = held_out_data(args, args, tokenizer, share, args.whole, args.blocks)
    model, _ = args.load()
    result = {
        "model": args.model or "default",
        "adapter": args.adapter,
        "data": args.data or PYTHON_DOCS,
        "shape": data.shape,
        "tokens": data.tokens,
        "trained_tokens": data.trained,
        "perplexity": example_perplexity(model, data.examples, batch_size=args.batch_size, progressbar=True),
    }
    show(result, json.dumps(result, indent=2))
    if args.output:
        write_json(Path(args.output), result)


def _take_data_of(args: EvalArguments, run: dict[str, Any]) -> None:
    """What a run was tuned on, and how its rows became examples; a flag that differs from its default stays."""
    for kind in (DataArguments, ExampleArguments):
        for each in fields(kind):
            # the template went into the run's own tokenizer
            if each.name in run and each.name != "chat_template_path" and getattr(args, each.name) == each.default:
                setattr(args, each.name, run[each.name])


def _has_tokenizer(adapter: Optional[str]) -> bool:
    return adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
