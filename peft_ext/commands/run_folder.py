# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A run folder: what `tune` writes and what `eval` and `generate` read.

base/         the packed base, a compressed-tensors checkpoint with its tokenizer
adapter/      the tuned scales
config.yaml   the arguments
metrics.json  what was measured; there once the run is complete
loss.png      the loss curve
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_ext.files import check_folder_writable
from peft_ext.models import load_model, load_tokenizer


_ADAPTER_CONFIG = "adapter_config.json"


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
    if args.run is not None and (args.model or args.adapter):
        raise ValueError(f"run={args.run!r} names base and adapter already; leave out --model and --adapter.")
    if args.run is None:
        return load_with_adapter(args.model, args.adapter)
    return load_with_adapter(*_parts_of(args.run))


def locate(model: str, adapter: Optional[str] = None) -> tuple[str, Optional[str]]:
    """Base and adapter of whatever a folder is: a run, an adapter, or a model, to which an adapter may be named.

    Raises:
        FileNotFoundError: If it is a run that isn't finished.
        ValueError: If an adapter is named although the folder has one, or the folder's adapter names no base.
    """
    folder = Path(model).expanduser()
    is_run, is_adapter = (folder / "config.yaml").is_file(), (folder / _ADAPTER_CONFIG).is_file()
    if (is_run or is_adapter) and adapter is not None:
        raise ValueError(f"model={model!r} names an adapter already; leave out --adapter.")
    if is_run:
        return _parts_of(model)
    if not is_adapter:
        return model, adapter
    base = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"the adapter {model!r} doesn't say what its base is; pass the base, and --adapter {model}.")
    return base, str(folder)


def load_with_adapter(base: Optional[str], adapter: Optional[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in eval mode, with an adapter if one is given, and its tokenizer.

    Raises:
        FileNotFoundError: If the adapter's folder is missing or incomplete.
    """
    import peft_ext  # noqa: F401 (registers the tuner that the adapter names)

    if adapter is not None and not Path(adapter, _ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"adapter={adapter!r} has no {_ADAPTER_CONFIG}, as save_pretrained writes it.")
    model, tokenizer = load_model(base), load_tokenizer(base)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), tokenizer


def _parts_of(run: str) -> tuple[str, str]:
    """Base and adapter of a run."""
    if not Path(run, "metrics.json").is_file():
        raise FileNotFoundError(f"run={run!r} is no finished run: it has no metrics.json. Run peft-ext tune first.")
    return str(Path(run, "base")), str(Path(run, "adapter"))


def held_out_of(run: Optional[str]) -> Optional[float]:
    """The share of the text that a run held out, so that nothing is measured on what it was tuned on."""
    path = Path(run, "config.yaml") if run is not None else None
    if path is None or not path.is_file():
        return None
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")).get("held_out")


def new_folder(output_dir: Optional[str]) -> Path:
    """The folder that `--output_dir` names: new or empty, and checked before any long work.

    Raises:
        ValueError, OSError: If it is missing, something else, or can't be written.
    """
    if not output_dir:
        raise ValueError("output_dir is missing: pass --output_dir, the new folder to write to.")
    folder = Path(output_dir).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output_dir={str(folder)!r} is a file or not empty; pass a new folder.")
    check_folder_writable(folder, "output_dir")
    return folder
