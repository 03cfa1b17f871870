# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`save_pretrained` of packed models, models of ours and adapters on them: transformers and PEFT write their files into a
folder one by one; here they write them beside it, and the whole takes its place.

Files of others in the folder stay. What belonged to an older save, such as its shards, goes with it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from peft_ext.files import check_digests, digests, read_json, written_whole
from peft_ext.model_card import README
from peft_ext.quant.conversion import packed_layers


_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_ADAPTER = re.compile(r"adapter_(model|config)(-\d+-of-\d+)?\.(safetensors|bin|json)(\.index\.json)?")
_OTHERS = frozenset(("quantize_config.json", "quant_config.json"))  # of GPTQ and AWQ, about weights that are replaced
_FILES = "files"  # the key in config.json under which a model of ours keeps the digests of its weights


@contextmanager
def model_saved_whole(
    model: PreTrainedModel, save_directory: Any, is_main_process: bool, options: Any
) -> Iterator[Any]:
    """The folder that transformers' `save_pretrained` of a model is to write to.

    Args:
        model: Packed ones, those of ours and those with an attribute `saved_whole` are written whole; of all others the
            folder is returned as it is.
        save_directory: What the user passed.
        is_main_process: Of the process.
        options: Further arguments of `save_pretrained`.
    """
    ours = hasattr(model, "model_card")
    if (
        not (ours or getattr(model, "saved_whole", False) or packed_layers(model))
        or getattr(model, "_hf_peft_config_loaded", False)
        or options.get("distributed_checkpoint")
        or os.path.isfile(save_directory)
        or not model.should_save_on_this_rank(is_main_process)
    ):
        yield save_directory
        return
    stale = (lambda name: False) if options.get("variant") else _stale_weights
    with _whole(Path(save_directory), stale) as folder:
        yield folder
        if ours:
            _seal(folder)


def check_saved(folder: Any) -> None:
    """Refuse a folder of a model of ours whose weights aren't those that were saved with its config.

    Raises:
        ValueError: Names the file.
    """
    path = Path(folder) / CONFIG_NAME
    if path.is_file():
        config = read_json(path, "copy or save the folder again")
        check_digests(Path(folder), config.get(_FILES), CONFIG_NAME)


def on_adapter_saving(is_ours: Callable[[PeftModel], bool]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrapper of `PeftModel.save_pretrained` that writes adapters whole.

    Args:
        is_ours: Of a model, whether its adapters are ours, or on packed layers; all others are saved as ever.
    """

    def extended(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def save_pretrained(self: PeftModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            main = args[3] if len(args) > 3 else kwargs.get("is_main_process", True)
            if not main or os.path.isfile(save_directory) or not is_ours(self):
                return original(self, save_directory, *args, **kwargs)
            selected = args[1] if len(args) > 1 else kwargs.get("selected_adapters")
            folders = {"" if name == "default" else f"{name}/" for name in selected or self.peft_config}
            with _whole(Path(save_directory), lambda name: _is_adapters(name, folders)) as folder:
                return original(self, str(folder), *args, **kwargs)

        return save_pretrained

    return extended


@contextmanager
def _whole(target: Path, stale: Callable[[str], bool]) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target, keep=True, stale=stale) as folder:
        folder.mkdir()
        # cards take over what a user has written into them
        for card in (*target.glob(README), *target.glob(f"*/{README}")):
            copied = folder / card.relative_to(target)
            copied.parent.mkdir(exist_ok=True)
            shutil.copy(card, copied)
        yield folder


def _seal(folder: Path) -> None:
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config[_FILES] = digests(folder, sorted(each.name for each in folder.glob("*.safetensors")))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stale_weights(name: str) -> bool:
    return bool(_WEIGHTS.fullmatch(name)) or name in _OTHERS


def _is_adapters(name: str, folders: set[str]) -> bool:
    folder, slash, file = name.rpartition("/")
    return folder + slash in folders and bool(_ADAPTER.fullmatch(file))
