# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What is in a checkpoint or an adapter, ours or another's: read off configs and file headers, no weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from peft import PeftConfig

from peft_ext.checkpoint.awq import BITS, ORDER
from peft_ext.checkpoint.bcq import BcqConfig, stored_format
from peft_ext.checkpoint.files import TensorHeader, read_headers, read_json, read_tensor, stored_layers, weight_files
from peft_ext.checkpoint.gptq import QUANTIZE_CONFIG, read_quantize_config
from peft_ext.checkpoint.pack_quantized import OWN_BITS, own_bits_of
from peft_ext.quant.formats import group_size_of


@dataclass
class LayerContents:
    """A packed layer, or what an adapter has for one.

    Args:
        name: Its name in the files.
        number_format: `"uniform integers"`, perhaps `"... with float zero points"`, `"binary coding"`, or a GGUF's block type.
        bits: Width of a code; None where blocks mix widths.
        group_size: Inputs that share a scale; -1: all of an output channel.
        shape: `[out, in]`; of an adapter the shape of its scales, `[out, groups]` or `[out, groups, trained alphas]`.
        nbytes: Bytes of all its tensors.
        fingerprint: Of an adapter: the codes that it belongs to, see `PackedLinear.fingerprint`.
    """

    name: str
    number_format: str
    bits: Optional[int]
    group_size: int
    shape: tuple[int, ...]
    nbytes: int
    fingerprint: Optional[int] = None


@dataclass
class Contents:
    """What a folder or file holds.

    Args:
        path: The folder or file.
        kind: `"checkpoint"` or `"adapter"`.
        format: Such as `"compressed-tensors"`, `"bcq"`, `"gptq"`, `"gguf"`, `"PEQA"`, `"float"`.
        format_version: What the files say about their layout, or what wrote them; None if nothing.
        base_model: What it was made from, or goes onto.
        architecture: The model's class.
        layers: The packed layers, or those that an adapter tunes.
        nbytes: Bytes of all tensors.
    """

    path: str
    kind: str
    format: str
    format_version: Optional[str]
    base_model: Optional[str]
    architecture: Optional[str]
    nbytes: int
    layers: list[LayerContents] = field(default_factory=list)


def read_contents(path: Path) -> Contents:
    """What is in a checkpoint's or adapter's folder, or in a GGUF.

    Raises:
        FileNotFoundError: If there is nothing, or a file is missing.
        ValueError: If a file is damaged, a format's version unknown, or tensors don't belong together; names it.
        ImportError: If a GGUF needs the `gguf` package.
    """
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{str(path)!r}: there is no such GGUF file.")
        return _gguf(path)
    if (path / "adapter_config.json").is_file():
        return _adapter(path)
    if (path / "config.json").is_file():
        return _checkpoint(path)
    raise FileNotFoundError(
        f"{str(path)!r} is no checkpoint, adapter or GGUF: it has neither config.json nor adapter_config.json."
    )


def _checkpoint(path: Path) -> Contents:
    config = read_json(path / "config.json")
    stored = config.get("quantization_config") or read_quantize_config(path / QUANTIZE_CONFIG)
    headers = read_headers(weight_files(path))
    method = stored.get("quant_method") or "float"
    layers = []
    if method in _READERS:
        tensor, reader = _READERS[method]
        for name in stored_layers(headers, tensor):
            layers.append(LayerContents(name, *reader(headers, name, stored, config), _nbytes(headers, name)))
    version = stored.get("format_version") or stored.get("checkpoint_format") or stored.get("version")
    return Contents(
        path=str(path),
        kind="checkpoint",
        format=method,
        format_version=None if version is None else str(version),
        base_model=config.get("_name_or_path"),
        architecture=next(iter(config.get("architectures") or []), None),
        nbytes=sum(header.nbytes for header in headers.values()),
        layers=layers,
    )


# Number format, bits, group size and shape of a layer, as in [`LayerContents`].
_Layout = tuple[str, int, int, tuple[int, ...]]


def _pack_quantized(
    headers: dict[str, TensorHeader], name: str, stored: dict[str, Any], config: dict[str, Any]
) -> _Layout:
    header, scale = _required(headers, name, "weight_shape"), _required(headers, name, "weight_scale")
    out_features, in_features = read_tensor(header, f"{name}.weight_shape").tolist()  # two numbers that no header has
    groups = list((stored.get("config_groups") or {}).values())
    if len(groups) == 1:
        bits = groups[0]["weights"]["num_bits"]
    else:
        bits = headers[f"{name}.weight_packed"].shape[-1] * 32 // in_features
    own_bits = own_bits_of(config.get(OWN_BITS)).get(name, bits)
    group_size = group_size_of(in_features, scale.shape[-1] if len(scale.shape) > 1 else 1)
    return "uniform integers", own_bits, group_size, (out_features, in_features)


