# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoint `save_pretrained` of a model with packed layers writes."""

from __future__ import annotations

from typing import Optional

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from peft_ext.checkpoint import bcq, mixed_precision, pack_quantized
from peft_ext.checkpoint.tied_weights import untie
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.embedding import packed_ends
from peft_ext.quant.packed_module import replace_layer


FORMATS = ("pack-quantized", "bcq")


def make_saveable(
    model: nn.Module, checkpoint_format: Optional[str] = None, container_bits: Optional[int] = None
) -> None:
    """Let `model.save_pretrained` write packed layers, or floats again where no packed layer is left.

    Other modules than transformers' are left alone; their `state_dict` holds the packed tensors.

    Args:
        checkpoint_format: `"pack-quantized"` or `"bcq"`; by default the first where it has room for the layers, each at its
            own width: layers of several widths have, where they are symmetric and stock transformers reads them so, a group
            of the config for each width; else they are bcq.
        container_bits: Of pack-quantized: the width of what holds a code in the file, of all layers; by default the codes'
            own, or where layers of several widths can't have a group each, the widest code's. 2- and 3-bit codes in
            containers of 4 are what vLLM's kernels take.

    Raises:
        ValueError: If the format has no room for the layers, or format or width don't exist.
    """
    if checkpoint_format not in (None, *FORMATS):
        raise ValueError(f"format={checkpoint_format!r} is unknown; choose one of {FORMATS}.")
    if not isinstance(model, PreTrainedModel):
        return
    if packed_layers(model):
        _take_over_the_rest(model)
        untie(model, packed_layers(model))
        model.hf_quantizer = _writer(model, checkpoint_format, container_bits)
    elif any(pack_quantized.is_compressed(module) for module in model.modules()):
        model.hf_quantizer = mixed_precision.MixedPrecisionWriter(model)
    else:
        _forget_quantization(model)


def take_over(model: nn.Module) -> None:
    """Turn what stock transformers made of a pack-quantized checkpoint back into packed layers, codes bit for bit.

    Raises:
        ValueError: If a layer's format has no packed counterpart here, or the checkpoint isn't found; see
            `pack_quantized.restore`.
    """
    pack_quantized.restore(model)
    _take_over_the_rest(model)


def _writer(model: PreTrainedModel, checkpoint_format: Optional[str], container_bits: Optional[int]) -> HfQuantizer:
    kept = next(iter(mixed_precision.kept_layers(model)), None)
    if kept is not None:
        if checkpoint_format == "bcq":
            raise ValueError(
                f"format='bcq' holds packed and float layers, and layer {kept!r} is stored by compressed-tensors in another "
                "way; pass format='pack-quantized' (peft-ext export --to compressed-tensors)."
            )
        return mixed_precision.MixedPrecisionWriter(model, container_bits)
    room = pack_quantized.can_store(model)
    mixed = (
        room and container_bits is None and checkpoint_format != "bcq" and len(pack_quantized.containers(model)) > 1
    )
    if mixed and pack_quantized.can_store_apart(model):
        return mixed_precision.MixedPrecisionWriter(model)
    if checkpoint_format == "bcq" or (checkpoint_format is None and (mixed or not room)):
        if container_bits is not None:
            raise ValueError(f"container_bits={container_bits} is for format='pack-quantized'; bcq packs densely.")
        return bcq.BcqHfQuantizer(bcq.describe(model), pre_quantized=True)
    if not room and packed_ends(model):
        raise ValueError(
            "format='pack-quantized' has no room for a packed embedding, for which stock transformers has no module; pass "
            "format='bcq' (peft-ext export --to bcq), or quantise without embedding_bits."
        )
    if not room:
        raise ValueError(
            "format='pack-quantized' holds uniform integers of one group size, with whole zero points, in nn.Linear layers only "
            "(and no merged experts), which this model's aren't all; pass format='bcq'."
        )
    return pack_quantized.PackQuantizedWriter(model, container_bits)


def _take_over_the_rest(model: nn.Module) -> None:
    """Layers of a compressed base that nothing was tuned on are packed like the others, so that one writer has all."""
    for name, module in list(model.named_modules()):
        if pack_quantized.is_compressed(module) and pack_quantized.can_take_over(module):
            replace_layer(model, name, pack_quantized.take_over(module, name))
    pack_quantized.release_hook(model)


def _forget_quantization(model: PreTrainedModel) -> None:
    """A model of floats is an ordinary one, also for Trainer and `model.half()`."""
    model.hf_quantizer = None
    if getattr(model, "is_quantized", False):
        model.is_quantized = False
    for holder, names in ((model, ("quantization_method",)), (model.config, ("quantization_config", "packed_bits"))):
        for name in names:
            if name in vars(holder):
                delattr(holder, name)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module.config, "_is_quantized", False):
            module.config._is_quantized = False
