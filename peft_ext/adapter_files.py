# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The files of an adapter of ours as PEFT writes and reads them: what they hold, the digest, and errors that name the file.

PEFT opens the files itself. What it opens is looked at first, where it opens it; files of other tuners are left to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

import peft.config
import peft.peft_model
import peft.utils.save_and_load
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError

from peft_ext import saved_adapters
from peft_ext.file_formats import (
    FLOATS,
    SAVE_AGAIN,
    Field,
    JsonFormat,
    Tensor,
    check_tensors,
    list_of,
    mapping_of,
    number,
    one_of,
    text,
    truth,
    values_problem,
    whole,
)
from peft_ext.files import read_json
from peft_ext.quant.linear import PackedLinear
from peft_ext.registration import TUNERS, extend_class_method, extend_method
from peft_ext.tensor_files import check_digest, damaged, read_tensors, seal


# No weight or scale of a model comes near it, and a product with larger ones overflows.
LARGEST = 1e30
_NAMES = one_of(text(), list_of(text())).or_null()
_COMMON: dict[str, Field] = {
    "base_model_name_or_path": text().or_null(),
    "task_type": text().or_null(),
    "inference_mode": truth(),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": list_of(text()).or_null(),
    "layers_to_transform": one_of(whole(0), list_of(whole(0))).or_null(),
    "layers_pattern": _NAMES,
    "init_weights": truth(),
    "init_method": text(),
}
_SCALES: dict[str, Field] = {
    "bits": one_of(whole(1, 8), text("base")).or_null(),
    "group_size": whole(-1).or_null(),
    "bits_pattern": mapping_of(whole(1, 8)).or_null(),
    "bits_budget": number(2, 8).or_null(),
    "group_size_pattern": mapping_of(whole(-1)).or_null(),
    "embedding_bits": whole(4, 8).or_null(),
    "parametrization": text(),
    "fan_in_fan_out": truth(),
}


def _format(kind: str, always: tuple[str, ...], /, **fields: Field) -> JsonFormat:
    # a later version's fields are PEFT's to warn of, an earlier version's lack to be filled with defaults; not what every
    # version has written, and no tensor tells
    known = {name: each if name in always else each.or_missing() for name, each in {**_COMMON, **fields}.items()}
    return JsonFormat(CONFIG_NAME, {"peft_type": text(kind), **known})


# By `peft_type`.
CONFIGS: dict[str, JsonFormat] = {
    "PEQA": _format(
        "PEQA", (), **_SCALES, sym=truth().or_null(), zero=text().or_null(), trained=text(), keep_product=truth()
    ),
    "ALPHATUNING": _format("ALPHATUNING", (), **_SCALES, trained_alphas=text()),
    "BOTTLENECK": _format(
        "BOTTLENECK",
        ("non_linearity",),
        bottleneck_dim=whole(1, 1 << 16).or_null(),
        reduction_factor=whole(1).or_null(),
        placement=text(),
        non_linearity=text(),
    ),
}
_CODES = Tensor(("I64",), (1,), note="the fingerprint of the codes that the scales belong to")
_RANGE: dict[str, Any] = {"least": -LARGEST, "most": LARGEST}
# By `peft_type` the tensors of a layer, by what comes after the layer's name.
LAYERS: dict[str, dict[str, Tensor]] = {
    "PEQA": {
        "peqa_scale": Tensor(
            FLOATS, ("out", "groups"), **_RANGE, note="plain scales, whatever the parametrisation in training was"
        ),
        "peqa_codes": _CODES,
        "peqa_zero_point": Tensor(
            FLOATS, ("out", "groups"), optional=True, **_RANGE, note="zero points, where `trained` says that they are"
        ),
    },
    "ALPHATUNING": {
        "alphatuning_scale": Tensor(FLOATS, ("out", "groups", "trained alphas"), **_RANGE, note="plain alphas"),
        "alphatuning_codes": _CODES,
        "alphatuning_frozen": Tensor(
            FLOATS, (4,), optional=True, note="projections that identify the frozen alphas, where not all are trained"
        ),
    },
    "BOTTLENECK": {
        "bottleneck_down.weight": Tensor(FLOATS, ("width", "out"), **_RANGE),
        "bottleneck_down.bias": Tensor(FLOATS, ("width",), **_RANGE),
        "bottleneck_up.weight": Tensor(FLOATS, ("out", "width"), **_RANGE),
        "bottleneck_up.bias": Tensor(FLOATS, ("out",), **_RANGE),
    },
}


