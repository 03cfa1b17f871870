# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What packed layers have in common: a weight `[out, in]` as frozen bit-planes, scales and zero points."""

from __future__ import annotations

import hashlib
from typing import Optional

import torch
from torch import nn

from peft_ext.quant.binary import dequantize_binary
from peft_ext.quant.formats import BinaryCoding, NumberFormat, Uniform, group_size_of
from peft_ext.quant.functional import PackedWeight
from peft_ext.quant.packing import TILE_ROWS, planes_shape, unpack
from peft_ext.quant.uniform import dequantize
from peft_ext.quant.weight_view import WeightView, refuse_writing
from peft_ext.sharding import whole


class PackedParameter(nn.Parameter):
    """Frozen bit-planes, which know how many weights they stand for: `logical_numel`, padding not counted.

    `numel()` tells bytes, by which others size memory; PEFT's counts of weights are put right in `counting.py`.
    """

    logical_numel: int

    def __new__(
        cls, data: torch.Tensor, logical_numel: Optional[int] = None, requires_grad: bool = False
    ) -> PackedParameter:
        # accelerate and PEFT rebuild parameters from data, requires_grad and perhaps their __dict__; codes are never
        # trained, and the layer restores their number
        parameter = super().__new__(cls, data.resolve_neg(), requires_grad=False)
        parameter.logical_numel = data.numel() if logical_numel is None else logical_numel
        return parameter

    def __deepcopy__(self, memo: dict) -> PackedParameter:
        if id(self) not in memo:
            memo[id(self)] = type(self)(self.data.clone(memory_format=torch.preserve_format), self.logical_numel)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return PackedParameter, (self.data, self.logical_numel)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer into a model in another one's place, and in its mode."""
    layer.train(model.get_submodule(name).training)
    model.set_submodule(name, layer)


