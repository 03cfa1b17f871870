# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`show`: the granularities of a sentence's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from generation_ext.granularity.commands.arguments import ModelArguments
from generation_ext.granularity.pictures import as_text, heat_map, sentence_granularities
from peft_ext.command_line import note, parse, show
from peft_ext.files import check_writable


@dataclass
class ShowArguments(ModelArguments):
    """Arguments of `show`."""

    text: Optional[str] = field(default=None, metadata={"help": "The sentence."})
    output: Optional[str] = field(default=None, metadata={"help": "A .png to draw as well."})


def main(argv: Sequence[str]) -> None:
    """Print, and draw."""
    (args,) = parse(argv, ShowArguments, positional="model")
    if not args.text or not args.text.strip():
        raise ValueError("text is missing: pass --text 'a sentence'.")
    if args.output:
        if not args.output.endswith(".png"):
            raise ValueError(f"output={args.output!r} must end in .png.")
        check_writable(Path(args.output), "output")
    model, tokenizer = args.load()
    tokens, z = sentence_granularities(model, tokenizer, args.text)
    show({"tokens": tokens, "granularities": z.tolist()}, as_text(tokens, z))
    if args.output:
        heat_map(tokens, z, args.output)
        note(f"picture in {args.output}")
