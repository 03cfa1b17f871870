# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Models' files, which transformers writes and reads: a digest is given when a model of ours is saved, and compared before one
is loaded; an index of shards names files of its folder alone.

Files without a digest, and models that aren't ours, are left to transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
from transformers import PreTrainedConfig, PreTrainedModel

from peft_ext.checkpoint.files import read_index, seal_index
from peft_ext.file_formats import SAVE_AGAIN, values_problem
from peft_ext.registration import extend_class_method, extend_method, extend_static_method
from peft_ext.tensor_files import PLACEHOLDER, carries_digest, check_digest, read_header, seal
from peft_ext.whole_saves import check_saved


# Set on a model, or its class, that is written whole and whose files get a digest, though nothing of it is packed.
SEALED = "saved_whole"


class OwnFiles:
    """Mixin of our models: what `from_pretrained` reads must have every tensor, nothing else, and finite numbers."""

    saved_whole = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own.

        Raises:
            ValueError: If the weights in the folder aren't those that were saved with its config; if the files lack a
                tensor, have one that the model doesn't, or numbers that aren't finite; names both.
        """
        check_saved(pretrained_model_name_or_path)
        asked = kwargs.pop("output_loading_info", False)
        parent: Any = super()
        where = repr(str(pretrained_model_name_or_path))
        try:
            model, info = parent.from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except (AttributeError, KeyError, RuntimeError, TypeError, ZeroDivisionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            others = " or the arguments" if args or kwargs.keys() - {"config"} else ""
            raise ValueError(
                f"{where}: its config.json{others} can't make a {cls.__name__} ({error}). {SAVE_AGAIN}"
            ) from error
        # packed layers are their quantizer's, which has looked at them
        for key, said in (("missing_keys", "is missing"), ("unexpected_keys", "belongs to nothing there")):
            names = sorted(info[key]) if getattr(model, "hf_quantizer", None) is None else []
            if names:
                raise ValueError(
                    f"{where}: by its config.json, {names[0]} {said} ({len(names)} such tensors). {SAVE_AGAIN}"
                )
        for name, tensor in model.state_dict().items():
            problem = values_problem(tensor) if tensor.device.type != "meta" else None
            if problem:
                raise ValueError(f"{where}: {name} {problem}. {SAVE_AGAIN}")
        return (model, info) if asked else model


def seal_saved(model: Any, folder: Path) -> None:
    """Give the files that `save_pretrained` has just written their digest, if the model is one of ours."""
    packed = _is_ours(getattr(model, "hf_quantizer", None))
    if not isinstance(model, PreTrainedModel) or not (packed or getattr(model, SEALED, False)):
        return
    for file in folder.glob("*.safetensors"):
        digest = read_header(file).metadata
        if digest.items() >= PLACEHOLDER.items() or (not packed and not digest.keys() & PLACEHOLDER.keys()):
            seal(file)
    for index in folder.glob("*.safetensors.index.json"):
        seal_index(index)


def install() -> None:
    """Let transformers look at files before it loads them; doing so again is harmless."""
    extend_method(transformers.modeling_utils, "get_checkpoint_shard_files", _index_checked)
    extend_class_method(PreTrainedConfig, "_dict_from_json_file", _config_checked)
    extend_static_method(PreTrainedModel, "_load_pretrained_model", _files_checked)


def _index_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_checkpoint_shard_files(name: Any, index_filename: Any, *args: Any, **kwargs: Any) -> Any:
        index = Path(index_filename)
        if index.name.endswith(".safetensors.index.json") and index.is_file():
            read_index(index)
        return original(name, index_filename, *args, **kwargs)

    return get_checkpoint_shard_files


def _config_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _dict_from_json_file(cls: Any, json_file: Any) -> Any:
        try:
            found = original(cls, json_file)
        except RecursionError:
            raise OSError(
                f"{str(json_file)!r} is nested too deeply to be a config; download or save it again."
            ) from None
        if not isinstance(found, dict):
            raise OSError(f"{str(json_file)!r} holds no object, as a config does; download or save it again.")
        if not isinstance(found.get("quantization_config") or {}, dict):
            raise ValueError(f"{str(json_file)!r}: quantization_config must be an object; download or save it again.")
        if found.keys() & _OWN_KEYS or found.get("model_type") in _OWN_TYPES:
            _check_depth(found, json_file)
        return found

    return _dict_from_json_file


# What tells configs of packed models and of models of ours from those that are transformers' alone.
_OWN_KEYS, _OWN_TYPES = {"quantization_config", "packed_bits", "granularity"}, ("cdnpg", "critic")
_LAYERS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"}
_MOST_LAYERS = 10_000


def _check_depth(config: dict[str, Any], file: Any) -> None:
    """Refuse layers beyond counting: transformers would make them until the memory is full."""
    for name in config.keys() & _LAYERS:
        if isinstance(config[name], (int, float)) and config[name] > _MOST_LAYERS:
            raise ValueError(
                f"{str(file)!r}: {name} is {config[name]:.6g}; no model has more than {_MOST_LAYERS} layers. {SAVE_AGAIN}"
            )


def _files_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for file in checkpoint_files or ():
            if str(file).endswith(".safetensors"):
                check_digest(file)
                quantizer = load_config.hf_quantizer
                if quantizer is None:
                    _refuse_packed(file)
                ours = getattr(model, SEALED, False) if quantizer is None else _is_ours(quantizer)
                if ours and not load_config.ignore_mismatched_sizes and load_config.device_mesh is None:
                    _check_types(model, file)
        return original(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    return _load_pretrained_model


def _is_ours(quantizer: Any) -> bool:
    return type(quantizer).__module__.startswith("peft_ext.")


def _check_types(model: Any, file: Any) -> None:
    """Refuse integers where a model of ours has floats, which transformers would convert, and other shapes."""
    own = model.state_dict()
    for name, header in read_header(file).tensors.items():
        # a packed layer's tensors are its quantizer's
        if name not in own or not name.endswith((".weight", ".bias")) and not getattr(model, SEALED, False):
            continue
        if own[name].is_floating_point() and not header["dtype"].startswith(("F", "BF")):
            raise ValueError(f"{str(file)!r}: {name} is {header['dtype']}; it must be a float. {SAVE_AGAIN}")
        if header["shape"] != list(own[name].shape):
            raise ValueError(
                f"{str(file)!r}: {name} has the shape {header['shape']}; by config.json it must be {list(own[name].shape)}. "
                f"{SAVE_AGAIN}"
            )


def _refuse_packed(file: Any) -> None:
    """Refuse packed layers that are about to be passed over, and floats made up in their place."""
    endings = (".planes", ".weight_packed") if carries_digest(file) else (".planes",)
    codes = [name for name, each in read_header(file).tensors.items() if name.endswith(endings) and each["shape"]]
    if codes:
        raise ValueError(
            f"{str(file)!r} holds packed layers ({codes[0]!r}; {len(codes)} in all), but the config.json beside it has no "
            "quantization_config that reads them; one of the two was changed. Download or save both again."
        )
