# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`load_packed`: whatever was packed, by whomever, into packed layers without a float weight.

transformers' own quantizers are left alone. While a checkpoint of somebody else's is loaded, its config names a quantizer
of ours instead (`packed-gptq`, `packed-awq`, `packed-compressed-tensors`), which the registry has beside them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Optional

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from peft_ext.checkpoint import awq, bcq, gguf_loading, gptq, pack_quantized_loading
from peft_ext.checkpoint.files import check_config
from peft_ext.checkpoint.gguf_header import read_header
from peft_ext.checkpoint.pack_quantized import OWN_BITS


# Of `from_pretrained`, what finds the files.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_READABLE = "compressed-tensors (pack-quantized integers), GPTQ, AWQ (gemm), AutoRound, GGUF or bcq"


def load_packed(
    pretrained_model_name_or_path: Any, auto_class: Any = AutoModelForCausalLM, **kwargs: Any
) -> PreTrainedModel:
    """Load a packed checkpoint, ours or another's, into packed layers; no float weight of them is made.

    `get_peft_model(model, PeqaConfig(...))` goes onto the model, and LoRA; `save_pretrained` of it writes a checkpoint of
    ours. `docs/loading.md` says what of whom is read.

    Args:
        pretrained_model_name_or_path: A folder, or a model id of the hub, with safetensors files; or a `.gguf` file (of a
            folder or the hub: `gguf_file=`, as `from_pretrained` has it).
        auto_class: The class whose `from_pretrained` loads it.
        **kwargs: Passed to `from_pretrained`; also what changes the config, such as `num_labels`.

    Raises:
        ValueError: If nothing in it is packed, its format or version is unknown, or a layer can't be taken over (inputs
            ordered by activation, groups of unequal sizes, damaged tensors); names the layer.
        OSError: If it can't be found.
    """
    if kwargs.get("quantization_config") is not None:
        raise ValueError(
            "quantization_config is the checkpoint's own in load_packed; leave it out, or use from_pretrained."
        )
    folder, kwargs = _named_gguf(pretrained_model_name_or_path, kwargs)
    config, rest = _config(folder, kwargs)
    if rest.get("gguf_file") is not None:
        quantization = gguf_loading.PackedGgufConfig()
        model = auto_class.from_pretrained(folder, config=config, quantization_config=quantization, **rest)
        if folder != pretrained_model_name_or_path:  # an adapter's file names its base by what the user called it
            model.name_or_path = model.config._name_or_path = str(pretrained_model_name_or_path)
        return model
    stored = _stored(config, pretrained_model_name_or_path, rest)
    method = stored.get("quant_method")
    if method == bcq.QUANT_METHOD or hasattr(config, OWN_BITS):
        return auto_class.from_pretrained(pretrained_model_name_or_path, config=config, **rest)
    if not stored:
        raise ValueError(
            f"{str(pretrained_model_name_or_path)!r} is not packed: neither its config.json nor a {gptq.QUANTIZE_CONFIG} has "
            "a quantization. Load it with from_pretrained, then quantise it (peft-ext quantize, or get_peft_model)."
        )
    if not isinstance(method, str) or method not in _READERS:
        raise ValueError(
            f"{str(pretrained_model_name_or_path)!r} is packed as {method!r}, which can't be read into packed layers; "
            f"{_READABLE} can. Load it with from_pretrained, or start from the float model."
        )
    _take_over(config, _READERS[method](stored))
    return auto_class.from_pretrained(pretrained_model_name_or_path, config=config, **rest)


load_gptq = load_packed  # its name while it read GPTQ alone


def stored_quantization(pretrained_model_name_or_path: Any, **kwargs: Any) -> Optional[dict[str, Any]]:
    """The quantization config of a checkpoint that somebody else has packed and [`load_packed`] reads; None for others.

    Args:
        **kwargs: Of `from_pretrained`; what finds the files is used.
    """
    folder, kwargs = _named_gguf(pretrained_model_name_or_path, kwargs)
    if folder != pretrained_model_name_or_path:
        found = gguf_loading.readable(read_header(Path(folder, kwargs["gguf_file"])))
        return {"quant_method": "gguf", "types": found} if found else None
    config, rest = _config(pretrained_model_name_or_path, kwargs)
    stored = _stored(config, pretrained_model_name_or_path, rest)
    if hasattr(config, OWN_BITS) or stored.get("quant_method") not in _READERS:
        return None
    if stored["quant_method"] == "compressed-tensors" and not pack_quantized_loading.has_packed_integers(stored):
        return None
    return stored


