# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""AWQ checkpoints in AutoAWQ's `gemm` layout read straight into packed layers: codes, zero points and scales are kept as
they are, no float weight is made, and neither autoawq nor gptqmodel is needed.

Tensors of a layer (Lin et al., 2023, arXiv 2306.00978; the layout is AutoAWQ's, `WQLinear_GEMM`):

<layer>.qweight   int32 [in, out / 8]       codes of eight outputs in a word
<layer>.qzeros    int32 [groups, out / 8]   zero points, likewise and as they are
<layer>.scales    float16 [groups, out]
<layer>.bias      float16 [out]             where the layer has one

Bits 4 i to 4 i + 3 of a word hold output `ORDER[i]` of its eight. AWQ's scaling of the inputs is folded into the layers
before; of the few families where it isn't (an activation with `scales` of its own) nothing is read.

transformers' own `awq` quantizer is left alone: those who have gptqmodel keep it. The way in is [`peft_ext.load_packed`].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_ext.checkpoint.files import TensorHeader, tensors_of
from peft_ext.checkpoint.pack_quantized import CODES_AT_ONCE
from peft_ext.checkpoint.soundness import check_quantization
from peft_ext.checkpoint.stored_layer import StoredLayer, StoredLayersHfQuantizer, check_stored, release_pages
from peft_ext.quant.conversion import weight_of
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.uniform import Quantized


# Not "awq", which is transformers' own; stands in configs only while a checkpoint is loaded.
QUANT_METHOD = "packed-awq"
BITS = 4
# Which of its eight outputs a word holds from its lowest bits on.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_TENSORS = ("qweight", "qzeros", "scales", "bias")


class PackedAwqConfig(QuantizationConfigMixin):
    """
    What an AWQ checkpoint's config says that matters for reading it; [`load_packed`] makes it.

    Args:
        bits (`int`, *optional*, defaults to `4`): Width of a code; there is no other.
        group_size (`int`, *optional*, defaults to `128`): Number of inputs that share a scale; -1: all of a channel.
        zero_point (`bool`, *optional*, defaults to `True`): Whether zero points were chosen, or lie in the middle.
        version (`str`, *optional*, defaults to `"gemm"`): The layout of the words.
        kwargs: What the quantizer was told besides; not needed. Which layers are float, the files tell.
    """

    def __init__(
        self,
        bits: int = BITS,
        group_size: int = 128,
        zero_point: bool = True,
        version: Optional[str] = None,
        quant_method: str = QUANT_METHOD,
        **kwargs: Any,
    ) -> None:
        self.quant_method = quant_method
        self.bits, self.group_size, self.zero_point = bits, group_size, zero_point
        check_quantization(vars(self))
        self.version = str(version or kwargs.get("format") or kwargs.get("checkpoint_format") or "gemm").lower()
        if kwargs.get("backend") == "llm-awq":
            self.version = "llm-awq"
        if self.version != "gemm":
            raise ValueError(
                f"version={self.version!r} of AWQ is a layout that is unknown here; 'gemm' can be read, which most "
                "checkpoints are in. Quantise the model with version='gemm', or load it with from_pretrained (gptqmodel)."
            )
        if bits != BITS:
            raise ValueError(f"bits={bits!r} is not supported; AWQ checkpoints of {BITS} bits can be read.")


class PackedAwqHfQuantizer(StoredLayersHfQuantizer):
    """Reads AWQ checkpoints."""

    format_name = "AWQ"
    quantization_config: PackedAwqConfig

    def stored_layer(self, key: str, headers: Mapping[str, TensorHeader], layer: Any) -> StoredLayer:
        _check_no_scaled_activation(headers)
        tensors = tensors_of(headers, key, _TENSORS)
        _check_tensors(key, tensors, weight_of(layer).shape, self.quantization_config.group_size)
        return _AwqLayer(tensors, layer, not self.quantization_config.zero_point)


class _AwqLayer(StoredLayer):
    """A layer of an AWQ checkpoint."""

    qweight: nn.Parameter
    qzeros: nn.Parameter
    scales: nn.Parameter

    def __init__(self, tensors: dict[str, TensorHeader], layer: Any, sym: bool) -> None:
        # scales are float32 here, so that loading in bfloat16 doesn't round them
        super().__init__(tensors, layer, {"scales": torch.float32})
        self.sym = sym

    def packed(self, name: str) -> PackedLinear:
        """The packed layer with the same codes, zero points and scales."""
        codes, zero_point = outputs_of(self.qweight), outputs_of(self.qzeros)
        release_pages(self.qweight)
        quantized = Quantized(codes, self.scales.t().contiguous(), zero_point)
        sym = self.sym and bool((zero_point == 2 ** (BITS - 1)).all())
        return PackedLinear.from_quantized(
            quantized, BITS, self.used_bias(), sym=sym, conv1d=self.conv1d, compute_dtype=self.compute_dtype
        )


def outputs_of(words: torch.Tensor) -> torch.Tensor:
    """uint8 `[out, n]` out of AWQ's int32 words `[n, out / 8]`."""
    rows, count = words.shape
    codes = torch.empty(count, len(ORDER), rows, dtype=torch.uint8, device=words.device)
    # some words at a time: unpacking takes several bytes for a code
    step = max(1, CODES_AT_ONCE // rows // len(ORDER))
    for start in range(0, count, step):
        part = words[:, start : start + step].t()
        for place, output in enumerate(ORDER):
            codes[start : start + step, output] = ((part >> (BITS * place)) & (2**BITS - 1)).to(torch.uint8)
    return codes.view(count * len(ORDER), rows)


def _check_tensors(
    name: str, tensors: Mapping[str, TensorHeader], weight_shape: tuple[int, ...], group_size: int
) -> None:
    """Refuse, before anything is loaded, a layer whose tensors don't fit.

    Raises:
        ValueError: Names the layer, what it has and what was expected.
    """
    out_features, in_features = weight_shape
    if out_features % len(ORDER):
        raise ValueError(
            f"layer {name!r} has {out_features} outputs, which don't fill AWQ's words of {len(ORDER)}; the checkpoint is "
            "another model's."
        )
    if group_size != -1 and in_features % group_size:
        raise ValueError(
            f"layer {name!r} has {in_features} inputs in groups of {group_size}, the last one smaller, which packed layers "
            "don't have."
        )
    groups, words = 1 if group_size == -1 else in_features // group_size, out_features // len(ORDER)
    floats = ("F16", "BF16", "F32")
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "qweight": (("I32",), (in_features, words)),
        "qzeros": (("I32",), (groups, words)),
        "scales": (floats, (groups, out_features)),
        "bias": (floats, (out_features,)),
    }
    weight = f"a weight of [{out_features}, {in_features}] in {groups} groups"
    check_stored(name, tensors, expected, weight)


def _check_no_scaled_activation(headers: Mapping[str, TensorHeader]) -> None:
    """Refuse the scales of an activation, which AutoAWQ puts behind the activations of some families."""
    for key in headers:
        name, _, tensor = key.rpartition(".")
        if tensor == "scales" and f"{name}.qweight" not in headers:
            raise ValueError(
                f"the checkpoint scales an activation ({key!r}), as AutoAWQ does in this family, and a model of packed layers "
                "has no place for it. Start from the float model, or use a GPTQ checkpoint of it."
            )
