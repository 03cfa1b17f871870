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

transformers' own `gptq` quantizer is left alone: those who have gptqmodel keep it. The way in is [`peft_ext.load_packed`].
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_ext.checkpoint.files import TensorHeader, read_json, read_tensor, tensors_of
from peft_ext.checkpoint.pack_quantized import CODES_AT_ONCE, CONTAINER_BITS, unpack_words
from peft_ext.checkpoint.soundness import check_quantization
from peft_ext.checkpoint.stored_layer import StoredLayer, StoredLayersHfQuantizer, check_stored, release_pages
from peft_ext.quant.conversion import weight_of
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.uniform import Quantized


# Not "gptq", which is transformers' own; stands in configs only while a checkpoint is loaded.
QUANT_METHOD = "packed-gptq"
VERSIONS = {"gptq": 1, "gptq_v2": 2}
# AutoGPTQ keeps its config in a file of its own.
QUANTIZE_CONFIG = "quantize_config.json"
_TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")


def read_quantize_config(path: Union[str, PathLike, None]) -> dict[str, Any]:
    """AutoGPTQ's file of settings, as config.json would have them; empty where there is none."""
    return {"quant_method": "gptq", **read_json(Path(path))} if path is not None and Path(path).is_file() else {}


class PackedGptqConfig(QuantizationConfigMixin):
    """
    What a GPTQ checkpoint's config says that matters for reading it; [`load_packed`] makes it.

    Args:
        bits (`int`): Width of a code: 2, 3, 4 or 8.
        group_size (`int`, *optional*, defaults to `-1`): Number of inputs that share a scale; -1: all of a channel.
        sym (`bool`, *optional*, defaults to `True`): Whether all zero points lie in the middle of the range.
        checkpoint_format (`str`, *optional*, defaults to `"gptq"`): `"gptq"` (version 1) or `"gptq_v2"`.
        meta (`dict`, *optional*): Says in `"quantizer"` what wrote the checkpoint.
        dynamic (`dict`, *optional*):
            Patterns of layer names, `"+:"` or nothing before them, mapped to other widths, group sizes and symmetry; or
            with `"-:"` before them, layers that are float. What the tensors say counts.
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
        check_quantization(vars(self))
        for pattern in self.dynamic:
            try:
                re.compile(pattern.removeprefix("+:").removeprefix("-:"))
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"quantization_config: dynamic has {pattern!r}, which is no pattern ({error})."
                ) from None
        if self.checkpoint_format not in VERSIONS:
            raise ValueError(
                f"checkpoint_format={self.checkpoint_format!r} is a layout that is unknown here; {tuple(VERSIONS)} can be "
                "read. Save the checkpoint in one of them with the tool that made it."
            )
        if bits not in CONTAINER_BITS:
            raise ValueError(f"bits={bits!r} is not supported; GPTQ checkpoints of {CONTAINER_BITS} bits can be read.")
        if pack_dtype != "int32":
            raise ValueError(f"pack_dtype={pack_dtype!r} is not supported; only words of int32 can be read.")

    def of_layer(self, name: str) -> dict[str, Any]:
        """What `dynamic` says of a layer: the first pattern that its name begins with counts, as in GPTQModel."""
        for pattern, settings in self.dynamic.items():
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
                return {} if pattern.startswith("-:") else dict(settings)
        return {}

    @property
    def borrows(self) -> bool:
        """Whether zero points of version 1 were stored by subtracting from whole words, so that 0 borrows."""
        quantizer = self.meta.get("quantizer") or []
        return "gptqmodel" in str(quantizer).lower()


class PackedGptqHfQuantizer(StoredLayersHfQuantizer):
    """Reads GPTQ checkpoints."""

    format_name, parts = "GPTQ", ("qzeros", "g_idx", "scales")
    quantization_config: PackedGptqConfig

    def stored_layer(self, key: str, headers: Mapping[str, TensorHeader], layer: Any) -> StoredLayer:
        tensors = tensors_of(headers, key, _TENSORS)
        bits = _check_tensors(key, tensors, weight_of(layer).shape, self.quantization_config)
        sym = self.quantization_config.of_layer(key).get("sym", self.quantization_config.sym)
        return _GptqLayer(tensors, layer, bits, self.quantization_config, bool(sym))


class _GptqLayer(StoredLayer):
    """A layer of a GPTQ checkpoint."""

    qweight: nn.Parameter
    qzeros: nn.Parameter
    scales: nn.Parameter

    def __init__(
        self, tensors: dict[str, TensorHeader], layer: Any, bits: int, config: PackedGptqConfig, sym: bool = False
    ) -> None:
        # scales are float32 here, so that loading in bfloat16 doesn't round them
        super().__init__(tensors, layer, {"scales": torch.float32})
        self.bits, self.config, self.sym = bits, config, sym

    def packed(self, name: str) -> PackedLinear:
        """The packed layer with the same codes, zero points and scales."""
        groups, out_features = self.scales.shape
        codes = torch.empty(out_features, self.in_features, dtype=torch.uint8, device=self.qweight.device)
        # some outputs at a time: unpacking takes several bytes for a code
        columns = max(1, CODES_AT_ONCE // self.in_features)
        for start in range(0, out_features, columns):
            words = self.qweight[:, start : start + columns]
            shape = torch.Size((self.in_features, words.shape[1]))
            codes[start : start + columns] = unpack_words(words, self.bits, self.bits, shape, dim=0).t()
        zero_point = _zero_points(self.qzeros, self.bits, torch.Size((groups, out_features)), self.config)
        zero_point = zero_point.t().contiguous()
        release_pages(self.qweight)
        bias = self.used_bias()
        quantized = Quantized(codes, self.scales.t().contiguous(), zero_point)
        sym = self.sym and bool((zero_point == 2 ** (self.bits - 1)).all())
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
    if "qweight" not in tensors:
        raise ValueError(f"layer {name!r}: the checkpoint has no qweight; download or save it again.")
    out_features, in_features = weight_shape
    bits = _width(name, tensors["qweight"].shape, in_features, out_features, config)
    groups = 1 if config.group_size == -1 else math.ceil(in_features / config.group_size)
    even = groups == 1 or in_features % config.group_size == 0
    if config.dynamic and "scales" in tensors and len(tensors["scales"].shape) == 2:
        groups = max(1, tensors["scales"].shape[0])
        even = in_features % groups == 0
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "qweight": (("I32",), (math.ceil(in_features * bits / 32), out_features)),
        "qzeros": (("I32",), (groups, math.ceil(out_features * bits / 32))),
        "scales": (("F16", "BF16", "F32"), (groups, out_features)),
        "g_idx": (("I32", "I64"), (in_features,)),
        "bias": (("F16", "BF16", "F32"), (out_features,)),
    }
    weight = f"a weight of [{out_features}, {in_features}] at {bits} bits in {groups} groups"
    check_stored(name, tensors, expected, weight)
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
    fitting = [bits for bits in CONTAINER_BITS if math.ceil(in_features * bits / 32) == rows]
    stated = config.of_layer(name).get("bits", config.bits)
    if stated in fitting or not config.dynamic:
        return stated  # that the shape agrees is checked with the others
    if not fitting:
        raise ValueError(
            f"layer {name!r}: qweight of shape {list(shape)} holds no weight of [{out_features}, {in_features}] at any "
            f"width of {CONTAINER_BITS}; the checkpoint is damaged."
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
