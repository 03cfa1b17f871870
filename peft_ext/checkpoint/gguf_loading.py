# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""GGUF files straight into packed layers: codes as llama.cpp's file has them, and no float weight of these layers.

transformers knows the files' families: what llama.cpp calls their tensors, and how it orders and changes their values. None of
that is repeated here. Whether a weight's blocks can be taken as they are is found by asking: numbers that say where they
stand go through transformers' own conversion of the tensor, and where whole rows come out in another order (Llama's
queries and keys), the codes are put into that order; where anything else happens, the weight becomes floats, as stock
transformers makes them, which a warning says.

Both of transformers' ways are followed: the conversion mapping of newer families, and the tensor processors of all others. The
way in is [`peft_ext.load_packed`]; plain `from_pretrained(..., gguf_file=...)` does what it always did.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import nn
from transformers import GgufConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from peft_ext.checkpoint.files import without_merging
from peft_ext.checkpoint.gguf_blocks import READ_TYPES, from_blocks
from peft_ext.checkpoint.gguf_header import GgufHeader, GgufTensor, read_header
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.checkpoint.soundness import check_numbers
from peft_ext.checkpoint.stored_layer import StoredLayer, pack_stored_layers
from peft_ext.checkpoint.tied_weights import untie
from peft_ext.quant.conversion import LINEAR_LAYERS, weight_of
from peft_ext.quant.experts import (
    fused_experts,
    layout_of,
    names_for,
    projection_names,
    unfuse_experts,
)
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.replaceable import acts_linearly
from peft_ext.quant.uniform import Quantized, dequantize
from peft_ext.sharding import refuse_distributed_loading


FLOATS = ("F32", "F16", "BF16")
# Tensors that hold a block's experts one after the other, and which of their layers it is.
_EXPERTS = re.compile(r"\.ffn_(gate|up|down)_exps\.weight$")
# Columns of the numbers that are sent through a conversion, so that it costs nothing; some ask for the weight's own width.
_FEW_COLUMNS = 3

# An array of a tensor's shape (or fewer columns) to what it becomes, by the model's names.
Conversion = Callable[[np.ndarray], dict[str, np.ndarray]]


def readable(header: GgufHeader) -> dict[str, int]:
    """How many matrices of a file's blocks are of types that become packed layers, by type."""
    kinds = (tensor.type.name for name, tensor in header.tensors.items() if name.startswith("blk."))
    return dict(Counter(kind for kind in kinds if kind in READ_TYPES))


class PackedGgufConfig(GgufConfig):
    """Says to `from_pretrained(..., gguf_file=...)` that weights are to become packed layers; [`load_packed`] makes it."""

    def __init__(self, gguf_file: Optional[str] = None, **kwargs: Any) -> None:
        super().__init__(gguf_file=gguf_file, dequantize=True)  # of what isn't packed


class Place(NamedTuple):
    """Where a layer's blocks lie.

    Args:
        tensor: The tensor.
        expert: Which part of it, where it holds all experts' weights.
        rows: int64 `[out]`, the file's row of each of the layer's; None: as they are.
    """

    tensor: GgufTensor
    expert: Optional[int] = None
    rows: Optional[np.ndarray] = None


