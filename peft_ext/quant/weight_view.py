# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The float weight of a packed layer as other libraries read it: dequantised only where it is needed, never written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only


class Dequantizable(Protocol):
    """What a view asks of its layer, which is a [`PackedLinear`]."""

    in_features: int
    out_features: int
    compute_dtype: torch.dtype

    @property
    def planes(self) -> torch.Tensor:
        """The packed codes; the view lies on their device."""

    def dequantize(self) -> torch.Tensor:
        """The float weight `[out, in]`."""


class WeightView(torch.Tensor):
    """The weight `[out, in]` of a packed layer, in the dtype that it had before.

    Shape, dtype, device and views of it cost nothing; any other operation dequantises the weight and returns plain
    tensors. Writing to it is refused, because the result would be lost: the layer keeps integers.

    Args:
        layer: The packed layer.
        look: What view of the weight it is; all of it by default.
    """

    _is_hf_initialized = True  # transformers leaves it alone when it initialises what a checkpoint lacks
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    layer: Dequantizable
    look: Callable[[torch.Tensor], torch.Tensor]

    @staticmethod
    def __new__(cls, layer: Dequantizable, look: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight):
        shape = (layer.out_features, layer.in_features)
        like = look(torch.empty(shape, dtype=layer.compute_dtype, device="meta"))
        view = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), like.storage_offset(), dtype=like.dtype, device=layer.planes.device
        )
        view.layer, view.look = layer, look
        return view

    # `weight.data = ...` is how PEFT's tuners merge, and how some initialisations change the base
    data = property(lambda self: WeightView(self.layer, self.look), lambda self, value: refuse_writing())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        if any(isinstance(value, cls) for value in _written(func, args, kwargs)):
            refuse_writing()
        if _is_view(func) and isinstance(args[0], cls):
            source = args[0]
            return cls(source.layer, lambda weight: func(source.look(weight), *args[1:], **kwargs))
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    def dequantize(self) -> torch.Tensor:
        """A plain tensor of the values, free to be changed."""
        return self.look(self.layer.dequantize().to(self.layer.compute_dtype))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"WeightView({self.dequantize()})"


def refuse_writing() -> None:
    """Say why a packed weight can't be changed, and the ways out.

    Raises:
        TypeError: Always.
    """
    raise TypeError(
        "this layer's weight is packed, and packed codes are never rounded again: nothing can be merged into them, and "
        "no initialisation can change them (PiSSA and OLoRA would). Keep the adapter beside the packed base (unload() "
        "returns the base); or save the adapter, load it onto "
        "peft_ext.quant.conversion.dequantize_layers(model.unload()), a float model, and merge it there."
    )


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[position] if position < len(args) else kwargs.get(argument.name))
    return written


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return len(returns) == 1 and returns[0].alias_info is not None and str(returns[0].type) == "Tensor"
