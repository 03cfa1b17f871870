# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`paraphrase`: texts from the command line or a file."""

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
from generation_ext.granularity.training import paraphrase
from peft_ext.command_line import note, parse, show
from peft_ext.files import check_writable
from peft_ext.rows import write_rows


@dataclass
class ParaphraseArguments(ModelArguments, DataArguments, DecodingArguments):
    """Arguments of `paraphrase`."""

    texts: list[str] = field(default_factory=list, metadata={"help": "Texts, instead of a file."})
    output: Optional[str] = field(default=None, metadata={"help": "File for the paraphrases: .jsonl or .csv."})


def main(argv: Sequence[str]) -> None:
    """Paraphrase, and write or print."""
    (args,) = parse(argv, ParaphraseArguments, positional="model")
    if bool(args.texts) == bool(args.data):
        raise ValueError("pass either --texts or --data.")
    texts = args.texts or [row["source"] for row in read_texts(args.data, "data", ("source",), args)]
    if args.output:
        if Path(args.output).suffix not in (".jsonl", ".csv"):
            raise ValueError(f"output={args.output!r} must end in .jsonl or .csv.")
        check_writable(Path(args.output), "output")
    model, tokenizer = args.load()
    paraphrases = paraphrase(model, tokenizer, texts, batch_size=args.batch_size, num_beams=args.num_beams)
    if args.output:
        write_rows(args.output, [{"source": text, "paraphrase": each} for text, each in zip(texts, paraphrases)])
        note(f"{len(paraphrases)} paraphrases in {args.output}")
    else:
        show(paraphrases, "\n".join(paraphrases))
