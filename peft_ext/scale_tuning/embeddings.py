# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which embeddings and output heads `embedding_bits` packs, to which format, and what can't be."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from torch import nn
from transformers import PreTrainedModel

from peft_ext.quant.conversion import quantize_layer
from peft_ext.quant.embedding import PackedEmbedding, packed_ends, share
from peft_ext.quant.formats import Uniform, check_number_format
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.packed_module import replace_layer


# 8 bits: symmetric, a scale for each token (GGUF's Q8_0 holds them); 4 bits: minimums in groups of 32 (Q4_1).
FORMATS = {8: Uniform(8, -1, sym=True), 4: Uniform(4, 32)}


class Ends(NamedTuple):
    """The two ends of a language model.

    Args:
        embedding: Name of the input embedding.
        tied: Names of other modules with the embedding's very weight, with it.
        head: Name of the output head, where there is one.
    """

    embedding: str
    tied: list[str]
    head: Optional[str]


def check_embeddings(model: nn.Module, bits: int) -> Ends:
    """Refuse, before anything is changed, a model whose embeddings can't be packed.

    Raises:
        ValueError: Names the module, what it is and the way out.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"embedding_bits={bits} is for models of transformers, not a {type(model).__name__}; leave it out."
        )
    source: Any = model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    ends = Ends(names[source], _tied_to(model, source), names.get(model.get_output_embeddings()))
    if isinstance(source, PackedEmbedding):
        if source.bits != bits:
            raise ValueError(
                f"embedding_bits={bits}: the embedding {ends.embedding!r} is packed already with {source.bits} bits, which are "
                f"never rounded again; pass embedding_bits={source.bits}, leave it out, or start from the float model."
            )
        return ends
    for name in (ends.embedding, *ends.tied):
        _check_end(name, model.get_submodule(name), bits)
    if ends.head is not None and ends.head not in ends.tied:
        _check_end(ends.head, model.get_submodule(ends.head), bits)
    try:
        check_number_format(FORMATS[bits], source.weight.shape[1])
    except ValueError as error:
        raise ValueError(f"embedding_bits={bits}: {error}") from error
    return ends


def _check_end(name: str, module: Any, bits: int) -> None:
    plain = type(module) is nn.Embedding and module.max_norm is None and not module.sparse
    if not plain and type(module) is not nn.Linear and not isinstance(module, PackedLinear):
        raise ValueError(
            f"embedding_bits={bits}: {name!r} is a {type(module).__name__}, which computes more than a plain embedding or linear "
            "layer (or has an adapter or training of its own); leave embedding_bits out."
        )


def _tied_to(model: nn.Module, source: nn.Module) -> list[str]:
    key = "planes" if isinstance(source, PackedEmbedding) else "weight"
    own = source._parameters.get(key)
    return [
        name
        for name, module in model.named_modules()
        if module is not source and own is not None and module._parameters.get(key) is own
    ]


def pack_embeddings(model: PreTrainedModel, bits: int) -> None:
    """Pack a model's input embedding and output head, in place; done already, nothing happens.

    Args:
        model: A language model of transformers with a plain embedding.
        bits: 8 (symmetric, one scale for each token) or 4 (groups of 32, minimums).

    Raises:
        ValueError: See [`check_embeddings`].
    """
    ends, number_format = check_embeddings(model, bits), FORMATS[bits]
    source: Any = model.get_submodule(ends.embedding)
    if isinstance(source, PackedEmbedding):
        return
    if ends.head is not None and ends.head not in ends.tied:
        head = model.get_submodule(ends.head)
        if not isinstance(head, PackedLinear):
            packed_head = quantize_layer(head, number_format, number_format.default_method, ends.head)
            packed_head.origin = number_format.default_method
            replace_layer(model, ends.head, packed_head)
    weight = source.weight.detach()
    if weight.device.type == "meta":
        packed = PackedEmbedding.empty(number_format, weight.shape, weight.dtype, source.padding_idx)
    else:
        quantized = number_format.quantize(weight, number_format.default_method)
        packed = PackedEmbedding.from_quantized(quantized, number_format, weight.dtype, source.padding_idx)
    packed.origin = number_format.default_method
    share(model, packed, ends.embedding, ends.tied)


def frozen_ends(model: nn.Module, bits: Optional[int] = None) -> set[str]:
    """The names of output heads that are packed with the embedding, or will be under `embedding_bits`; nothing tunes them."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) and bits is not None else None
    heads = {name for name, module in model.named_modules() if output is not None and module is output}
    return heads | set(packed_ends(model))
