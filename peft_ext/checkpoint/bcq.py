# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`bcq`, our own checkpoint: bit-planes and scales as the layers hold them, read and written by a transformers quantizer.

It holds binary codings, and uniform integers, which are binary codings with tied alphas (`binary.py`): those that
compressed-tensors has no room for (`Conv1D`, several group sizes, float zero points). Tensors of a layer, see `PackedLinear`:

<layer>.planes       uint8 [tiles, input bytes, bits, 32]
<layer>.scale        float [out, groups, bits] (alphas), or [out, groups] of uniform integers
<layer>.zero_point   uint8 [out, groups], of uniform integers; float where the config's `zero` says so
<layer>.bias         float [out], where the layer has one

A packed embedding has the same tensors, a row for each token; a head that is tied to it has none of its own.

Loading makes no float weight: the layers are packed on the meta device before the tensors arrive. A float checkpoint
is quantised weight by weight as it is read.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any, Optional

import torch
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_ext.checkpoint.files import (
    TensorHeader,
    names_in_model,
    read_headers,
    stored_layers,
    unfuse_stored,
    without_merging,
)
from peft_ext.checkpoint.soundness import check_complete, check_numbers, check_quantization
from peft_ext.checkpoint.tied_weights import untie
from peft_ext.file_formats import FLOATS, Tensor
from peft_ext.quant.conversion import (
    LINEAR_LAYERS,
    check_layer,
    dequantize_layers,
    float_layers,
    packed_layers,
    quantize_layer,
    weight_of,
)
from peft_ext.quant.embedding import PackedEmbedding, packed_ends, retie, share, shared_ends
from peft_ext.quant.experts import fused_experts, merges_experts, unfuse_experts
from peft_ext.quant.formats import BinaryCoding, NumberFormat, Uniform, check_number_format, group_size_of, groups_of
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.packed_module import PackedModule, replace_layer
from peft_ext.quant.packing import TILE_ROWS
from peft_ext.quant.replaceable import acts_linearly
from peft_ext.quant.uniform import check_zero
from peft_ext.routers import routers
from peft_ext.sharding import refuse_distributed_loading
from peft_ext.tensor_files import PLACEHOLDER


QUANT_METHOD = "bcq"
FORMATS = ("binary", "uniform")
# The tensors of a layer; their sizes follow from the weight's.
LAYER = {
    "planes": Tensor(
        ("U8",), ("tiles", "input bytes", "bits", TILE_ROWS), note="bit-planes, as the CPU kernel reads them"
    ),
    "scale": Tensor(FLOATS, ("out", "groups", "bits, of alphas alone"), note="alphas, or scales of integers"),
    "zero_point": Tensor(
        ("U8", *FLOATS), ("out", "groups"), optional=True, note="of integers: whole ones, or of `zero` `float` floats"
    ),
    "bias": Tensor(FLOATS, ("out",), optional=True, note="where the layer has one"),
}
# Counts up when the layout of the tensors changes.
FORMAT_VERSION = 1


