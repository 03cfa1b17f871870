# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The compressed-tensors checkpoints that we write load into packed layers, and no float weight is made.

transformers' own quantizer stays in charge of everybody else's; of ours, the layers become [`PackedLinear`] as their
tensors arrive. A checkpoint is ours where its config has `packed_bits`, which `pack_quantized` writes.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from peft_ext.checkpoint.files import TensorHeader, names_in_model, read_headers, stored_layers, tensors_of
from peft_ext.checkpoint.pack_quantized import OWN_BITS, TENSORS, expand
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.checkpoint.stored_layer import StoredLayer, pack_stored_layers, release_pages
from peft_ext.quant.linear import PackedLinear


class PackedTensorsHfQuantizer(CompressedTensorsHfQuantizer):
    """transformers' quantizer for compressed-tensors, which packs what peft-ext has written."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Optional[list[str]] = None, **kwargs: Any
    ) -> None:
        headers = read_headers(checkpoint_files or []) if hasattr(model.config, OWN_BITS) else {}
        in_file = names_in_model(model, stored_layers(headers, "weight_packed"))
        modules = dict(model.named_modules())
        self.packs = bool(in_file) and all(isinstance(modules[name], nn.Linear) for name in in_file)
        if not self.packs:
            super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)
            return
        # stock transformers can't load zero points otherwise; we can
        self.quantization_config.dequantize = False
        weights = self.quantization_config.quantization_config.config_groups["group_0"].weights
        own_bits = getattr(model.config, OWN_BITS) or {}
        for name, key in in_file.items():
            tensors = tensors_of(headers, key, (*TENSORS, "bias"))
            bits = own_bits.get(key, own_bits.get(name, weights.num_bits))
            model.set_submodule(name, _StoredIntegers(tensors, modules[name], weights.num_bits, bits, key))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.packs:
            return super()._process_model_after_weight_loading(model, **kwargs)
        pack_stored_layers(model)
        make_saveable(model)
        return model


class _StoredIntegers(StoredLayer):
    """A layer of integers in compressed-tensors' containers.

    Raises:
        ValueError: If a tensor is missing, or doesn't belong to a weight of the layer's shape; names the layer.
    """

    def __init__(
        self, tensors: dict[str, TensorHeader], layer: Any, container_bits: int, bits: int, name: str
    ) -> None:
        super().__init__(tensors, layer)
        self.container_bits, self.bits = container_bits, bits
        missing = [part for part in ("weight_scale", "weight_shape") if part not in tensors]
        if missing:
            raise ValueError(f"layer {name!r}: the checkpoint has no {missing[0]}; save or download it again.")
        shape = tensors["weight_packed"].shape
        if shape != (self.out_features, math.ceil(self.in_features * container_bits / 32)):
            raise ValueError(
                f"layer {name!r}: weight_packed of shape {list(shape)} holds no weight of "
                f"[{self.out_features}, {self.in_features}] at {container_bits} bits; one of config.json and the weights "
                "isn't this checkpoint's."
            )

    def packed(self, name: str) -> PackedLinear:
        """The packed layer with the same codes, zero points and scales."""
        tensors: dict[str, torch.Tensor] = {
            part: getattr(self, part).data for part in TENSORS if isinstance(getattr(self, part, None), torch.Tensor)
        }
        bias: Any = getattr(self, "bias", None)
        layer = expand(tensors, self.container_bits, self.bits, bias, name)
        layer.compute_dtype = self.compute_dtype
        release_pages(tensors["weight_packed"])
        return layer