def _named_gguf(name: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A `.gguf` file's folder, with its name among the keyword arguments, as transformers wants it; others as they are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is one part of several.
    """
    path = Path(name).expanduser() if isinstance(name, (str, PathLike)) else None
    if path is None or path.suffix.lower() != ".gguf" or kwargs.get("gguf_file") is not None:
        return name, kwargs
    if not path.is_file():
        raise FileNotFoundError(f"{str(name)!r}: there is no such GGUF file.")
    read_header(path)  # a damaged one is refused before transformers makes something of it
    return str(path.parent), {**kwargs, "gguf_file": path.name}


def _config(name: Any, kwargs: dict[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    """A checkpoint's config with the changes that keyword arguments ask for, and what is left of these for the model."""
    kwargs = dict(kwargs)
    if isinstance(name, (str, PathLike)) and Path(name, "config.json").is_file():
        check_config(Path(name, "config.json"))
    given = kwargs.pop("config", None)
    if isinstance(given, PretrainedConfig):
        return copy.deepcopy(given), kwargs
    # for the model alone, as in AutoModel.from_pretrained; a config would keep "auto" as if it were a type
    held_back = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype", "quantization_config") if key in kwargs}
    finding = {key: kwargs[key] for key in (*HUB_ARGUMENTS, "trust_remote_code", "gguf_file") if key in kwargs}
    config, rest = AutoConfig.from_pretrained(name if given is None else given, return_unused_kwargs=True, **kwargs)
    return config, {**finding, **rest, **held_back}


def _stored(config: PretrainedConfig, name: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The quantization that a config or AutoGPTQ's file beside it states; empty if none."""
    for holder in (config, config.get_text_config(decoder=True)):
        found = getattr(holder, "quantization_config", None)
        if found is not None:
            return dict(found) if isinstance(found, dict) else found.to_dict()
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    path = cached_file(name, gptq.QUANTIZE_CONFIG, _raise_exceptions_for_missing_entries=False, **hub)
    return gptq.read_quantize_config(path)


def _take_over(config: PretrainedConfig, quantization: dict[str, Any]) -> None:
    text = config.get_text_config(decoder=True)
    if text is not config and getattr(text, "quantization_config", None) is not None:
        del text.quantization_config  # kept there by some models of several parts
    config.quantization_config = quantization


def _gptq(stored: dict[str, Any]) -> dict[str, Any]:
    return gptq.PackedGptqConfig(**{**stored, "quant_method": gptq.QUANT_METHOD}).to_dict()


def _awq(stored: dict[str, Any]) -> dict[str, Any]:
    return awq.PackedAwqConfig(**{**stored, "quant_method": awq.QUANT_METHOD}).to_dict()


def _auto_round(stored: dict[str, Any]) -> dict[str, Any]:
    """AutoRound packs as GPTQ's version 1 or 2 or as AWQ, and says what differs by layer in `extra_config`."""
    packing = str(stored.get("packing_format") or stored.get("backend") or "auto_round:auto_gptq")
    if not str(stored.get("data_type") or "int").startswith("int") or (stored.get("act_bits") or 16) < 16:
        raise ValueError(
            f"data_type={stored.get('data_type')!r} with act_bits={stored.get('act_bits')!r} of AutoRound can't be read into "
            "packed layers, which hold integers and leave activations alone; use a checkpoint of another scheme (W4A16)."
        )
    kept: dict[str, Any] = {name: stored[name] for name in ("bits", "group_size", "sym", "meta") if name in stored}
    if "awq" in packing:
        return _awq({**kept, "zero_point": not stored.get("sym", True)})
    if packing.partition(":")[2].partition(":")[0] not in _AUTO_ROUND_VERSIONS:
        raise ValueError(
            f"packing_format={packing!r} of AutoRound is a layout that is unknown here; {tuple(_AUTO_ROUND_VERSIONS)} and "
            "'auto_awq' after 'auto_round:' can be read. Export the model as 'auto_round:auto_gptq'."
        )
    version = _AUTO_ROUND_VERSIONS[packing.partition(":")[2].partition(":")[0]]
    # names are patterns there, too, and may just as well be names
    dynamic = {f"{name}$": settings for name, settings in (stored.get("extra_config") or {}).items()}
    return _gptq({**kept, "checkpoint_format": version, "dynamic": dynamic})


def _compressed_tensors(stored: dict[str, Any]) -> dict[str, Any]:
    if not pack_quantized_loading.has_packed_integers(stored):
        raise ValueError(
            f"the checkpoint's format is {stored.get('format')!r}, and none of its config_groups packs integers without "
            "quantising activations, which is what packed layers hold. Load it with from_pretrained, or start from the float "
            "model."
        )
    if (stored.get("transform_config") or {}).get("config_groups"):
        raise ValueError(
            "the checkpoint rotates weights and activations while it runs (transform_config), which packed layers don't. Use "
            "a checkpoint without transforms (SpinQuant, QuIP), or start from the float model."
        )
    if stored.get("kv_cache_scheme"):
        warnings.warn(
            "kv_cache_scheme of the checkpoint's config.json, which serving engines quantise keys and values by, isn't kept: "
            "a checkpoint that is saved from this model has none.",
            stacklevel=3,
        )
    return {**stored, "quant_method": pack_quantized_loading.QUANT_METHOD}


# What AutoRound calls GPTQ's versions; version 1 stores a zero point less one.
_AUTO_ROUND_VERSIONS = {
    **dict.fromkeys(("auto_gptq", "gptq"), "gptq"),
    **dict.fromkeys(("", "gptqmodel", "exllamav2", "tritonv2", "triton"), "gptq_v2"),
}
# By quant_method: the config under our own name that a stored one becomes.
_READERS: dict[Optional[str], Callable[[dict[str, Any]], dict[str, Any]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,  # as its first releases called it
    "compressed-tensors": _compressed_tensors,
}
