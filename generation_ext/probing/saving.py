# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A fitted classifier as a folder: `palp.json` and `head.safetensors`, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
from torch import nn

from generation_ext.probing.features import POOLING
from generation_ext.probing.heads import AUTO, HEADS
from generation_ext.probing.reading import BEST
from generation_ext.prompts import Task
from peft_ext import models
from peft_ext.file_formats import (
    JsonFormat,
    Tensor,
    check_tensors,
    list_of,
    mapping_of,
    number,
    one_of,
    record,
    text,
    truth,
    whole,
)
from peft_ext.files import check_digests, digests, written_whole
from peft_ext.language_model import adapters_fingerprint, base_fingerprint, other_adapters
from peft_ext.language_model import base_name as name_of
from peft_ext.model_card import README, Card, write_card
from peft_ext.tensor_files import read_arrays, verifies, write_tensors


FORMAT = 1
JSON, ARRAYS = "palp.json", "head.safetensors"
_AGAIN = "Fit and save the classifier again."
_FITTED = ("params", "classes", "words", "demonstrations", "chosen")
PARAMS = {
    "template": text(),
    "head": text(AUTO, *HEADS),
    "demonstrations": text().or_missing(),
    "separator": text().or_missing(),
    "permutations": whole(1).or_missing(),
    "head_params": record({}).or_null().or_missing(),
    "label_scores": truth().or_missing(),
    "layer": one_of(whole(), text(AUTO, BEST)).or_missing(),
    "pooling": text().or_missing(),
    "overflow": text().or_missing(),
    "max_length": whole(1).or_null().or_missing(),
}
_CLASS = one_of(text(), number(), truth())
FILE = JsonFormat(
    JSON,
    {
        "base_model": record(
            {
                "name": text().or_null().or_missing(),
                "fingerprint": text().or_null().or_missing(),
                "adapters": text().or_null().or_missing(),
            }
        ).means("the language model that it was fitted on; empty for an extractor of one's own"),
        "params": record(PARAMS).means("the constructor's arguments"),
        "classes": list_of(_CLASS, least=2).means("in the order of the scores"),
        "words": list_of(text(), least=2).means("what stands for them in demonstrations"),
        "demonstrations": list_of(list_of(one_of(mapping_of(text()), _CLASS), length=2)).means("text and class"),
        "chosen": record(
            {
                "layer": whole(0).or_null(),
                "pooling": text(*POOLING).or_null(),
                "blocks": list_of(list_of(one_of(whole(0), text(*POOLING)), length=2)).or_missing(),
                "head": text(*HEADS).or_missing(),
                "label_weight": number().or_null().or_missing(),
                "C": number().or_null(),
                "layer_scores": list_of(list_of(one_of(whole(0), text(*POOLING), number()), length=3)),
                "C_scores": list_of(list_of(number(), length=4)),
            }
        )
        .or_missing()
        .means(
            "what is read and the head's C, and what each candidate had in cross-validation; null: neither was there, or, for "
            "layer and pooling, several are (blocks has them all)"
        ),
        "state": text()
        .or_missing()
        .means("sha256 of all that was fitted: params, classes, words, demonstrations, chosen"),
    },
    format=FORMAT,
    way_out=_AGAIN,
)
# Of `ARRAYS`, beside the head's, whose names begin with "head.".
STANDARDISATION = {
    "mean": Tensor(("F64", "F32"), ("n",), note="of the features"),
    "scale": Tensor(("F64", "F32"), ("n",), least=1e-300, note="their deviation"),
}


