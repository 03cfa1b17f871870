# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""GPTQ checkpoints (AutoGPTQ's and GPTQModel's) read straight into packed layers: codes, zero points and scales are
kept as they are, no float weight is made, and neither gptqmodel nor optimum is needed.

Tensors of a layer (Frantar et al., 2022, arXiv 2210.17323; the layout is AutoGPTQ's):

<layer>.qweight   int32 [ceil(in * bits / 32), out]       codes, one after the other along the inputs, lowest bits first
<layer>.qzeros    int32 [groups, ceil(out * bits / 32)]   zero points, likewise along the outputs; in v1 less one
<layer>.scales    float16 [groups, out]
<layer>.g_idx     int32 [in]                              the group of each input; may be missing
<layer>.bias      float16 [out]                           may be there, as zeros, where the model has none

Version 1 (`checkpoint_format: "gptq"`) stores a zero point less one, version 2 (`"gptq_v2"`) as it is. Of a zero point
of 0, version 1 keeps 2**bits - 1; GPTQModel, which subtracts from whole words, borrows from the next one in the word
for it (not at 3 bits).

transformers' own `gptq` quantizer is left alone: those who have gptqmodel keep it. The way in is [`load_gptq`].
"""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_ext.checkpoint.files import (
    TensorHeader,
    names_in_model,
    read_headers,
    read_json,
    read_tensor,
    stored_layers,
    tensors_of,
)
from peft_ext.checkpoint.pack_quantized import unpack_words
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.checkpoint.stored_layer import StoredLayer, pack_stored_layers
from peft_ext.quant.conversion import LINEAR_LAYERS, weight_of
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.uniform import UNIFORM_BITS, Quantized


# Not "gptq", which is transformers' own; stands in configs only while a checkpoint is loaded.
QUANT_METHOD = "packed-gptq"
VERSIONS = {"gptq": 1, "gptq_v2": 2}
# AutoGPTQ keeps its config in a file of its own.
QUANTIZE_CONFIG = "quantize_config.json"
_TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load_gptq(
    pretrained_model_name_or_path: str, auto_class: Any = AutoModelForCausalLM, **kwargs: Any
) -> PreTrainedModel:
    """Load a GPTQ checkpoint into packed layers, on which `get_peft_model(model, PeqaConfig(...))` goes.

    `save_pretrained` of the model writes a compressed-tensors checkpoint.

    Args:
        pretrained_model_name_or_path: A folder, or a model id of the hub, with safetensors files.
        auto_class: The class whose `from_pretrained` loads it.
        **kwargs: Passed to `from_pretrained`.

    Raises:
        ValueError: If it isn't a GPTQ checkpoint, its version is unknown, or a layer can't be taken over (inputs ordered by
            activation, groups of unequal sizes, damaged tensors); names the layer.
        OSError: If it can't be found.
    """
    config = gptq_config(pretrained_model_name_or_path, **kwargs)
    if config is None:
        raise ValueError(
            f"{str(pretrained_model_name_or_path)!r} is no GPTQ checkpoint: neither its config.json nor a {QUANTIZE_CONFIG} "
            "says quant_method='gptq'. Load it with from_pretrained."
        )
    return auto_class.from_pretrained(pretrained_model_name_or_path, config=config, **kwargs)


def gptq_config(pretrained_model_name_or_path: str, **kwargs: Any) -> Optional[PretrainedConfig]:
    """The config of a GPTQ checkpoint, its quantization under our own name; None for any other model.

    Args:
        **kwargs: Of `from_pretrained`; what finds the files is used.
    """
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        hub.pop("trust_remote_code", None)
        path = cached_file(
            pretrained_model_name_or_path, QUANTIZE_CONFIG, _raise_exceptions_for_missing_entries=False, **hub
        )
        stored = read_quantize_config(path)
    if stored.get("quant_method") != "gptq":
        return None
    config.quantization_config = PackedGptqConfig(**{**stored, "quant_method": QUANT_METHOD}).to_dict()
    return config


def read_quantize_config(path: Union[str, PathLike, None]) -> dict[str, Any]:
    """AutoGPTQ's file of settings, as config.json would have them; empty where there is none."""
    return {"quant_method": "gptq", **read_json(Path(path))} if path is not None and Path(path).is_file() else {}


class PackedGptqConfig(QuantizationConfigMixin):
    """
    What a GPTQ checkpoint's config says that matters for reading it; [`load_gptq`] makes it.

    Args:
        bits (`int`): Width of a code: 2, 3, 4 or 8.
        group_size (`int`, *optional*, defaults to `-1`): Number of inputs that share a scale; -1: all of a channel.
        sym (`bool`, *optional*, defaults to `True`): Whether all zero points lie in the middle of the range.
        checkpoint_format (`str`, *optional*, defaults to `"gptq"`): `"gptq"` (version 1) or `"gptq_v2"`.
        meta (`dict`, *optional*): Says in `"quantizer"` what wrote the checkpoint.
        dynamic (`dict`, *optional*): Other widths and group sizes for some layers; read off the tensors.
        pack_dtype (`str`, *optional*, defaults to `"int32"`): Type of the words.
        kwargs: What the quantizer was told besides; not needed.
    """

    def __init__(
        self,
        bits: int,
        group_size: int = -1,
        sym: bool = True,
        checkpoint_format: Optional[str] = None,
        meta: Optional[dict[str, Any]] = None,
        dynamic: Optional[dict[str, Any]] = None,
        pack_dtype: str = "int32",
        quant_method: str = QUANT_METHOD,
        **kwargs: Any,
    ) -> None:
        self.quant_method = quant_method
        self.bits, self.group_size, self.sym = bits, group_size, sym
        self.checkpoint_format = checkpoint_format or kwargs.get("format") or "gptq"
        self.meta, self.dynamic, self.pack_dtype = meta or {}, dynamic or {}, pack_dtype
        if self.checkpoint_format not in VERSIONS:
            raise ValueError(
                f"checkpoint_format={self.checkpoint_format!r} is a layout that is unknown here; {tuple(VERSIONS)} can be "
                "read. Save the checkpoint in one of them with the tool that made it."
            )
        if bits not in UNIFORM_BITS:
            raise ValueError(f"bits={bits!r} is not supported; GPTQ checkpoints of {UNIFORM_BITS} bits can be read.")
        if pack_dtype != "int32":
            raise ValueError(f"pack_dtype={pack_dtype!r} is not supported; only words of int32 can be read.")

    @property
    def borrows(self) -> bool:
        """Whether zero points of version 1 were stored by subtracting from whole words, so that 0 borrows."""
        quantizer = self.meta.get("quantizer") or []
        return "gptqmodel" in str(quantizer).lower()


class PackedGptqHfQuantizer(HfQuantizer):
    """Makes room for a GPTQ checkpoint's tensors inside transformers' `from_pretrained`, and packs them afterwards."""

    requires_calibration = True  # nothing is quantised here
    is_trainable = True
    quantization_config: PackedGptqConfig

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Optional[list[str]] = None, **kwargs: Any
    ) -> None:
        headers = read_headers(checkpoint_files or [])
        stored = stored_layers(headers, "qweight")
        if not stored:
            raise ValueError("the checkpoint has no qweight, as GPTQ's layers do; it is damaged or of another format.")
        in_file = names_in_model(model, stored)
        modules = dict(model.named_modules())
        lost = set(stored) - {key for name, key in in_file.items() if isinstance(modules[name], LINEAR_LAYERS)}
        if lost:
            raise ValueError(
                f"the checkpoint's layer {min(lost)!r} ({len(lost)} such) is no linear layer of {type(model).__name__}. Load "
                "it with the class that it was made from (auto_class=); experts that transformers merges can't be taken over."
            )
        for name, key in in_file.items():
            tensors = tensors_of(headers, key, _TENSORS)
            bits = _check_tensors(key, tensors, weight_of(modules[name]).shape, self.quantization_config)
            model.set_submodule(name, _GptqLayer(tensors, modules[name], bits, self.quantization_config))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        pack_stored_layers(model)
        make_saveable(model)
        return model