class PackedGgufHfQuantizer(GgufHfQuantizer):
    """transformers' own, which packs what it can where [`PackedGgufConfig`] asks for it."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.packs = isinstance(quantization_config, PackedGgufConfig)
        self.names: dict[str, str] = {}
        self.taken: set[str] = set()

    def read_header(self, gguf_file: str) -> None:
        """Parse the file's header, once `from_pretrained` knows where the file is."""
        if self.packs:
            self.own_header = read_header(Path(gguf_file))
        super().read_header(gguf_file)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.packs:
            refuse_distributed_loading(model)
        super()._process_model_before_weight_loading(model, **kwargs)
        if self.packs:
            self.device_map = kwargs.get("device_map")
            with torch.device("cpu"):  # the model is being built under the meta device
                self._make_room(model)

    def _make_room(self, model: PreTrainedModel) -> None:
        """Put what knows its blocks in the place of every layer that has any that can be read as they are."""
        conversions = self._conversions(model)
        there = [self.names[name] for name in self.own_header.tensors if name in self.names]
        _check_complete(model, self.own_header.path, there)
        places = _places(model, self.own_header, conversions, self.names)
        if not places:
            raise ValueError(_nothing(self.own_header))
        experts = {name.rpartition(".")[0].rpartition(".")[0] for name, at in places.items() if at.expert is not None}
        if experts:
            unfuse_experts(model, lambda name: name.rpartition(".")[0].rpartition(".")[0] in experts)
        untie(model, places)
        for name, place in places.items():
            model.set_submodule(name, _Blocks(self.own_header, place, model.get_submodule(name)))
        self.taken = {place.tensor.name for place in places.values()}
        _warn_of_floats(self.own_header, self.taken, self.names, model)

    def _conversions(self, model: PreTrainedModel) -> dict[str, Conversion]:
        """What becomes of each tensor of the file that the model has a place for; fills `names` as well."""
        if self.supported:
            found = {name: _mapped(name, self.mapping) for name in self.own_header.tensors}
            self.names = {name: target for name, (target, _) in found.items()}
            return {name: conversion for name, (_, conversion) in found.items()}
        architecture = self.own_header.values.get("general.architecture")
        self.processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
        self.names = _names(model, self.processor, self.own_header)
        return {name: self._processed(name) for name in self.own_header.tensors}

    def _processed(self, name: str, tensors: Optional[dict[str, Any]] = None) -> Conversion:
        """A tensor through its family's processor.

        Args:
            tensors: What earlier ones have become, to which some processors add.
        """

        def conversion(weights: np.ndarray) -> dict[str, np.ndarray]:
            parsed = {"tensors": {} if tensors is None else tensors}
            found = self.processor.process(
                weights=weights, name=name, tensor_key_mapping=self.names, parsed_parameters=parsed
            )
            if found.name in self.names:
                parsed["tensors"][self.names[found.name]] = torch.from_numpy(np.copy(found.weights))
            return parsed["tensors"]

        return conversion

    def get_state_dict(self, checkpoint_file: str, model: PreTrainedModel) -> dict[str, Any]:
        """The file's tensors but those that stay blocks."""
        if not self.packs:
            return super().get_state_dict(checkpoint_file, model)
        if self.supported:
            lazy = super().get_state_dict(checkpoint_file, model)
            return {name: tensor for name, tensor in lazy.items() if name not in self.taken}
        tensors: dict[str, Any] = {}
        for name, tensor in self.own_header.tensors.items():
            if name not in self.taken:
                self._processed(name, tensors)(_floats(self.own_header, tensor))
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        return without_merging(super().update_weight_conversions(weight_conversions, model), model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        super()._process_model_after_weight_loading(model, **kwargs)
        if self.packs:
            device = model.get_input_embeddings().weight.device
            for name, module in model.named_modules():
                if isinstance(module, _Blocks):
                    module.device = _device(self.device_map, name, device)
            pack_stored_layers(model)
            check_numbers(model)
            make_saveable(model)
        return model


class _Blocks(StoredLayer):
    """A layer whose weight lies in a GGUF: nothing of it is in memory but the bias."""

    def __init__(self, header: GgufHeader, place: Place, layer: Any) -> None:
        super().__init__({}, layer)
        self.header, self.place, self.device = header, place, torch.device("cpu")

    def packed(self, name: str) -> PackedLinear:
        """The packed layer with the file's codes."""
        tensor, expert, rows = self.place
        data = self.header.data(tensor)
        data = data if expert is None else data[expert]
        kind = READ_TYPES[tensor.type.name]
        try:
            quantized = from_blocks(data if rows is None else data[rows], tensor.type.name)
        except ValueError as error:
            raise ValueError(f"{str(self.header.path)!r}: tensor {tensor.name!r}: {error}") from None
        layer = PackedLinear.from_quantized(
            quantized,
            kind.bits,
            getattr(self, "bias", None),
            sym=kind.zero_point is not None and bool((quantized.zero_point == 2 ** (kind.bits - 1)).all()),
            conv1d=self.conv1d,
            compute_dtype=self.compute_dtype,
        )
        return layer.to(self.device)


class _Leaf:
    """A model as far as transformers' names of its tensors need it. Of a whole one they ask every module in turn, which takes
    seconds."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> tuple[()]:
        return ()


def _names(model: PreTrainedModel, processor: TensorProcessor, header: GgufHeader) -> dict[str, str]:
    """The model's names of the file's tensors."""
    names = get_gguf_hf_weights_map(_Leaf(model), processor)
    return names if set(header.tensors) <= set(names) else get_gguf_hf_weights_map(model, processor)


def _mapped(name: str, mapping: Iterable[Any]) -> tuple[str, Conversion]:
    """The model's name of a tensor of a newer family, and its conversion."""
    mapping = copy.deepcopy(list(mapping))  # asking marks what was asked
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    target, pattern = rename_source_key(name, renamings, converters)
    converter = next((each for each in converters if pattern in each.source_patterns), None)
    operations = () if converter is None else converter.operations
    many = converter is not None and len(converter.source_patterns) > 1

    def conversion(weights: np.ndarray) -> dict[str, np.ndarray]:
        if many:  # experts' gates before their ups, as our layers are found; see `_places`
            return {target: weights}
        tensor = torch.from_numpy(weights)
        for operation in operations:
            found = operation.convert(
                {target: tensor}, source_patterns=[target], target_patterns=[target], full_layer_name=target
            )
            tensor = next(iter(found.values()))
        return {target: tensor.numpy()}

    return target, conversion


def _places(
    model: PreTrainedModel, header: GgufHeader, conversions: Mapping[str, Conversion], names: Mapping[str, str]
) -> dict[str, Place]:
    """The layers whose blocks can be taken as they are, by the names that they have or will have once unfused."""
    modules, places = dict(model.named_modules()), {}
    for name, tensor in header.tensors.items():
        if tensor.type.name not in READ_TYPES or name not in conversions or len(tensor.shape) != 2:
            continue
        target = names.get(name, "lm_head.weight" if name == "output.weight" else "")
        module: Any = modules.get(target.removesuffix(".weight"))
        if not isinstance(module, LINEAR_LAYERS) or not acts_linearly(module):
            continue
        if tuple(weight_of(module).shape) != tensor.shape:
            raise ValueError(
                f"{str(header.path)!r}: tensor {name!r} measures {list(tensor.shape)}, and the model has a weight of "
                f"{list(weight_of(module).shape)} there ({target!r}); the file is damaged, or of a family that is only named "
                "like this one."
            )
        rows = rows_of(conversions[name], target, tensor.shape, isinstance(module, Conv1D))
        if rows is not None:
            in_order = np.array_equal(rows, np.arange(len(rows)))
            places[target.removesuffix(".weight")] = Place(tensor, rows=None if in_order else rows)
    return {**places, **_places_of_experts(model, header, conversions, names)}


def _places_of_experts(
    model: PreTrainedModel, header: GgufHeader, conversions: Mapping[str, Conversion], names: Mapping[str, str]
) -> dict[str, Place]:
    """The same of experts, which GGUF and transformers keep fused; of a block, all that it has or none."""
    found: dict[str, dict[str, GgufTensor]] = {}
    for name, tensor in header.tensors.items():
        matched = _EXPERTS.search(name)
        if matched and name in conversions:
            target = names.get(name) or names.get(name.removesuffix(".weight")) or ""
            found.setdefault(target.rpartition(".")[0], {})[matched[1]] = tensor
    fused, places = fused_experts(model), {}
    names_of_layers = projection_names(model) if found else None
    for prefix, tensors in found.items():
        module: Any = fused.get(prefix)
        if module is None or names_of_layers is None or any(t.type.name not in READ_TYPES for t in tensors.values()):
            continue
        layout, layers = layout_of(module), names_for(module, names_of_layers)
        if layout is None or layout.is_transposed or not layout.is_concatenated:
            continue
        wanted = {kind: layer for kind, layer in layers._asdict().items() if layer is not None}
        if set(wanted) != set(tensors) or not all(_in_order(conversions[t.name], t, k) for k, t in tensors.items()):
            continue
        for kind, layer in wanted.items():
            if len(tensors[kind].shape) != 3 or tensors[kind].shape[0] != module.num_experts:
                raise ValueError(
                    f"{str(header.path)!r}: tensor {tensors[kind].name!r} measures {list(tensors[kind].shape)}, and the model "
                    f"has {module.num_experts} experts there; the file is damaged."
                )
            for expert in range(module.num_experts):
                places[f"{prefix}.{expert}.{layer}"] = Place(tensors[kind], expert)
    return places


def rows_of(
    conversion: Conversion, target: str, shape: tuple[int, ...], transposed: bool = False
) -> Optional[np.ndarray]:
    """Which row of the file each row of a weight is, int64 `[out]`; None where its conversion doesn't only order rows.

    Args:
        conversion: What becomes of an array.
        target: The weight's name in the model.
        shape: `[out, in]`.
        transposed: Whether the model stores the weight as `[in, out]`.
    """
    for columns in (_FEW_COLUMNS, shape[1]):
        places = np.arange(shape[0] * columns, dtype=np.float64).reshape(shape[0], columns)
        try:
            found = np.asarray(conversion(places.copy())[target])
        except (ValueError, IndexError, RuntimeError, KeyError):
            continue  # it asks for the width of the weight
        found = found.T if transposed else found
        if found.shape != places.shape:
            return None
        rows = found[:, 0] // columns
        whole = np.array_equal(found, rows[:, None] * columns + np.arange(columns))
        return rows.astype(np.int64) if whole and np.array_equal(np.sort(rows), np.arange(shape[0])) else None
    return None


def _in_order(conversion: Conversion, tensor: GgufTensor, kind: str) -> bool:
    """Whether experts' weights come out as they went in: of gates in the first rows of each expert, of ups in the last."""
    experts, rows, _ = tensor.shape
    places = 1 + np.arange(experts * rows * _FEW_COLUMNS, dtype=np.float64).reshape(experts, rows, _FEW_COLUMNS)
    (found,) = conversion(places.copy()).values()
    found = np.asarray(found)
    if found.shape[1] == 2 * rows:
        found = found[:, rows:] if kind == "up" else found[:, :rows]
    return np.array_equal(found, places)


def _floats(header: GgufHeader, tensor: GgufTensor) -> np.ndarray:
    """A tensor's values in float32.

    Raises:
        ValueError: If nobody here can read its type; names it.
    """
    import gguf

    data, name = header.data(tensor), tensor.type.name
    try:
        return gguf.dequantize(np.ascontiguousarray(data), tensor.type)
    except NotImplementedError:
        if name not in READ_TYPES:
            raise ValueError(
                f"{str(header.path)!r}: tensor {tensor.name!r} is {name}, which the installed gguf can't read; update it (pip "
                "install -U gguf), or use a file in another quantisation."
            ) from None
    quantized: Quantized = from_blocks(data.reshape(-1, data.shape[-1]), name)
    return dequantize(*quantized).numpy().reshape(tensor.shape)


def _check_complete(model: PreTrainedModel, path: Path, names: Iterable[str]) -> None:
    """Refuse a file without the weight of a layer: transformers would fill it with random numbers.

    Raises:
        ValueError: Names the file and the layer.
    """
    named = set(names)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    lost = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_LAYERS)
        and any(part.isdigit() for part in name.split("."))
        and f"{name}.weight" not in named | tied
    ]
    if lost:
        raise ValueError(
            f"{str(path)!r} has no tensor for {lost[0]!r} ({len(lost)} such layers) of {type(model).__name__}. Load it with the "
            "class that it was made from (auto_class=AutoModelForCausalLM), or use a complete file."
        )