def write(folder: Path, model: Any, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray], card: Card) -> None:
    """Write what a classifier consists of, and which model it belongs to; `read` gives it back.

    A model card that is there already is kept as `write_card` keeps it.

    Raises:
        FileExistsError: If the folder holds something else.
    """
    base = {}
    if isinstance(model, nn.Module):
        fingerprints = {"fingerprint": base_fingerprint(model), "adapters": adapters_fingerprint(model)}
        base = {"name": name_of(model), **fingerprints}
    folder.parent.mkdir(parents=True, exist_ok=True)
    others = [path for path in folder.iterdir() if path.name != README] if folder.is_dir() else []
    if folder.exists() and not (folder / JSON).is_file() and (others or not folder.is_dir()):
        raise FileExistsError(f"folder={str(folder)!r} holds something else; choose another one.")
    with written_whole(folder, keep=True) as partial:
        partial.mkdir()
        write_tensors(partial / ARRAYS, arrays)
        whole = {"format": FORMAT, "base_model": base, **content, "files": digests(partial)}
        text = json.dumps(whole, indent=1, ensure_ascii=False, default=_plain)
        text = json.dumps({**whole, "state": _state(json.loads(text))}, indent=1, ensure_ascii=False, default=_plain)
        FILE.check_written(json.loads(text))
        (partial / JSON).write_text(text + "\n", encoding="utf-8")
        if (folder / README).is_file():
            shutil.copy(folder / README, partial)
        write_card(card, partial)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The contents and arrays of a classifier's folder.

    Raises:
        FileNotFoundError: If there is no classifier in the folder.
        ValueError: If it is damaged, or of another version.
    """
    if not (folder / JSON).is_file():
        raise FileNotFoundError(f"folder={str(folder)!r}: there is no {JSON}, as save_pretrained writes it.")
    content = FILE.read(folder / JSON)
    classes = content["classes"]
    if len(content["words"]) != len(classes) or len({(type(each), each) for each in classes}) < len(classes):
        raise ValueError(
            f"{str(folder / JSON)!r}: classes is {classes}, words {content['words']}; they must be different classes, and "
            f"words for each. {_AGAIN}"
        )
    if not (folder / ARRAYS).is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {ARRAYS}, as save_pretrained writes it. {_AGAIN}")
    unknown = sorted(set(content["params"]) - set(PARAMS))
    if unknown:
        raise ValueError(
            f"{str(folder / JSON)!r}: params has {unknown[0]!r}, which this version doesn't know. {_AGAIN}"
        )
    if "chosen" not in content and {AUTO, BEST} & {content["params"].get(name) for name in ("layer", "pooling")}:
        raise ValueError(
            f"{str(folder / JSON)!r}: params leaves layer or pooling open, and chosen is missing. {_AGAIN}"
        )
    for block in content.get("chosen", {}).get("blocks", []):
        if not isinstance(block[0], int) or block[1] not in POOLING:
            raise ValueError(
                f"{str(folder / JSON)!r}: chosen.blocks has {block}; each is a layer and a pooling. {_AGAIN}"
            )
    if content["base_model"] and not content["base_model"].get("fingerprint"):
        raise ValueError(f"{str(folder / JSON)!r}: base_model.fingerprint is missing. {_AGAIN}")
    if content.get("state", _state(content)) != _state(content) and verifies():
        raise ValueError(
            f"{str(folder / JSON)!r}: {', '.join(_FITTED)} aren't all as they were saved (state tells). {_AGAIN} To keep an "
            "edit, take the line 'state' out."
        )
    check_digests(folder, content.get("files"), JSON)
    arrays = read_arrays(folder / ARRAYS)
    own = [name.removeprefix("head.") for name in arrays if name.startswith("head.")]
    name = content.get("chosen", {}).get("head", content["params"]["head"])
    if name == AUTO:
        raise ValueError(f"{str(folder / JSON)!r}: params leaves the head open, and chosen.head is missing. {_AGAIN}")
    head = HEADS[name]
    described = {**STANDARDISATION, **{f"head.{name}": each for name, each in head.tensors(own).items()}}
    where = repr(str(folder / ARRAYS))
    check_tensors(arrays, described, where, {"classes": len(classes)}, _AGAIN)
    head({name: arrays[f"head.{name}"] for name in own}).check(len(classes), where)
    return content, arrays


def _state(content: Mapping[str, Any]) -> str:
    # earlier versions chose nothing
    fitted = json.dumps([content[name] for name in _FITTED if name in content], sort_keys=True)
    return hashlib.sha256(fitted.encode()).hexdigest()


def base_name(folder: Path) -> Optional[str]:
    """The name of the language model that a saved classifier was fitted on; raises as [`read`]."""
    return read(folder)[0]["base_model"].get("name")


def fields_of_template(folder: Path) -> tuple[str, ...]:
    """The slots of a saved classifier's template; raises as [`read`]."""
    return Task(read(folder)[0]["params"]["template"], {"a": "a", "b": "b"}).fields


def base_of(folder: Path, base: Mapping[str, str], model: Any = None, tokenizer: Any = None) -> tuple[Any, Any]:
    """The model that a classifier was fitted on, and its tokenizer: those that are passed, or loaded by its name.

    A model that is passed may have other adapters, which warns.

    Raises:
        ValueError: If the model is another one, or there is none of that name.
    """
    if model is not None and not isinstance(model, nn.Module):
        return model, tokenizer
    if model is not None and tokenizer is None:
        raise ValueError("tokenizer is missing: pass the model's.")
    by_name = model is None
    if by_name:
        model, tokenizer = _load(folder, base.get("name"), tokenizer)
    fingerprint = base_fingerprint(model)
    if base and fingerprint != base["fingerprint"]:
        raise ValueError(
            f"{str(folder)!r} was fitted on {base['name']!r} (fingerprint {base['fingerprint']}), but "
            f"{'that is now another one' if by_name else f'model is {name_of(model)!r}'} (fingerprint {fingerprint}); pass "
            "the model it was fitted on, or fit it again."
        )
    others = other_adapters(model, base.get("adapters"))
    if others is not None:
        message = f"{str(folder)!r} was fitted on {base['name']!r}; {others}. Pass model= with that adapter, or fit it again."
        if by_name:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
    return model, tokenizer


def _load(folder: Path, name: Optional[str], tokenizer: Any) -> tuple[Any, Any]:
    if not name:
        raise ValueError(f"model is missing: {str(folder)!r} doesn't name the one that it was fitted on.")
    try:
        # a name of an adapter is that of a merged one
        return models.load(name, kind="auto", merge=True), tokenizer or models.load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model {name!r}, which {str(folder)!r} was fitted on, can't be loaded by its name; pass model and "
            "tokenizer."
        ) from error


def _plain(value: Any) -> Any:
    """numpy's numbers, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} can't be saved as JSON.")
