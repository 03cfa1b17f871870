# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoint `save_pretrained` of a model with packed layers writes."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from peft_ext.checkpoint import bcq, pack_quantized
from peft_ext.quant.conversion import packed_layers


def make_saveable(model: nn.Module, format: str | None = None) -> None:
    """Let `model.save_pretrained` write packed layers, or floats again where no packed layer is left.

    Other modules than transformers' are left alone; their `state_dict` holds the packed tensors.

    Args:
        format: `"pack-quantized"` or `"bcq"`; by default the first where it has room for the layers.

    Raises:
        ValueError: If the format has no room for the layers, or doesn't exist.
    """
    if not isinstance(model, PreTrainedModel):
        return
    layers = packed_layers(model)
    if layers:
        model.hf_quantizer = _writer(model, layers, format)
    elif not any(pack_quantized.is_compressed(module) for module in model.modules()):
        model.hf_quantizer = None
        for name in ("quantization_config", "packed_bits"):
            if hasattr(model.config, name):
                delattr(model.config, name)


def _writer(model: PreTrainedModel, layers: dict, format: str | None):
    if format not in (None, "pack-quantized", "bcq"):
        raise ValueError(f"format={format!r} is unknown; choose 'pack-quantized' or 'bcq'.")
    if format == "bcq" or (format is None and not pack_quantized.can_store(layers)):
        return bcq.BcqHfQuantizer(bcq.describe(model), pre_quantized=True)
    if not pack_quantized.can_store(layers):
        raise ValueError(
            "format='pack-quantized' holds uniform integers of one group size in nn.Linear layers only, which this "
            "model's aren't all; pass format='bcq'."
        )
    return pack_quantized.PackQuantizedWriter(model)