def read_adapter(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of an adapter file of ours, checked as far as they can be without a model.

    Raises:
        ValueError: Names the file, the tensor, what it is and what it must be.
    """
    tensors = read_tensors(path, device)
    kind = type_of(path.parent)
    if kind is not None:
        check_adapter(tensors, kind, repr(str(path)))
    return tensors


def fingerprints_in(folder: Path) -> dict[str, int]:
    """The fingerprints of the codes that an adapter of ours belongs to, by the layer's name in the base; none of others.

    Raises:
        ValueError: If its file is damaged.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if type_of(folder) not in CONFIGS or not path.is_file():
        return {}
    codes = {key.rpartition("."): tensor for key, tensor in read_adapter(path).items() if key.endswith("_codes")}
    return {name.removeprefix("base_model.model."): int(tensor) for (name, _, _), tensor in codes.items()}


def check_adapter(tensors: Mapping[str, torch.Tensor], kind: str, where: str) -> None:
    """Check the tensors of an adapter of ours: those of each layer are all there and are what they must be, and no number
    anywhere is NaN or infinite.

    Args:
        tensors: By name.
        kind: The `peft_type`.
        where: What has them, such as a file's name in quotes.

    Raises:
        ValueError: Names `where`, the tensor, what it is and what it must be.
    """
    described, layers = LAYERS[kind], dict[str, dict[str, torch.Tensor]]()
    for name, tensor in tensors.items():
        part = next((part for part in described if name.endswith(f".{part}")), None)
        if part is not None:
            layers.setdefault(name.removesuffix(part), {})[name] = tensor
            continue
        problem = values_problem(tensor)
        if problem:
            raise ValueError(f"{where}: {name} {problem}. {SAVE_AGAIN}")
    for layer, found in layers.items():
        check_tensors(found, {layer + part: each for part, each in described.items()}, where)


def type_of(folder: Path) -> Optional[str]:
    """The `peft_type` of the adapter in a folder if it is one of ours, else None."""
    config = folder / CONFIG_NAME
    if not config.is_file():
        return None
    found = read_json(config).get("peft_type")
    return found if found in TUNERS else None


def install() -> None:
    """Let PEFT write the digest and check what it reads; doing so again is harmless."""
    saved_adapters.listen("digest", _on_adapter_saved)
    extend_class_method(peft.config.PeftConfigMixin, "from_json_file", _json_checked)
    extend_class_method(peft.config.PeftConfigMixin, "_get_peft_type", _type_there)
    extend_method(peft.utils.save_and_load, "safe_load_file", _tensors_checked)
    extend_method(peft.utils.save_and_load, "torch_load", _pickle_refused)
    extend_method(peft.utils.save_and_load, "has_valid_embedding_base_layer", _not_packed)
    extend_method(peft.peft_model, "load_peft_weights", _weights_there)
    extend_method(peft.peft_model, "set_peft_model_state_dict", _all_there)


def _on_adapter_saved(model: Any, adapter_name: str, folder: Path) -> None:
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        seal(folder / SAFETENSORS_WEIGHTS_NAME)


def _not_packed(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT keeps the whole weight of an output head that is a target beside its adapter. A packed one is its base's, and stays
    as it is."""

    @functools.wraps(original)
    def has_valid_embedding_base_layer(layer: Any) -> bool:
        return original(layer) and not isinstance(layer.base_layer, PackedLinear)

    return has_valid_embedding_base_layer


def _json_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_json_file(cls: Any, path_json_file: Any, **kwargs: Any) -> Any:
        found = read_json(Path(path_json_file))
        kind = found.get("peft_type")
        if "peft_type" in found and (not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING):
            raise ValueError(
                f"{str(path_json_file)!r}: peft_type is {kind!r}, which this PEFT doesn't know; update peft, or save the "
                "adapter again."
            )
        if kind in CONFIGS:
            CONFIGS[kind].check(found, path_json_file)
        return original(cls, path_json_file, **kwargs)

    return from_json_file


def _type_there(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _get_peft_type(cls: Any, model_id: str, **hf_hub_download_kwargs: Any) -> Any:
        try:
            return original(cls, model_id, **hf_hub_download_kwargs)
        except KeyError as error:
            raise ValueError(
                f"{CONFIG_NAME} of {str(model_id)!r}: {error.args[0]} is missing. {SAVE_AGAIN}"
            ) from error

    return _get_peft_type


def _tensors_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def safe_load_file(filename: Any, device: Any = "cpu") -> Any:
        kind = type_of(Path(filename).parent)
        if kind is None:
            return original(filename, device=device)
        check_digest(filename)
        try:
            tensors = original(filename, device=device)
        except SafetensorError as error:
            raise ValueError(damaged(filename, error)) from error
        check_adapter(tensors, kind, repr(str(filename)))
        return tensors

    return safe_load_file


def check_there(folder: Path) -> None:
    """Refuse a folder of an adapter of ours without its tensors, which PEFT would look for on the hub.

    Raises:
        FileNotFoundError: Names the folder and the file.
    """
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if folder.is_dir() and type_of(folder) is not None and not any((folder / name).is_file() for name in names):
        raise FileNotFoundError(
            f"{str(folder)!r} has no {SAFETENSORS_WEIGHTS_NAME}, as save_pretrained writes it; copy or save the adapter again."
        )


def _weights_there(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_peft_weights(model_id: Any, *args: Any, **kwargs: Any) -> Any:
        check_there(Path(model_id, kwargs.get("subfolder") or ""))
        return original(model_id, *args, **kwargs)

    return load_peft_weights


def _pickle_refused(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def torch_load(filename: Any, *args: Any, **kwargs: Any) -> Any:
        kind = type_of(Path(filename).parent)
        if kind is not None:
            raise ValueError(
                f"{str(filename)!r} is a pickle, and adapters of {kind} are taken from {SAFETENSORS_WEIGHTS_NAME} alone; save "
                "the adapter again (save_pretrained writes safetensors unless safe_serialization=False)."
            )
        return original(filename, *args, **kwargs)

    return torch_load


def _all_there(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        try:
            return original(model, peft_model_state_dict, adapter_name, *args, **kwargs)
        except KeyError as error:
            config = model.peft_config[adapter_name]
            if getattr(config.peft_type, "value", config.peft_type) not in TUNERS:
                raise
            raise ValueError(
                f"adapter {adapter_name!r}: the file has no {error.args[0]}, a tensor of a module that is trained in full "
                f"(modules_to_save={config.modules_to_save}). {SAVE_AGAIN}"
            ) from error

    return set_peft_model_state_dict
