# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext eval`: perplexity of a tuned model on a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from peft_ext.command_line import BlockArguments, parse
from peft_ext.commands.run_folder import TunedModelArguments, held_out_of
from peft_ext.files import check_writable, write_json
from peft_ext.models import load_tokenizer
from peft_ext.perplexity import perplexity
from peft_ext.text import load_text, token_blocks


@dataclass
class EvalArguments(TunedModelArguments, BlockArguments):
    """Arguments of `peft-ext eval`, which reads the held-out part of a text."""

    whole: bool = field(default=False, metadata={"help": "Read all of the text, not only what tune would hold out."})
    held_out: Optional[float] = field(
        default=None,
        metadata={"help": "Share of the text that is held out, where it has no validation split; the run's, or 0.1."},
    )
    blocks: int = field(default=64, metadata={"help": "Blocks to read at most."})
    batch_size: int = field(default=4, metadata={"help": "Blocks per forward pass."})
    output: Optional[str] = field(default=None, metadata={"help": "JSON file to write the result to."})


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    (args,) = parse(argv, EvalArguments, positional="run")
    if args.output:
        check_writable(Path(args.output), "output")
    share = args.held_out or held_out_of(args.run) or 0.1
    splits = load_text(args.data, held_out=share, text_field=args.text_field, data_config=args.data_config)
    texts = [*splits.train, *splits.held_out] if args.whole else splits.held_out
    if args.run is None:
        tokenizer = load_tokenizer(args.model)
        token_blocks(tokenizer, texts, args.block_size)  # a text that is too short fails before the model is loaded
    model, tokenizer = args.load()
    blocks = token_blocks(tokenizer, texts, args.block_size, name="text")[: args.blocks]
    value = perplexity(model, blocks, batch_size=args.batch_size, progressbar=True)
    result = {
        "model": args.run or args.model or "default",
        "adapter": args.adapter,
        "data": args.data,
        "tokens": blocks.numel(),
        "perplexity": value,
    }
    print(json.dumps(result, indent=2))
    if args.output:
        write_json(Path(args.output), result)