class BcqConfig(QuantizationConfigMixin):
    """
    Configuration of packed weights in binary coding, for `from_pretrained(..., quantization_config=BcqConfig(bits=3))`.

    Args:
        bits (`int`, *optional*, defaults to `4`):
            Number of sign planes: 1, 2, 3, 4 or 8 (of uniform integers 2, 3, 4, 5, 6 or 8).
        group_size (`int`, *optional*, defaults to `-1`):
            Number of inputs that share their alphas; -1: all inputs of an output channel.
        init_method (`str`, *optional*):
            Where the codes come from when a float model is quantised while it is loaded: `"alternating"` (the default)
            or `"greedy"`; of uniform integers `"minmax"` (the default) or `"mse"`. With data, use
            [`peft_ext.calibrate`] on the loaded float model instead, which is far better; without, choose small groups
            (32, 64): a channel's least-squares levels clip the few large weights that models live on.
        number_format (`str`, *optional*, defaults to `"binary"`):
            `"binary"`, with free alphas, or `"uniform"`, integers with a scale and a zero point.
        sym (`bool`, *optional*, defaults to `False`):
            Of uniform integers: keep every zero point in the middle of the range.
        zero (`str`, *optional*, defaults to `"int"`):
            Of uniform integers: zero points are whole (`"int"`), or floats that keep a group's minimum (`"float"`).
        bits_pattern (`dict`, *optional*):
            Other widths for some layers: module names or regular expressions mapped to bits, as in the tuners' configs.
        group_size_pattern (`dict`, *optional*):
            Other group sizes for some layers: module names or regular expressions mapped to group sizes.
        zero_pattern (`dict`, *optional*):
            Other kinds of zero points for some layers: module names or regular expressions mapped to `"int"` or `"float"`.
        modules_to_not_convert (`list[str]`, *optional*):
            Modules that stay float; the output layer and tied weights by default.
        embeddings (`dict`, *optional*):
            Packed embeddings, and heads packed with them: module names mapped to `bits`, `group_size` and `sym`, or to
            `tied_to`, the name of the embedding whose weight they have. A checkpoint states them; to pack them, pass
            `embedding_bits` to a tuner's config.
        format_version (`int`, *optional*, defaults to `1`):
            Version of the layout in the files. Don't set it: a checkpoint states what it was written in.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = -1,
        init_method: Optional[str] = None,
        number_format: str = "binary",
        sym: bool = False,
        bits_pattern: Optional[dict[str, int]] = None,
        group_size_pattern: Optional[dict[str, int]] = None,
        zero: str = "int",
        zero_pattern: Optional[dict[str, str]] = None,
        modules_to_not_convert: Optional[list[str]] = None,
        embeddings: Optional[dict[str, dict[str, Any]]] = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **others: Any,
    ) -> None:
        if others:
            raise ValueError(
                f"quantization_config of bcq has {min(others)!r}, which this peft-ext doesn't know; leave it out, or pip install "
                "-U peft-ext."
            )
        self.quant_method = quant_method
        self.bits, self.group_size, self.sym = bits, group_size, sym
        self.number_format = number_format
        self.bits_pattern, self.group_size_pattern = bits_pattern or {}, group_size_pattern or {}
        self.zero, self.zero_pattern = zero, zero_pattern or {}
        self.modules_to_not_convert = modules_to_not_convert
        self.embeddings = embeddings
        self.format_version = format_version
        check_quantization({key: value for key, value in vars(self).items() if value is not None})
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version={format_version!r} of bcq is unknown; this peft-ext reads {FORMAT_VERSION}. The checkpoint "
                "was written by another release: pip install -U peft-ext."
            )
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method={quant_method!r} is another method; BcqConfig's is {QUANT_METHOD!r}.")
        if number_format not in FORMATS:
            raise ValueError(f"number_format={number_format!r} is unknown; choose one of {FORMATS}.")
        zeros = {zero, *self.zero_pattern.values()}
        if number_format == "binary" and zeros != {"int"}:
            raise ValueError(
                f"zero={max(zeros - {'int'})!r} is of number_format='uniform'; binary codings have no zero points."
            )
        kind, given = type(self.format_of("")), (bits, *self.bits_pattern.values())
        for width in given:
            for size in (group_size, *self.group_size_pattern.values()):
                check_number_format(kind(width, size))
        for each in zeros:
            check_zero(each, sym)
        methods = self.format_of("").methods
        self.init_method = init_method or self.format_of("").default_method
        if self.init_method not in methods:
            raise ValueError(
                f"init_method={init_method!r} is unknown; choose one of {methods}. (Calibration needs data: "
                "load the float model and call peft_ext.calibrate.)"
            )

    def format_of(self, name: str) -> NumberFormat:
        """The format of the layer called `name`."""
        if self.embeddings and name in self.embeddings:
            return _embedding_format(self.embeddings, name)
        bits = self.bits_pattern.get(get_pattern_key(list(self.bits_pattern), name), self.bits)
        groups = self.group_size_pattern
        group_size = groups.get(get_pattern_key(list(groups), name), self.group_size)
        if self.number_format == "binary":
            return BinaryCoding(bits, group_size)
        zero = self.zero_pattern.get(get_pattern_key(list(self.zero_pattern), name), self.zero)
        return Uniform(bits, group_size, self.sym, zero)

    def to_dict(self) -> dict[str, Any]:
        """For config.json; without what there is only one kind of, so that earlier releases read what they can."""
        whole: dict[str, Any] = {"zero": "int", "zero_pattern": {}, "embeddings": None}
        return {name: value for name, value in super().to_dict().items() if whole.get(name, ...) != value}


class BcqHfQuantizer(HfQuantizer):
    """Reads, writes and makes `bcq` checkpoints inside transformers' `from_pretrained` and `save_pretrained`."""

    requires_calibration = False
    is_trainable = is_compileable = True
    quantization_config: BcqConfig

    def __init__(self, quantization_config: BcqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets: dict[str, NumberFormat] = {}  # of a float model that is quantised while it is loaded

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, Any]]:
        """The model's own state dict is what is stored; only the config has to agree with it."""
        # the layers may have changed since the model was loaded
        self.quantization_config = describe(model)
        return None, dict(PLACEHOLDER)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Optional[list[str]] = None, **kwargs: Any
    ) -> None:
        refuse_distributed_loading(model)
        if self.pre_quantized:
            self._make_room(model, None if checkpoint_files is None else read_headers(checkpoint_files))
            return
        config = self.quantization_config
        skipped = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        self._unfuse_experts(model, skipped)
        left = routers(model)
        for name, module in model.named_modules():
            fits = isinstance(module, LINEAR_LAYERS) and name not in left and acts_linearly(module)
            if fits and should_convert_module(name, skipped):
                check_layer(name, module, config.format_of(name))
                self.targets[name] = config.format_of(name)
        if not self.targets:
            raise ValueError(
                f"modules_to_not_convert={config.modules_to_not_convert!r} leaves no linear layer to quantise in "
                f"{type(model).__name__}."
            )
        for pattern in ("bits_pattern", "group_size_pattern", "zero_pattern"):
            hit = {get_pattern_key(list(getattr(config, pattern)), name) for name in self.targets}
            missed = [key for key in getattr(config, pattern) if key not in hit]
            if missed:
                raise ValueError(f"{pattern} has {missed[0]!r}, which matches no layer that is quantised.")

    def _unfuse_experts(self, model: PreTrainedModel, skipped: list[str]) -> None:
        """Let a float checkpoint's experts arrive one by one, where it keeps them apart."""
        fused = fused_experts(model)
        if not fused:
            return
        if any(merges_experts(entry) for entry in get_model_conversion_mapping(model)):
            if any(should_convert_module(name, skipped) for name in fused):
                unfuse_experts(model, lambda name: True)
        else:
            warnings.warn(
                f"{type(model).__name__}'s checkpoints keep the experts of a block in one tensor, which BcqConfig leaves float; "
                "to pack them, load the float model and call peft_ext.calibrate or get_peft_model.",
                stacklevel=2,
            )

    def _make_room(self, model: PreTrainedModel, headers: Optional[dict[str, TensorHeader]]) -> None:
        """Replace the layers that a checkpoint has packed by empty packed ones.

        Args:
            headers: Of the checkpoint's files; None where the tensors come from elsewhere and the config has to do.

        Raises:
            ValueError: If the checkpoint's tensors and its config disagree; names the layer.
        """
        config = self.quantization_config
        stored = [] if headers is None else stored_layers(headers, "planes")
        unfuse_stored(model, stored)
        in_file = names_in_model(model, stored)
        tied, ends = self._tied_ends(model), config.embeddings or {}
        for name, module in list(model.named_modules()):
            if not isinstance(module, (*LINEAR_LAYERS, nn.Embedding)) or name in tied:
                continue
            number_format, key = config.format_of(name), in_file.get(name)
            if headers is None:
                skipped = not should_convert_module(name, config.modules_to_not_convert or [])
                if skipped if isinstance(module, LINEAR_LAYERS) else name not in ends:
                    continue
            elif key is None:
                continue
            else:
                number_format = _checked(key, headers, name, module, config)
            shape, conv1d = weight_of(module).shape, isinstance(module, Conv1D)
            empty: PackedModule
            if isinstance(module, nn.Embedding):
                empty = PackedEmbedding.empty(number_format, shape, module.weight.dtype, module.padding_idx)
            else:
                empty = PackedLinear.empty(number_format, shape, module.weight.dtype, module.bias, conv1d)
            if headers is not None:
                _check_tensors(key, headers, empty, list(shape))  # type: ignore[arg-type]  # it is stored
            replace_layer(model, name, empty)
        for owner in dict.fromkeys(tied.values()):
            embedding = model.get_submodule(owner)
            if isinstance(embedding, PackedEmbedding):
                share(model, embedding, owner, [name for name, each in tied.items() if each == owner])
        self._check_ends(model)
        untie(model, packed_layers(model))
        if stored and not in_file:
            raise ValueError(
                f"the checkpoint's packed layers ({stored[0]!r} and others) are not in {type(model).__name__}; "
                "load it with the class that it was saved from."
            )
        if headers is not None:
            check_complete(model, headers, "planes", ("scale", "zero_point"), packed_layers(model))

    def _tied_ends(self, model: PreTrainedModel) -> dict[str, str]:
        """Which modules of the model have an embedding's weight, to its name; a body alone may lack the head."""
        stated, modules = self.quantization_config.embeddings or {}, dict(model.named_modules())
        tied = {name: entry["tied_to"] for name, entry in stated.items() if "tied_to" in entry}
        return {name: owner for name, owner in tied.items() if name in modules and owner in modules}

    def _check_ends(self, model: PreTrainedModel) -> None:
        """Refuse a checkpoint without the planes of an embedding that its config states: it would become random numbers.

        Raises:
            ValueError: Names the embedding.
        """
        modules = dict(model.named_modules())
        for name in self.quantization_config.embeddings or {}:
            if name in modules and not isinstance(modules[name], PackedModule):
                raise ValueError(
                    f"quantization_config's embeddings have {name!r}, of which the checkpoint has no planes; one of config.json "
                    "and the weights isn't this checkpoint's. Save or download both again."
                )

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        return without_merging(super().update_weight_conversions(weight_conversions, model), model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            check_numbers(model)
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.freeze()
        retie(model)
        model.config.quantization_config = self.quantization_config = describe(model)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        name, _, tensor = param_name.rpartition(".")
        return tensor == "weight" and name in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _dequantize(self, model: PreTrainedModel, dtype: Optional[torch.dtype] = None) -> PreTrainedModel:
        return dequantize_layers(model, dtype)


class _Quantize(ConversionOps):
    """Turns a float weight into a packed layer the moment that it has been read."""

    def __init__(self, hf_quantizer: BcqHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        model: Optional[nn.Module] = None,
        full_layer_name: Optional[str] = None,
        missing_keys: Optional[set[str]] = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        assert model is not None and full_layer_name is not None  # transformers always passes them
        value = next(iter(input_dict.values()))
        name = full_layer_name.rpartition(".")[0]
        module = model.get_submodule(name)
        module.weight = nn.Parameter(value[0] if isinstance(value, list) else value, requires_grad=False)
        config = self.hf_quantizer.quantization_config
        packed = quantize_layer(module, self.hf_quantizer.targets[name], config.init_method, name)
        packed._is_hf_initialized = True  # type: ignore[assignment]
        for tensor in packed.parameters(recurse=False):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        replace_layer(model, name, packed)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def describe(model: PreTrainedModel) -> BcqConfig:
    """The config of a model's packed layers, written into the model's config as well."""
    layers, ends = packed_layers(model), _described_ends(model)
    formats = [layer.number_format for layer in layers.values()]
    kinds = {type(number_format) for number_format in formats}
    if len(kinds) > 1:
        raise ValueError("the model has uniform integers and binary codings; a checkpoint holds layers of one kind.")
    most, groups = _most_frequent([f.bits for f in formats]), _most_frequent([f.group_size for f in formats])
    zeros = {name: getattr(layer.number_format, "zero", "int") for name, layer in layers.items()}
    zero = _most_frequent(list(zeros.values())) if zeros else "int"
    config = BcqConfig(
        bits=most,
        group_size=groups,
        number_format="binary" if kinds <= {BinaryCoding} else "uniform",
        sym=all(getattr(number_format, "sym", False) for number_format in formats),
        bits_pattern={name: layer.bits for name, layer in layers.items() if layer.bits != most},
        group_size_pattern={name: layer.group_size for name, layer in layers.items() if layer.group_size != groups},
        zero=zero,
        zero_pattern={name: each for name, each in zeros.items() if each != zero},
        modules_to_not_convert=list(float_layers(model)),
        embeddings=ends or None,
    )
    model.config.quantization_config = config
    return config


def _described_ends(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Packed embeddings and heads, as the config states them."""
    shared = shared_ends(model)
    return {
        name: {"tied_to": shared[name]}
        if name in shared
        else {"bits": end.bits, "group_size": end.group_size, "sym": end.sym}
        for name, end in packed_ends(model).items()
    }


def _embedding_format(embeddings: dict[str, dict[str, Any]], name: str) -> NumberFormat:
    entry = embeddings[name]
    entry = embeddings.get(entry["tied_to"], {}) if "tied_to" in entry else entry
    return Uniform(entry.get("bits", 8), entry.get("group_size", -1), entry.get("sym", False))


def stored_format(headers: dict[str, TensorHeader], name: str) -> NumberFormat:
    """The format of one packed layer, as far as the padded shapes of its tensors tell.

    Raises:
        ValueError: If its tensors don't belong together; names the layer.
    """
    planes, scale = headers[f"{name}.planes"].shape, headers.get(f"{name}.scale")
    zero_point = headers.get(f"{name}.zero_point")
    if scale is None or len(planes) != 4:
        raise ValueError(f"layer {name!r}: the checkpoint has no scales or damaged planes; save it again.")
    if zero_point is None:
        fits = len(scale.shape) == 3 and scale.shape[2] == planes[2]
    else:
        fits = len(scale.shape) == 2 and scale.shape == zero_point.shape
    if not fits or math.ceil(scale.shape[0] / TILE_ROWS) != planes[0]:
        raise ValueError(
            f"layer {name!r}: scales of shape {list(scale.shape)} don't belong to planes of shape {list(planes)}; save "
            "or download the checkpoint again."
        )
    group_size = group_size_of(8 * planes[1], scale.shape[1])
    if zero_point is None:
        return BinaryCoding(planes[2], group_size)
    return Uniform(planes[2], group_size, zero="int" if zero_point.dtype == "U8" else "float")


def _check_tensors(key: str, headers: dict[str, TensorHeader], empty: PackedModule, shape: list[int]) -> None:
    """Refuse a layer whose tensors aren't of the types and shapes that the model's layer has.

    Raises:
        ValueError: Names the layer, the tensor, what it is and what it must be.
    """
    for part, described in LAYER.items():
        own = getattr(empty, part, None)
        header = headers.get(f"{key}.{part}")
        if own is None or header is None:  # the loader reports what is missing or too much
            continue
        problem = replace(described, shape=tuple(own.shape)).problem(header, {}, header_only=True)
        if problem:
            raise ValueError(
                f"layer {key!r}: {part} {problem}, of a weight of {shape}, which the model has there; one of config.json and "
                "the weights isn't this checkpoint's. Save or download both again."
            )


def _checked(key: str, headers: dict[str, TensorHeader], name: str, module: Any, config: BcqConfig) -> NumberFormat:
    """What the config says about a layer, once it agrees with the files.

    Args:
        key: The layer's name in the files.
        headers: Of the files; the planes' shapes are padded.
        name: The layer's name in the model, which may have or lack the prefix of the model's body.
    """
    in_features = weight_of(module).shape[1]
    stored = stored_format(headers, key)
    found = (stored.title, stored.bits, headers[f"{key}.scale"].shape[1])
    stated = [config.format_of(possible) for possible in (name, key)]
    as_found = [(one.title, one.bits, groups_of(in_features, one.group_size)) for one in stated]
    if found in as_found:
        return stated[as_found.index(found)]
    raise ValueError(
        "layer {!r}: the checkpoint holds {} of {} bits in {} groups per channel, but its config.json says {} of {} bits in "
        "{}; one of the two files isn't this checkpoint's. Save or download both again.".format(
            key, *found, *as_found[0]
        )
    )


def _most_frequent(values: list[Any]) -> Any:
    return max(sorted(set(values)), key=values.count) if values else -1
