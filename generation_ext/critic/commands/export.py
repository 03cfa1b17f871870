# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`export`: a critic with linear action values as a LoRA on the output head, for servers that know nothing of critics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from generation_ext.critic.commands.arguments import NamedCriticArguments, critic_folders, load_critics
from generation_ext.critic.to_lora import FORMATS
from peft_ext.command_line import parse, show
from peft_ext.files import check_folder_writable


@dataclass
class ExportArguments(NamedCriticArguments):
    """Which critic, how strong, and where to."""

    strength: float = field(default=1.0, metadata={"help": "Exponent of the odds ratio; below 0: steers away."})
    to: str = field(default="peft", metadata={"help": "peft (an adapter for PEFT, vLLM) or gguf (for llama.cpp)."})
    output_dir: Optional[str] = field(default=None, metadata={"help": "Folder of the adapter."})


def main(argv: Sequence[str]) -> None:
    """Check everything, then load the model, write and say what was written."""
    (args,) = parse(argv, ExportArguments, positional="critic")
    if args.output_dir is None:
        raise ValueError("output_dir is missing: pass --output_dir, a folder for the adapter.")
    if args.to not in FORMATS:
        raise ValueError(f"to={args.to!r} is unknown; choose one of {FORMATS}.")
    if len(args.critic) > 1:
        raise ValueError(f"critic={args.critic}: export takes one critic.")
    folders = critic_folders(args.critic)
    check_folder_writable(Path(args.output_dir), "output_dir")
    model, _ = args.load()
    critic = load_critics(folders, model)[0]
    path = critic.to_lora(model, args.output_dir, args.strength, args.to)
    rank = critic.config.action_rank or critic.config.embedding_size
    show(
        {"path": str(path), "strength": args.strength, "rank": rank},
        f"{path}: a LoRA of rank {rank} on the output head.",
    )