def _warn_of_floats(header: GgufHeader, taken: set[str], names: Mapping[str, str], model: nn.Module) -> None:
    """Say which weights of layers are stored in few bits and become floats nevertheless."""
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    left = [
        tensor
        for name, tensor in header.tensors.items()
        if name not in taken and tensor.type.name not in FLOATS and names.get(name) not in embeddings | {None}
    ]
    for kind, count in Counter(tensor.type.name for tensor in left).items():
        first = next(tensor.name for tensor in left if tensor.type.name == kind)
        why = (
            "transformers keeps them in another form than a linear layer's rows"
            if kind in READ_TYPES
            else "it has levels of its own, which aren't integers with a scale"
        )
        warnings.warn(
            f"{count} weights of {header.path.name} are {kind} and become floats ({why}); first: {first!r}.",
            stacklevel=4,
        )


def _nothing(header: GgufHeader) -> str:
    kinds = Counter(tensor.type.name for tensor in header.tensors.values() if len(tensor.shape) > 1)
    listed = ", ".join(f"{kind} x{count}" for kind, count in kinds.most_common())
    return (
        f"{str(header.path)!r} has no weights that packed layers can take as they are: its matrices are {listed or 'none'}, and "
        f"{', '.join(READ_TYPES)} can be taken. Load it as floats (peft_ext.load), then quantise it (get_peft_model, or "
        "peft-ext quantize)."
    )


def _device(device_map: Any, name: str, default: torch.device) -> torch.device:
    """Where a layer goes under a `device_map` of `from_pretrained`."""
    if isinstance(device_map, Mapping):
        parts = name.split(".")
        for end in range(len(parts), -1, -1):
            if ".".join(parts[:end]) in device_map:
                return torch.device(device_map[".".join(parts[:end])])
    return default
