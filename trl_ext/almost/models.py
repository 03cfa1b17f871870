# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Loads policies and reward models from whatever names them: hub ids, folders, the default model, adapters on any of
these."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.trainer.reward_trainer import suppress_seqcls_warning

import peft_ext  # noqa: F401 (registers the tuners that adapters may name)
from peft_ext.files import written_whole
from peft_ext.models import DEFAULT_MODEL, load_model, load_tokenizer, resolve_model
from trl_ext.almost.prompts.chat import with_chat_template


logger = logging.getLogger(__name__)
Dtype = Union[str, torch.dtype]
_ADAPTER_CONFIG = "adapter_config.json"


def load_policy(name: Optional[str] = None, *, dtype: Dtype = "float32", **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model in eval mode; an adapter is merged into its base.

    Args:
        name: As in `peft_ext.models.load_model`, or a folder with an adapter, whose base may be any of these.
        dtype: Float type of the weights.
        **kwargs: Passed to `from_pretrained` of the base.

    Raises:
        FileNotFoundError, ImportError: If there is no such model.
        ValueError: If the adapter doesn't say what its base is.
    """
    name = name or DEFAULT_MODEL
    base = base_of(name)
    if base is None:
        return _named(load_model(name, dtype=dtype, **kwargs), name)
    merged = PeftModel.from_pretrained(load_policy(base, dtype=dtype, **kwargs), name).merge_and_unload()
    return _named(merged.eval(), name)


def load_chat_tokenizer(name: Optional[str] = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy or reward model, with a chat template and a padding token other than the end token
    where it has one to spare.

    Raises:
        FileNotFoundError, ImportError: If there is none.
    """
    name = name or DEFAULT_MODEL
    base = base_of(name)
    if base is None:
        tokenizer = load_tokenizer(name)
    elif (Path(name).expanduser() / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(Path(name).expanduser())
    else:
        tokenizer = load_chat_tokenizer(base)
    return with_padding(with_chat_template(tokenizer))


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
        name: As in [`load_policy`]. The output head of a language model is left out, and a head for the score is made
            with the current random state.
        dtype: Float type of the weights.
        new_head: Whether the model may lack a head for the score.

    Raises:
        FileNotFoundError, ImportError: If there is no such model.
        ValueError: If the model gives more scores than one, or has no head and `new_head` is False.
    """
    name = name or DEFAULT_MODEL
    base = base_of(name)
    if base is not None:  # PEFT saves the head with the adapter
        return PeftModel.from_pretrained(load_classifier(base, dtype=dtype), name).eval()
    source = resolve_model(name)
    if source.gguf_file is not None:
        if not new_head:
            raise ValueError(f"model={name!r} is a language model without a head for a score; train a reward model.")
        return _named(_classifier_of(load_model(name, dtype=dtype)), name)
    config = AutoConfig.from_pretrained(source.name_or_path)
    is_classifier = any("SequenceClassification" in kind for kind in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ValueError(f"model={name!r} gives {config.num_labels} scores; a reward model gives one.")
    if not is_classifier and not new_head:
        raise ValueError(f"model={name!r} ({config.architectures}) has no head for a score; train a reward model.")
    with suppress_seqcls_warning():  # of a language model, that the head is new
        loaded = AutoModelForSequenceClassification.from_pretrained(source.name_or_path, num_labels=1, dtype=dtype)
    return _named(loaded.eval(), name)


def save_plain(name: Optional[str], folder: Path, **kwargs: Any) -> str:
    """A name under which stock transformers loads a policy: its own, or the folder, written if it isn't there yet.

    An adapter or a GGUF is loaded and written out; anything else has its name returned and nothing is written.
    """
    name = name or DEFAULT_MODEL
    if base_of(name) is None and resolve_model(name).gguf_file is None:
        return name
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_whole(load_policy(name, **kwargs).save_pretrained, load_chat_tokenizer(name), folder)
    return str(folder)


def save_whole(save: Callable[[Path], Any], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model by its `save_pretrained` and its tokenizer into a folder, whole or not at all."""
    with written_whole(folder) as partial:
        save(partial)
        tokenizer.save_pretrained(partial)


def base_of(name: str) -> Optional[str]:
    """The base of an adapter; None if the name isn't an adapter's.

    Raises:
        ValueError: If the adapter doesn't say what its base is.
    """
    config = Path(name).expanduser() / _ADAPTER_CONFIG
    if not config.is_file():
        return None
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"the adapter {name!r} doesn't say what its base is; set base_model_name_or_path in {config}."
        )
    return str(base)


def _named(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """An adapter's file names its base by what the user called it, not by where a package has put it."""
    model.name_or_path = name
    model.config._name_or_path = name
    return model


def _classifier_of(model: PreTrainedModel) -> PreTrainedModel:
    """A classifier on the body of a language model."""
    config = model.config
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
    setattr(classifier, classifier.base_model_prefix, getattr(model, model.base_model_prefix))
    return classifier.eval()
