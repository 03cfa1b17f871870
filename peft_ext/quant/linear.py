# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A frozen packed weight behind the interface of `nn.Linear`."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import nn

from peft_ext.quant import chosen_scales
from peft_ext.quant.binary import BinaryQuantized
from peft_ext.quant.formats import NumberFormat, empty_quantized
from peft_ext.quant.functional import mixed_packed_linear, packed_linear
from peft_ext.quant.packed_module import PackedModule
from peft_ext.quant.packing import pack, planes_shape
from peft_ext.quant.uniform import Quantized


class PackedLinear(PackedModule, nn.Linear):
    """`y = x W^T + bias` with `W = scale * (codes - zero_point)`, or `W = sum_p scale_p * B_p` for a binary coding.

    The codes are packed into bit-planes; nothing of the layer is trained. It is an `nn.Linear` (as bitsandbytes'
    layers are), so that PEFT's other tuners, which know formats by a closed list, wrap it like one.

    Args:
        planes: uint8 `[ceil(out / 32), ceil(in / 8), bits, 32]`, see `packing.py`.
        scale: float `[out, groups]`; of a binary coding the alphas `[out, groups, bits]`. Kept in float32 at least: half
            precision would round away a fifth of what tuning changes about a scale by one percent.
        zero_point: uint8 `[out, groups]`, or float, kept in float32 at least; None for a binary coding.
        bias: float `[out]` or None.
        in_features, out_features: Size of the weight.
        sym: Whether every zero point is `2**(bits - 1)`.
        conv1d: Whether the layer stood as transformers' `Conv1D` (`[in, out]`), which `to_float` makes of it again.
        compute_dtype: dtype of the float weight that the layer stands for; the scale's by default. PEFT reads it, too.
    """

    def __init__(
        self,
        planes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        *,
        in_features: int,
        out_features: int,
        sym: bool = False,
        conv1d: bool = False,
        compute_dtype: Optional[torch.dtype] = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a float weight
        self.conv1d = conv1d
        self._hold(planes, scale, zero_point, in_features, out_features, sym, compute_dtype)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach().contiguous(), requires_grad=False)
        )

    @classmethod
    def from_quantized(
        cls,
        quantized: Union[Quantized, BinaryQuantized],
        bits: int,
        bias: Optional[torch.Tensor],
        *,
        sym: bool = False,
        conv1d: bool = False,
        compute_dtype: Optional[torch.dtype] = None,
    ) -> PackedLinear:
        """Pack a quantised weight; scales are kept in float32 (float64 for a float64 weight)."""
        out_features, in_features = quantized.codes.shape
        codes, scale, *zero_point = quantized
        return cls(
            pack(codes, bits),
            scale,
            zero_point[0] if zero_point else None,
            bias,
            in_features=in_features,
            out_features=out_features,
            sym=sym,
            conv1d=conv1d,
            compute_dtype=compute_dtype,
        )

    @classmethod
    def empty(
        cls,
        number_format: NumberFormat,
        shape: torch.Size,
        dtype: torch.dtype,
        bias: Optional[torch.Tensor],
        conv1d: bool = False,
    ) -> PackedLinear:
        """A layer on the meta device for a weight of `shape` `[out, in]` and `dtype`; `bias` is kept as it is."""
        (_, scale, *zero_point), (out_features, in_features) = empty_quantized(number_format, shape, dtype), shape
        planes = planes_shape(out_features, in_features, number_format.bits)
        return cls(
            torch.empty(planes, dtype=torch.uint8, device="meta"),
            scale,
            zero_point[0] if zero_point else None,
            bias,
            in_features=in_features,
            out_features=out_features,
            sym=getattr(number_format, "sym", False),
            conv1d=conv1d,
            compute_dtype=dtype,
        )

    def forward(
        self,
        x: torch.Tensor,
        scale: Optional[torch.Tensor] = None,
        keep_product: bool = False,
        trained_planes: Optional[int] = None,
        zero_point: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """`[..., in] -> [..., out]`; `scale` and `zero_point` (a tuner's) stand in for the layer's own, and where there is no
        scale, what this call has chosen (see `chosen_scales.py`). See `packed_linear`."""
        if scale is None:
            found = chosen_scales.product(self, x)
            if found is not None:
                return found
        planes, own_scale, own_zero_point, bias = self._tensors()
        zero_point = own_zero_point if zero_point is None else zero_point
        weight = (planes, zero_point, self.out_features, self.in_features)  # quicker made than a PackedWeight
        scale = own_scale if scale is None else scale
        return packed_linear(
            _autocast(x), weight, scale, bias, keep_product=keep_product, trained_planes=trained_planes
        )

    def forward_mixed(
        self, x: torch.Tensor, scales: torch.Tensor, choice: torch.Tensor, zero_points: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """`[batch, ..., in] -> [batch, ..., out]`, sample `i` with `scales[choice[i]]`; see `mixed_packed_linear`.

        `zero_points` stand in for the layer's own: `[out, groups]`, or `[n, out, groups]` to go with the scales.
        """
        weight = self.packed if zero_points is None else self.packed._replace(zero_point=zero_points)
        return mixed_packed_linear(_autocast(x), weight, scales, choice, self.bias)

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
        # attributes of a module are looked up slowly, four of them in the time of a small product
        own = self._parameters
        try:
            return own["planes"], own["scale"], own["zero_point"], own["bias"]  # type: ignore[return-value]
        except KeyError:  # parametrisations put tensors in their place, which are attributes
            return self.planes, self.scale, self.zero_point, self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"number_format={self.number_format}, bias={self.bias is not None}"
        )


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """The input in the dtype in which autocast wants linear layers, where it is on."""
    device_type = "cpu" if x.is_cpu else x.device.type  # a device's type takes longer to read than whether it's a CPU
    if device_type != "cpu" and not torch.amp.is_autocast_available(device_type):  # the meta device has none
        return x
    if torch.is_autocast_enabled(device_type) and x.is_floating_point():
        return x.to(torch.get_autocast_dtype(device_type))
    return x
