# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Loads policies and reward models, whatever names them, with tokenizers that chat and pad."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.reward_trainer import suppress_seqcls_warning

from peft_ext import devices
from peft_ext.files import written_whole
from peft_ext.models import DEFAULT_MODEL, load, load_config, load_tokenizer, locate, resolve_model
from trl_ext.almost.prompts.chat import with_chat_template


Dtype = Union[str, torch.dtype]


def default_device() -> torch.device:
    """The accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def chosen_device(device: Optional[Union[str, torch.device]] = None) -> torch.device:
    """The device that was named, once a tensor has been put there, or the accelerator if there is one.

    Raises:
        ValueError: If there is no such device.
    """
    return default_device() if device is None else torch.device(devices.usable(str(device)))


def load_policy(name: Optional[str] = None, *, dtype: Dtype = "float32", **kwargs: Any) -> PreTrainedModel:
    """A causal language model in eval mode, an adapter merged into its base; see `peft_ext.models.load`."""
    return load(name, dtype=dtype, merge=True, **kwargs)


def load_chat_tokenizer(name: Optional[str] = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy or reward model, with a chat template and a padding token other than the end token
    where it has one to spare.

    Raises:
        FileNotFoundError, ImportError: If there is none.
    """
    return with_padding(with_chat_template(load_tokenizer(name)))


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy if it pads with its end token, or not at all, and has another token to spare.

    A classifier reads its score at the last token that is no padding, so where a text ends with its only padding token,
    it is read one token earlier, in training as in use.

    Raises:
        ValueError: If there is no token to pad with.
    """
    spare = tokenizer.unk_token or tokenizer.eos_token
    if spare is None and tokenizer.pad_token is None:
        raise ValueError("tokenizer has no padding, unknown or end token; set tokenizer.pad_token.")
    if tokenizer.pad_token is not None and (
        tokenizer.pad_token != tokenizer.eos_token or spare == tokenizer.eos_token
    ):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = spare
    return tokenizer


def load_classifier(name: Optional[str] = None, *, dtype: Dtype = "float32", new_head: bool = True) -> Any:
    """Load a model that gives one score to a text; an adapter stays an adapter.

    Args:
        name: As in `peft_ext.models.load`. The output head of a language model is left out, and a head for the score is
            made with the current random state.
        dtype: Float type of the weights.
        new_head: Whether the model may lack a head for the score.

    Raises:
        FileNotFoundError, ImportError: If there is no such model.
        ValueError: If the model gives more scores than one, or has no head and `new_head` is False.
    """
    name = name or DEFAULT_MODEL
    config = load_config(name)
    is_classifier = any("SequenceClassification" in kind for kind in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ValueError(f"model={name!r} gives {config.num_labels} scores; a reward model gives one.")
    has_head = is_classifier or locate(name)[1] is not None  # PEFT saves the head with the adapter
    if not has_head and not new_head:
        raise ValueError(f"model={name!r} ({config.architectures}) has no head for a score; train a reward model.")
    with suppress_seqcls_warning():  # of a language model, that the head is new
        return load(name, kind="classifier", dtype=dtype, num_labels=1)


def save_plain(name: Optional[str], folder: Path, **kwargs: Any) -> str:
    """A name under which stock transformers loads a policy: its own, or the folder, written if it isn't there yet.

    An adapter or a GGUF is loaded and written out; anything else has its name returned and nothing is written.
    """
    base, adapter = locate(name or DEFAULT_MODEL)
    if adapter is None and resolve_model(base).gguf_file is None:
        return base
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_whole(load_policy(name, **kwargs).save_pretrained, load_chat_tokenizer(name), folder)
    return str(folder)


def save_whole(save: Callable[[Path], Any], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model by its `save_pretrained` and its tokenizer into a folder, whole or not at all."""
    with written_whole(folder) as partial:
        save(partial)
        tokenizer.save_pretrained(partial)
