# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A fitted `PALPClassifier` as a folder: `palp.json` and `head.safetensors`, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from generation_ext.probing.heads import HEADS
from generation_ext.prompts import Task
from peft_ext.files import written_whole
from peft_ext.language_model import base_fingerprint


if TYPE_CHECKING:
    from generation_ext.probing.palp import PALPClassifier

FORMAT = 1
JSON, ARRAYS = "palp.json", "head.safetensors"
# What is this process's or this machine's is not saved.
_NOT_SAVED = ("model", "tokenizer", "memory", "memory_limit", "progressbar", "random_state", "label_words")


def save(classifier: PALPClassifier, folder: Path) -> None:
    """Write a fitted classifier, see `PALPClassifier.save_pretrained`."""
    classes = classifier.classes_.tolist()
    if not all(isinstance(name, (str, int, float)) for name in classes):
        raise TypeError(f"classes of type {type(classes[0]).__name__} can't be saved; use strings or numbers.")
    model = classifier.model
    base = {"name": _name(model), "fingerprint": base_fingerprint(model)} if isinstance(model, nn.Module) else {}
    params = {n: v for n, v in classifier.get_params(deep=False).items() if n not in _NOT_SAVED}
    content = {
        "format": FORMAT,
        "base_model": base,
        "params": params,
        "classes": classes,
        "words": classifier.task_.words,
        "demonstrations": [[classifier.task_.values(text), name] for text, name in classifier.demonstrations_],
    }
    arrays = {"mean": classifier.mean_, "scale": classifier.scale_}
    arrays.update({f"head.{name}": array for name, array in classifier.head_.arrays.items()})
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not (folder / JSON).is_file() and any(folder.iterdir()):
        raise FileExistsError(f"folder={str(folder)!r} holds something else; choose another one.")
    with written_whole(folder) as partial:
        partial.mkdir()
        text = json.dumps(content, indent=1, ensure_ascii=False, default=_plain)
        (partial / JSON).write_text(text + "\n", encoding="utf-8")
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial / ARRAYS)


def load(cls: type[PALPClassifier], folder: Path, model: Any, tokenizer: Any) -> PALPClassifier:
    """Read a fitted classifier, see `PALPClassifier.from_pretrained`."""
    content, arrays = _read(folder)
    base = content["base_model"]
    if model is None:
        model, tokenizer = _load_base(base, folder, tokenizer)
    elif isinstance(model, nn.Module):
        if tokenizer is None:
            raise ValueError("tokenizer is missing: pass the model's.")
        fingerprint = base_fingerprint(model)
        if base and fingerprint != base["fingerprint"]:
            raise ValueError(
                f"{str(folder)!r} was fitted on {base['name']!r} (fingerprint {base['fingerprint']}), but model is "
                f"{_name(model)!r} (fingerprint {fingerprint}); pass the model it was fitted on, or fit it again."
            )
    params = dict(content["params"])
    words = dict(zip(content["classes"], content["words"]))
    classifier = cls(model, tokenizer, label_words=words, **params)
    classifier.classes_ = np.array(content["classes"])
    classifier.task_ = classifier._task()
    classifier.demonstrations_ = [(text, name) for text, name in content["demonstrations"]]
    classifier.prefix_ = classifier._prefix(range(len(classifier.demonstrations_)))
    classifier.mean_, classifier.scale_ = arrays.pop("mean"), arrays.pop("scale")
    classifier.head_ = HEADS[classifier.head]({name.removeprefix("head."): value for name, value in arrays.items()})
    return classifier


def base_name(folder: Path) -> Optional[str]:
    """The name of the language model that a saved classifier was fitted on.

    Raises:
        FileNotFoundError, ValueError: If there is no classifier in the folder, or it is damaged.
    """
    return _read(folder)[0]["base_model"].get("name")


def fields_of_template(folder: Path) -> tuple[str, ...]:
    """The slots of a saved classifier's template."""
    return Task(_read(folder)[0]["params"]["template"], {"a": "a", "b": "b"}).fields


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not (folder / JSON).is_file():
        raise FileNotFoundError(f"folder={str(folder)!r}: there is no {JSON}, as save_pretrained writes it.")
    try:
        content = json.loads((folder / JSON).read_text(encoding="utf-8"))
        version = content["format"]
        arrays = load_file(folder / ARRAYS)
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ValueError(f"{str(folder)!r} is damaged ({error}); fit and save the classifier again.") from error
    if version != FORMAT:
        raise ValueError(f"{str(folder)!r} has format {version}, this version reads {FORMAT}; update peft-ext.")
    return content, arrays


def _load_base(base: dict[str, Any], folder: Path, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    name = base.get("name")
    if not name:
        raise ValueError(f"model is missing: {str(folder)!r} doesn't name the one that it was fitted on.")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model {name!r}, which {str(folder)!r} was fitted on, can't be loaded by its name; pass model and "
            "tokenizer."
        ) from error
    decoder = any("CausalLM" in kind or "LMHead" in kind for kind in config.architectures or [])
    model = (AutoModelForCausalLM if decoder else AutoModel).from_pretrained(name).eval()
    found = base_fingerprint(model)
    if found != base["fingerprint"]:
        raise ValueError(f"{name!r} is no longer the model of {str(folder)!r}: {found}, not {base['fingerprint']}.")
    return model, tokenizer or AutoTokenizer.from_pretrained(name)


def _name(model: Any) -> Optional[str]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(getattr(base, "config", None), "_name_or_path", None) or None


def _plain(value: Any) -> Any:
    """numpy's numbers, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        return list(value)
    raise TypeError(f"{value!r} can't be saved as JSON.")