class PackedModule(nn.Module):
    """The weight of [`PackedLinear`] and `PackedEmbedding`, its identity, and how it is moved, cast and loaded.

    Subclasses call `_hold` where they are built.

    Attributes:
        origin: How its codes were found: by which `init_method`; None where they were loaded.
    """

    planes: PackedParameter
    scale: nn.Parameter
    zero_point: Optional[nn.Parameter]
    in_features: int
    out_features: int
    sym: bool
    compute_dtype: torch.dtype
    origin: Optional[str] = None

    def _hold(
        self,
        planes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: Optional[torch.Tensor],
        in_features: int,
        out_features: int,
        sym: bool,
        compute_dtype: Optional[torch.dtype],
    ) -> None:
        """Check the tensors and make frozen parameters of them; see [`PackedLinear`]."""
        self.in_features = in_features
        self.out_features = out_features
        self.sym = sym
        self.compute_dtype = compute_dtype or scale.dtype
        scale = scale.to(_kept(scale.dtype))
        if zero_point is not None and zero_point.is_floating_point():
            zero_point = zero_point.to(_kept(zero_point.dtype))
        self._check_shapes(planes, scale, zero_point)
        # contiguous, whatever a file's reader turned round: FSDP2 shards nothing else
        self.planes = PackedParameter(planes.contiguous(), in_features * out_features)
        self.scale = nn.Parameter(scale.contiguous(), requires_grad=False)
        frozen = None if zero_point is None else nn.Parameter(zero_point.contiguous(), requires_grad=False)
        self.register_parameter("zero_point", frozen)

    @property
    def number_format(self) -> NumberFormat:
        """What the weight is quantised to."""
        if self.zero_point is None:
            return BinaryCoding(self.bits, self.group_size)
        return Uniform(self.bits, self.group_size, self.sym, "float" if self.zero_point.is_floating_point() else "int")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.planes.shape[2]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; -1 where an output channel has a single one."""
        return group_size_of(self.in_features, self.scale.shape[1])

    @property
    def weight(self) -> torch.Tensor:
        """The weight `[out, in]`, dequantised by every operation on it; some models read its dtype (T5)."""
        if torch.compiler.is_compiling():
            return self.dequantize().to(self.compute_dtype)
        return WeightView(self)

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        # PEFT hands an unwrapped layer its own weight
        if not (isinstance(value, WeightView) and value.layer is self):
            refuse_writing()

    @property
    def packed(self) -> PackedWeight:
        """What the matmuls take."""
        return PackedWeight(self.planes, self.zero_point, self.out_features, self.in_features)

    def codes(self) -> torch.Tensor:
        """uint8 codes `[out, in]`."""
        return unpack(self.planes, self.out_features, self.in_features)

    def dequantize(
        self, scale: Optional[torch.Tensor] = None, zero_point: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """The float weight `[out, in]`, in the scale's dtype; `scale` and `zero_point` stand in for the layer's own."""
        scale = (self.scale if scale is None else scale).detach()
        if self.zero_point is None:
            return dequantize_binary(self.codes(), scale)
        return dequantize(self.codes(), scale, (self.zero_point if zero_point is None else zero_point).detach())

    def fingerprint(self, planes: Optional[torch.Tensor] = None, zero_point: Optional[torch.Tensor] = None) -> int:
        """A 63-bit digest of format, codes and zero points (not of the scales): the identity of the packed weight.

        Args:
            planes, zero_point: Where the layer's own are sharded and have been gathered already: the whole ones.

        Raises:
            ValueError: If the layer is on the meta device and has no codes yet.
        """
        planes = self.planes if planes is None else planes
        zero_point = self.zero_point if zero_point is None else zero_point
        if planes.device.type == "meta":
            raise ValueError(
                "a layer on the meta device has no codes to take a fingerprint of; load its weights first."
            )
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr((self.bits, self.group_size, self.out_features, self.in_features)).encode())
        for tensor in (planes,) if zero_point is None else (planes, zero_point):
            digest.update(whole(tensor).detach().cpu().contiguous().numpy().data)
        return int.from_bytes(digest.digest(), "little") >> 1

    def _check_shapes(self, planes: torch.Tensor, scale: torch.Tensor, zero_point: Optional[torch.Tensor]) -> None:
        bits = planes.shape[2] if planes.dim() == 4 else 0
        if planes.dtype != torch.uint8 or planes.shape != planes_shape(self.out_features, self.in_features, bits):
            raise ValueError(
                f"planes are {planes.dtype} {tuple(planes.shape)}; a weight of {self.out_features} x "
                f"{self.in_features} takes uint8 [ceil(out / {TILE_ROWS}), ceil(in / 8), bits, {TILE_ROWS}]."
            )
        groups = scale.shape[1] if scale.dim() >= 2 else 0
        expected = [self.out_features, groups] if zero_point is not None else [self.out_features, groups, bits]
        if not groups or list(scale.shape) != expected or self.in_features % groups:
            layout = "[out_features, groups" + ("]" if zero_point is not None else ", bits]")
            raise ValueError(
                f"scale has shape {tuple(scale.shape)}; expected {layout} with out_features={self.out_features}"
                f"{'' if zero_point is not None else f', bits={bits}'} and in_features={self.in_features} a multiple of "
                "groups."
            )
        if zero_point is not None:
            fits = zero_point.dtype == torch.uint8 or zero_point.is_floating_point()
            if not fits or zero_point.shape != scale.shape:
                raise ValueError(
                    f"zero_point is {zero_point.dtype} {tuple(zero_point.shape)}; expected uint8 or float like scale."
                )
            if self.sym and zero_point.is_floating_point():
                raise ValueError("sym=True is of zero points in the middle of the codes, but zero_point is float.")

    def set_zero_point(self, zero_point: torch.Tensor, sym: bool = False) -> None:
        """Give a layer of integers other zero points `[out, groups]`, uint8 or float, and say whether they are symmetric."""
        self.sym = sym
        self._check_shapes(self.planes, self.scale, zero_point)
        self.zero_point = nn.Parameter(zero_point.contiguous(), requires_grad=False)

    def freeze(self) -> None:
        """Make frozen parameters of what a loader has put in their place."""
        self._keep_packed_parameter()
        self.requires_grad_(False)

    def _apply(self, fn, recurse=True):
        # a cast is of the weight that the scales stand for; they themselves stay as precise as they are
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.scale.device)).dtype
        kept = [parameter for parameter in (self.scale, self.zero_point) if parameter is not None]
        before = [parameter.data for parameter in kept]
        super()._apply(fn, recurse)
        for name, tensor in zip(("scale", "zero_point"), before):
            parameter = getattr(self, name)
            if torch.promote_types(parameter.dtype, tensor.dtype) != parameter.dtype:
                parameter.data = tensor.to(parameter.device)
        return self._keep_packed_parameter()

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_packed_parameter()

    def _keep_packed_parameter(self) -> PackedModule:
        """Moves between some devices and `load_state_dict(assign=True)` make a plain parameter of the planes."""
        planes, count = self._parameters["planes"], self.in_features * self.out_features
        if type(planes) is nn.Parameter:
            self._parameters["planes"] = PackedParameter(planes.data, count)
        elif isinstance(planes, PackedParameter):
            planes.logical_numel = count
        return self


def _kept(dtype: torch.dtype) -> torch.dtype:
    """What scales and float zero points are kept in."""
    return torch.promote_types(dtype, torch.float32)
