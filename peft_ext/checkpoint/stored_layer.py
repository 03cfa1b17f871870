# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What stands in a linear layer's place while a packed checkpoint is loaded: its stored tensors, and no float weight."""

from __future__ import annotations

import ctypes
import mmap
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext.checkpoint.files import TensorHeader
from peft_ext.quant.conversion import replace_layer, weight_of
from peft_ext.quant.linear import PackedLinear


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64}


class StoredLayer(nn.Module, ABC):
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
        self.out_features, self.in_features = weight_of(layer).shape
        self.has_bias, self.training = layer.bias is not None, layer.training
        dtypes = {"bias": layer.weight.dtype, **(dtypes or {})}
        for part, header in tensors.items():
            empty = torch.empty(header.shape, dtype=dtypes.get(part, DTYPES[header.dtype]), device="meta")
            self.register_parameter(part, nn.Parameter(empty, requires_grad=False))
        if self.has_bias and "bias" not in tensors:
            self.bias = layer.bias  # stays missing, which the loader reports

    @property
    def weight(self) -> torch.Tensor:
        """A shape without numbers; some models (GPT-2, SigLIP) initialise the weights of their layers' layers."""
        shape = (self.in_features, self.out_features) if self.conv1d else (self.out_features, self.in_features)
        weight = torch.empty(shape, dtype=self.compute_dtype, device="meta")
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # nothing is to be written
        return weight

    @abstractmethod
    def packed(self, name: str) -> PackedLinear:
        """The packed layer with the same codes, zero points and scales; `name`: the layer's, for messages."""


def pack_stored_layers(model: nn.Module) -> None:
    """Pack what has been loaded.

    Raises:
        ValueError: If a layer's tensors aren't in memory; names it and the way out.
    """
    # one after the other: what is packed goes before the next one is unpacked
    for name in [name for name, module in model.named_modules() if isinstance(module, StoredLayer)]:
        layer: Any = model.get_submodule(name)
        if any(tensor.device.type == "meta" for tensor in layer.parameters()):
            raise ValueError(
                f"layer {name!r} was offloaded, so its codes aren't there to be packed; load the model without offload "
                "(device_map=None or a device that holds it)."
            )
        replace_layer(model, name, layer.packed(name))


def release_pages(tensor: torch.Tensor) -> None:
    """Give the pages of a stored tensor back that isn't read again.

    safetensors maps its files, and what was read of them counts as the process's memory until the last tensor of a file is
    gone: a model would be there twice at the end of its loading.
    """
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of its own alone
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