class _GptqLayer(StoredLayer):
    """A layer of a GPTQ checkpoint."""

    qweight: nn.Parameter
    qzeros: nn.Parameter
    scales: nn.Parameter

    def __init__(self, tensors: dict[str, TensorHeader], layer: Any, bits: int, config: PackedGptqConfig) -> None:
        # scales are float32 here, so that loading in bfloat16 doesn't round them
        super().__init__(tensors, layer, {"scales": torch.float32})
        self.bits, self.config = bits, config

    def packed(self, name: str) -> PackedLinear:
        """The packed layer with the same codes, zero points and scales."""
        groups, out_features = self.scales.shape
        shape = torch.Size((self.in_features, out_features))
        codes = unpack_words(self.qweight, self.bits, self.bits, shape, dim=0).t()
        zero_point = _zero_points(self.qzeros, self.bits, torch.Size((groups, out_features)), self.config)
        zero_point = zero_point.t().contiguous()
        bias: Any = getattr(self, "bias", None)
        if bias is not None and not self.has_bias and not bias.any():
            bias = None  # AutoGPTQ gives every layer a bias, of zeros
        quantized = Quantized(codes.contiguous(), self.scales.t().contiguous(), zero_point)
        sym = self.config.sym and bool((zero_point == 2 ** (self.bits - 1)).all())
        return PackedLinear.from_quantized(
            quantized, self.bits, bias, sym=sym, conv1d=self.conv1d, compute_dtype=self.compute_dtype
        )


