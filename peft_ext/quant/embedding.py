# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Packed token embeddings, and an output head that shares their weight: frozen, a row of the weight for each token.

A tied head stays tied: its layer has the embedding's very parameters, so that the weight is there once. Nothing of it is tuned:
a scale that served both ends would change what is read and what is written at once, and the table takes a few per cent of a
forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_ext.quant.formats import NumberFormat, Uniform, empty_quantized
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.packed_module import PackedModule, replace_layer
from peft_ext.quant.packing import pack, planes_shape, unpack_rows
from peft_ext.quant.uniform import Quantized, dequantize


_PARTS = ("planes", "scale", "zero_point")


class PackedEmbedding(PackedModule):
    """`nn.Embedding` on a packed weight `[num_embeddings, embedding_dim]`.

    It is no `nn.Embedding`: what resizes or trains one (transformers' `resize_token_embeddings`, PEFT's LoRA on embeddings) says
    that it can't, instead of making floats of it.

    Args:
        planes, scale, zero_point, sym, compute_dtype: As of [`PackedLinear`], with a row for each token.
        num_embeddings, embedding_dim, padding_idx: As of `nn.Embedding`.
    """

    def __init__(
        self,
        planes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        *,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: Optional[int] = None,
        sym: bool = False,
        compute_dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.padding_idx = padding_idx
        self._hold(planes, scale, zero_point, embedding_dim, num_embeddings, sym, compute_dtype)

    @classmethod
    def from_quantized(
        cls, quantized: Quantized, number_format: Uniform, dtype: torch.dtype, padding_idx: Optional[int] = None
    ) -> PackedEmbedding:
        """Pack a quantised weight of `dtype`."""
        rows, columns = quantized.codes.shape
        return cls(
            pack(quantized.codes, number_format.bits),
            quantized.scale,
            quantized.zero_point,
            num_embeddings=rows,
            embedding_dim=columns,
            padding_idx=padding_idx,
            sym=number_format.sym,
            compute_dtype=dtype,
        )

    @classmethod
    def empty(
        cls, number_format: NumberFormat, shape: torch.Size, dtype: torch.dtype, padding_idx: Optional[int] = None
    ) -> PackedEmbedding:
        """On the meta device, for a weight of `shape` `[num_embeddings, embedding_dim]`."""
        (_, scale, *zero_point), (rows, columns) = empty_quantized(number_format, shape, dtype), shape
        return cls(
            torch.empty(planes_shape(rows, columns, number_format.bits), dtype=torch.uint8, device="meta"),
            scale,
            zero_point[0],
            num_embeddings=rows,
            embedding_dim=columns,
            padding_idx=padding_idx,
            sym=getattr(number_format, "sym", False),
            compute_dtype=dtype,
        )

    @property
    def num_embeddings(self) -> int:
        """Tokens."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Size of a token's vector."""
        return self.in_features

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[...]` to vectors `[..., embedding_dim]` in the dtype that the weight had; only their rows are unpacked."""
        rows = input_ids.reshape(-1).long()
        assert self.zero_point is not None
        codes = unpack_rows(self.planes, rows, self.in_features)
        vectors = dequantize(codes, self.scale[rows], self.zero_point[rows])
        return vectors.to(self.compute_dtype).view(*input_ids.shape, self.in_features)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, number_format={self.number_format}"


def share(model: PreTrainedModel, packed: PackedEmbedding, name: str, tied: list[str]) -> None:
    """Put a packed embedding into a model, and its parameters into the modules that are tied to it.

    transformers is told of the ties, so that a checkpoint has them once; the config's `tie_word_embeddings`, which speaks of
    float weights, is switched off.
    """
    biases = {each: getattr(model.get_submodule(each), "bias", None) for each in tied}
    embeddings = [each for each in tied if not isinstance(model.get_submodule(each), nn.Linear)]
    replace_layer(model, name, packed)
    ties = {}
    for each in tied:
        module: PackedModule
        sizes: dict[str, Any] = {"sym": packed.sym, "compute_dtype": packed.compute_dtype}
        tensors: dict[str, Any] = {part: packed.get_parameter(part).data for part in _PARTS}
        if each in embeddings:
            module = PackedEmbedding(
                **tensors,
                num_embeddings=packed.num_embeddings,
                embedding_dim=packed.embedding_dim,
                padding_idx=packed.padding_idx,
                **sizes,
            )
        else:
            module = PackedLinear(
                **tensors,
                bias=biases[each],
                in_features=packed.in_features,
                out_features=packed.out_features,
                **sizes,
            )
        module.origin = packed.origin
        for part in _PARTS:
            module.register_parameter(part, getattr(packed, part))
            ties[f"{each}.{part}"] = f"{name}.{part}"
        replace_layer(model, each, module)
    of_weights = {f"{each}.weight" for each in (name, *tied)}
    known = getattr(model, "all_tied_weights_keys", None) or {}
    rest = {key: value for key, value in known.items() if key not in of_weights and value not in of_weights}
    model.all_tied_weights_keys = {**rest, **ties}
    model._tied_weights_keys = {
        **(type(model)._tied_weights_keys or {}),
        **ties,
    }  # by which duplicates are left out of a file
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def retie(model: PreTrainedModel) -> None:
    """Give tied modules the embedding's very parameters again, which a loader has put new ones in the place of."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        (owner, part), (name, _) = source.rsplit(".", 1), target.rsplit(".", 1)
        if part in _PARTS:
            model.get_submodule(name).register_parameter(part, model.get_submodule(owner)._parameters[part])


def packed_ends(model: nn.Module) -> dict[str, PackedModule]:
    """The packed embeddings of a model, and the output head where that is packed beside one; by name."""
    if not any(isinstance(module, PackedEmbedding) for module in model.modules()):
        return {}
    embeddings = {id(module.planes) for module in model.modules() if isinstance(module, PackedEmbedding)}
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedModule) and (id(module.planes) in embeddings or module is output)
    }


def shared_ends(model: nn.Module) -> dict[str, str]:
    """Of [`packed_ends`] those that have a packed embedding's very weight: their names, to the embedding's."""
    ends, owners, shared = packed_ends(model), dict[int, str](), dict[str, str]()
    for name, module in sorted(ends.items(), key=lambda end: not isinstance(end[1], PackedEmbedding)):
        owner = owners.setdefault(id(module.planes), name)
        if owner != name:
            shared[name] = owner
    return shared


def float_embeddings(model: PreTrainedModel, dtype: Optional[torch.dtype] = None) -> None:
    """Make plain embeddings and heads of packed ones, in place; tied ones stay tied."""
    ends, shared = packed_ends(model), shared_ends(model)
    if not ends:
        return
    weights = {
        name: nn.Parameter(layer.dequantize().to(dtype or layer.compute_dtype))
        for name, layer in ends.items()
        if name not in shared
    }
    output = model.get_output_embeddings()
    tied = any(ends[name] is output for name in shared)
    for name, layer in ends.items():
        _put_float(model, name, layer, weights[shared.get(name, name)])
    known: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    kept = {key: value for key, value in known.items() if not key.endswith(tuple(f".{part}" for part in _PARTS))}
    vars(model).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = {**kept, **{f"{name}.weight": f"{owner}.weight" for name, owner in shared.items()}}
    for config in (model.config, model.config.get_text_config()):
        if tied and hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = True


def _put_float(model: nn.Module, name: str, layer: Any, weight: nn.Parameter) -> None:
    rows, columns = weight.shape
    module: Any
    if isinstance(layer, PackedEmbedding):
        module = nn.Embedding(rows, columns, layer.padding_idx, device="meta")
    else:
        module = nn.Linear(columns, rows, bias=False, device="meta")
        module.bias = layer.bias
    module.weight = weight
    replace_layer(model, name, module)
