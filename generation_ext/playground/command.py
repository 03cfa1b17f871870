# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext playground`: a page on this machine. As `app.py` of a Hugging Face Space: `from generation_ext.playground.command
import main; main(["--host", "0.0.0.0"])`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from generation_ext.playground.answers import Answers
from generation_ext.playground.exhibits import Exhibits
from generation_ext.playground.page import make_page
from peft_ext.command_line import note, parse


@dataclass
class PlaygroundArguments:
    """Arguments of `peft-ext playground`."""

    model: Optional[str] = field(
        default=None,
        metadata={"help": "Hub id, folder or .gguf file of a causal model; by default SmolLM2-135M-Instruct."},
    )
    output_dir: Optional[str] = field(
        default=None, metadata={"help": "Where what is trained for the page is kept; by default ~/.cache/peft-ext."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0: others can reach it."})
    port: int = field(default=7860, metadata={"help": "Port to listen on."})
    prepare: bool = field(default=False, metadata={"help": "Train everything now, and end."})


def main(argv: Sequence[str]) -> None:
    """Serve the page until Ctrl-C."""
    (args,) = parse(argv, PlaygroundArguments, positional="model")
    exhibits = Exhibits(args.model, args.output_dir)
    if args.prepare:
        for name in ("pool", "critic", "intents", "paraphraser"):
            note(f"{name} ...")
            getattr(exhibits, name)
        note(f"Everything is in {exhibits.folder}.")
        return
    page = make_page(Answers(exhibits))
    if args.host not in ("127.0.0.1", "localhost"):
        note(f"Listening on {args.host}: whoever reaches this machine can use the page.")
    note(f"The page: http://{args.host}:{args.port}")
    page.launch(server_name=args.host, server_port=args.port, quiet=True, share=False)
