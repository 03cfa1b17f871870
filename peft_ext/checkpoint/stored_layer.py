# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What stands in a linear layer's place while a packed checkpoint is loaded: its stored tensors, and no float weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext.checkpoint.files import TensorHeader


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64}


class StoredLayer(nn.Module):
    """Holds a layer's tensors as a checkpoint stores them, on the meta device at first, from their loading until they are
    packed.

    Args:
        tensors: Headers of the layer's tensors, by their names in it.
        layer: The linear layer that they belong to.
        dtypes: Of these tensors, other types than the files'.
    """

    def __init__(
        self, tensors: Mapping[str, TensorHeader], layer: Any, dtypes: Optional[Mapping[str, torch.dtype]] = None
    ) -> None:
        super().__init__()
        self.conv1d, self.compute_dtype = isinstance(layer, Conv1D), layer.weight.dtype
        self.out_features, self.in_features = (layer.weight.t() if self.conv1d else layer.weight).shape
        self.has_bias, self.training = layer.bias is not None, layer.training
        dtypes = {"bias": layer.weight.dtype, **(dtypes or {})}
        for part, header in tensors.items():
            empty = torch.empty(header.shape, dtype=dtypes.get(part, DTYPES[header.dtype]), device="meta")
            self.register_parameter(part, nn.Parameter(empty, requires_grad=False))
        if self.has_bias and "bias" not in tensors:
            self.bias = layer.bias  # stays missing, which the loader reports

    @property
    def weight(self) -> torch.Tensor:
        """Nothing; some models (GPT-2) initialise the weights of their layers' layers."""
        return torch.empty(0)

    def check_loaded(self, name: str) -> None:
        """Refuse a layer whose tensors aren't in memory.

        Raises:
            ValueError: Names the layer and the way out.
        """
        if any(tensor.device.type == "meta" for tensor in self.parameters()):
            raise ValueError(
                f"layer {name!r} was offloaded, so its codes aren't there to be packed; load the model without offload "
                "(device_map=None or a device that holds it)."
            )
