# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A run folder: what `tune` writes and what `eval` and `generate` read.

base/         the packed base, a compressed-tensors checkpoint with its tokenizer
adapter/      the tuned scales
config.yaml   the arguments
metrics.json  what was measured; there once the run is complete
loss.png      the loss curve
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_ext.models import load_model, load_tokenizer


@dataclass
class ModelArguments:
    """Which tuned model to use: a run folder, or a model with or without an adapter."""

    run: Optional[str] = field(
        default=None, metadata={"help": "Run folder of `peft-ext tune` (or the first argument)."}
    )
    model: Optional[str] = field(
        default=None, metadata={"help": "Instead of a run: default model, hub id, folder or .gguf file."}
    )
    adapter: Optional[str] = field(default=None, metadata={"help": "Adapter folder for --model."})


def load_tuned(args: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode, with its adapter if there is one, and its tokenizer.

    Raises:
        FileNotFoundError: If the run or adapter folder is missing or incomplete.
        ValueError: If both a run and a model are given.
    """
    import peft_ext  # noqa: F401 (registers the tuner that the adapter names)

    if args.run is not None and (args.model or args.adapter):
        raise ValueError(f"run={args.run!r} names base and adapter already; leave out --model and --adapter.")
    base, adapter = args.model, args.adapter
    if args.run is not None:
        run = Path(args.run)
        if not (run / "metrics.json").is_file():
            raise FileNotFoundError(
                f"run={args.run!r} is no finished run: it has no metrics.json. Run peft-ext tune first."
            )
        base, adapter = str(run / "base"), str(run / "adapter")
    if adapter is not None and not Path(adapter, "adapter_config.json").is_file():
        raise FileNotFoundError(f"adapter={adapter!r} has no adapter_config.json, as save_pretrained writes it.")
    model, tokenizer = load_model(base), load_tokenizer(base)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), tokenizer


def held_out_of(run: Optional[str]) -> Optional[float]:
    """The share of the text that a run held out, so that nothing is measured on what it was tuned on."""
    path = Path(run, "config.yaml") if run is not None else None
    if path is None or not path.is_file():
        return None
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")).get("held_out")


def parse(argv: Sequence[str], *kinds: type, positional: Optional[str] = None) -> tuple[Any, ...]:
    """Dataclasses from flags or a YAML file (`--config`), as TRL's scripts parse them.

    Args:
        argv: The arguments after the command's name.
        kinds: Dataclasses.
        positional: Flag that a first argument without dashes stands for.
    """
    try:
        from trl import TrlParser
    except ImportError as error:
        raise ImportError("the command line needs: pip install 'peft-ext[cli]'") from error
    argv = list(argv)
    if positional and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}", *argv]
    parser = TrlParser(kinds, prog="peft-ext")
    return parser.parse_args_and_config(argv)