def _zero_points(qzeros: torch.Tensor, bits: int, shape: torch.Size, config: PackedGptqConfig) -> torch.Tensor:
    """uint8 zero points of `shape` `[groups, out]` out of a layer's words."""
    if VERSIONS[config.checkpoint_format] == 2:
        return unpack_words(qzeros, bits, bits, shape)
    if config.borrows and bits != 3:
        one_each = sum(1 << offset for offset in range(0, 32, bits))
        return unpack_words(qzeros + one_each, bits, bits, shape)  # int32 wraps around
    return (unpack_words(qzeros, bits, bits, shape) + 1) & (2**bits - 1)


def _check_tensors(
    name: str, tensors: dict[str, TensorHeader], weight_shape: tuple[int, ...], config: PackedGptqConfig
) -> int:
    """Refuse, before anything is loaded, a layer whose tensors don't fit; returns the width of its codes.

    Raises:
        ValueError: Names the layer, what it has and what was expected.
    """
    missing = [part for part in ("qweight", "qzeros", "scales") if part not in tensors]
    if missing:
        raise ValueError(f"layer {name!r}: the checkpoint has no {missing[0]}; download or save it again.")
    out_features, in_features = weight_shape
    bits = _width(name, tensors["qweight"].shape, in_features, out_features, config)
    groups = 1 if config.group_size == -1 else math.ceil(in_features / config.group_size)
    even = groups == 1 or in_features % config.group_size == 0
    if config.dynamic and len(tensors["scales"].shape) == 2:
        groups = max(1, tensors["scales"].shape[0])
        even = in_features % groups == 0
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "qweight": (("I32",), (math.ceil(in_features * bits / 32), out_features)),
        "qzeros": (("I32",), (groups, math.ceil(out_features * bits / 32))),
        "scales": (("F16", "BF16", "F32"), (groups, out_features)),
        "g_idx": (("I32", "I64"), (in_features,)),
        "bias": (("F16", "BF16", "F32"), (out_features,)),
    }
    for part, header in tensors.items():
        dtypes, shape = expected[part]
        if header.shape != shape or header.dtype not in dtypes:
            raise ValueError(
                f"layer {name!r}: {part} is {header.dtype} {list(header.shape)}; a weight of [{out_features}, "
                f"{in_features}] at {bits} bits in {groups} groups has {dtypes[0]} {list(shape)}. The checkpoint is damaged, "
                "or its config is another's."
            )
    if not even:
        raise ValueError(
            f"layer {name!r} has {in_features} inputs in {groups} groups of unequal sizes, which packed layers don't have."
        )
    if "g_idx" in tensors:
        _check_order(name, read_tensor(tensors["g_idx"], f"{name}.g_idx"), in_features // groups)
    return bits


def _width(name: str, shape: tuple[int, ...], in_features: int, out_features: int, config: PackedGptqConfig) -> int:
    """The width of a layer's codes: the config's, or with `dynamic` what the shape of its words says."""
    rows = shape[0] if len(shape) == 2 else 0
    fitting = [bits for bits in UNIFORM_BITS if math.ceil(in_features * bits / 32) == rows]
    if config.bits in fitting or not config.dynamic:
        return config.bits  # that the shape agrees is checked with the others
    if not fitting:
        raise ValueError(
            f"layer {name!r}: qweight of shape {list(shape)} holds no weight of [{out_features}, {in_features}] at any "
            f"width of {UNIFORM_BITS}; the checkpoint is damaged."
        )
    return fitting[0]


def _check_order(name: str, g_idx: torch.Tensor, group_size: int) -> None:
    """Refuse groups that don't consist of neighbouring inputs."""
    # transformers builds the model with the meta device as default
    if not torch.equal(g_idx.long(), torch.arange(len(g_idx), device="cpu") // group_size):
        raise ValueError(
            f"layer {name!r} has its inputs ordered by activation (desc_act=True, a g_idx that isn't in order), so its groups "
            "are scattered over the inputs, which packed layers don't have. Use a checkpoint made with desc_act=False, or "
            "with group_size=-1."
        )