def _bcq(headers: dict[str, TensorHeader], name: str, stored: dict[str, Any], config: dict[str, Any]) -> _Layout:
    number_format = stored_format(headers, name)
    # planes are padded to whole bytes of inputs; the config knows the group size
    group_size = BcqConfig(**stored).format_of(name).group_size
    groups = headers[f"{name}.scale"].shape[1]
    in_features = 8 * headers[f"{name}.planes"].shape[1] if groups == 1 else groups * group_size
    shape = (headers[f"{name}.scale"].shape[0], in_features)
    return number_format.title, number_format.bits, group_size_of(in_features, groups), shape


def _gptq(headers: dict[str, TensorHeader], name: str, stored: dict[str, Any], config: dict[str, Any]) -> _Layout:
    (rows, out_features), scales = headers[f"{name}.qweight"].shape, _required(headers, name, "scales")
    order = headers.get(f"{name}.g_idx")
    in_features = rows * 32 // stored["bits"] if order is None else order.shape[0]
    group_size = group_size_of(in_features, scales.shape[0])
    return "uniform integers", rows * 32 // in_features, group_size, (out_features, in_features)


def _awq(headers: dict[str, TensorHeader], name: str, stored: dict[str, Any], config: dict[str, Any]) -> _Layout:
    in_features, words = headers[f"{name}.qweight"].shape
    groups = _required(headers, name, "scales").shape[0]
    return "uniform integers", BITS, group_size_of(in_features, groups), (words * len(ORDER), in_features)


def _auto_round(
    headers: dict[str, TensorHeader], name: str, stored: dict[str, Any], config: dict[str, Any]
) -> _Layout:
    reader = _awq if "awq" in str(stored.get("packing_format")) else _gptq
    return reader(headers, name, stored, config)


_Reader = Callable[[dict[str, TensorHeader], str, dict[str, Any], dict[str, Any]], _Layout]
# By quant_method: the tensor that every packed layer has, and what reads the layer off the headers.
_READERS: dict[str, tuple[str, _Reader]] = {
    "compressed-tensors": ("weight_packed", _pack_quantized),
    "bcq": ("planes", _bcq),
    "gptq": ("qweight", _gptq),
    "awq": ("qweight", _awq),
    "auto-round": ("qweight", _auto_round),
}


def _adapter(path: Path) -> Contents:
    config: Any = PeftConfig.from_pretrained(str(path))
    headers = read_headers(weight_files(path))
    kind = config.peft_type.value
    prefix = f"{kind.lower()}_"
    layers = []
    for name in stored_layers(headers, f"{prefix}codes"):
        scale = _required(headers, name, f"{prefix}scale")
        number_format = config.format_of(name)
        layers.append(
            LayerContents(
                name=name.removeprefix("base_model.model."),
                number_format=number_format.title,
                bits=number_format.bits,
                group_size=-1 if scale.shape[1] == 1 else number_format.group_size,
                shape=scale.shape,
                nbytes=_nbytes(headers, name),
                fingerprint=int(read_tensor(headers[f"{name}.{prefix}codes"], f"{name}.{prefix}codes")),
            )
        )
    version = getattr(config, "peft_version", None)
    return Contents(
        path=str(path),
        kind="adapter",
        format=kind,
        format_version=None if version is None else f"PEFT {version}",
        base_model=config.base_model_name_or_path,
        architecture=None,
        nbytes=sum(header.nbytes for header in headers.values()),
        layers=layers,
    )


def _gguf(path: Path) -> Contents:
    try:
        from gguf import GGML_QUANT_SIZES, GGUFReader
    except ImportError as error:
        raise ImportError("reading a GGUF needs: pip install gguf") from error
    try:
        reader = GGUFReader(path)
        fields = {key: part.contents() for key, part in reader.fields.items() if not key.startswith("tokenizer.")}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{str(path)!r} is truncated or no GGUF ({error}); download or save it again.") from error
    layers = [
        LayerContents(
            name=tensor.name,
            number_format=tensor.tensor_type.name,
            bits=None,
            group_size=GGML_QUANT_SIZES[tensor.tensor_type][0],
            shape=tuple(reversed(tensor.shape.tolist())),
            nbytes=tensor.n_bytes,
        )
        for tensor in reader.tensors
        if GGML_QUANT_SIZES[tensor.tensor_type][0] > 1
    ]
    return Contents(
        path=str(path),
        kind="checkpoint",
        format="gguf",
        format_version=str(fields.get("GGUF.version")),
        base_model=fields.get("general.name"),
        architecture=fields.get("general.architecture"),
        nbytes=sum(tensor.n_bytes for tensor in reader.tensors),
        layers=layers,
    )


def _required(headers: dict[str, TensorHeader], name: str, tensor: str) -> TensorHeader:
    header = headers.get(f"{name}.{tensor}")
    if header is None:
        raise ValueError(f"layer {name!r}: the files have no {tensor}; download or save them again.")
    return header


def _nbytes(headers: dict[str, TensorHeader], name: str) -> int:
    return sum(header.nbytes for key, header in headers.items() if key.rpartition(".")[0] == name)
