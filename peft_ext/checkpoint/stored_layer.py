# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What stands in a linear layer's place while a packed checkpoint is loaded: its stored tensors, and no float weight."""

from __future__ import annotations

import ctypes
import mmap
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from peft_ext.checkpoint.files import (
    TensorHeader,
    names_in_model,
    read_headers,
    stored_layers,
    unfuse_stored,
    without_merging,
)
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.checkpoint.soundness import check_complete, check_numbers
from peft_ext.checkpoint.tied_weights import untie
from peft_ext.quant.conversion import LINEAR_LAYERS, weight_of
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.packed_module import replace_layer
from peft_ext.sharding import refuse_distributed_loading


DTYPES = {
    **{"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I8": torch.int8, "I32": torch.int32, "I64": torch.int64},
}
_RELEASED_AT_ONCE = 1 << 24  # codes, a byte each while a layer is packed


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

    def used_bias(self) -> Any:
        """The layer's bias; None where the model has none and a checkpoint stores zeros, as AutoGPTQ does."""
        bias: Any = getattr(self, "bias", None)
        return None if bias is not None and not self.has_bias and not bias.any() else bias

    @abstractmethod
    def packed(self, name: str) -> PackedLinear:
        """The packed layer with the same codes, zero points and scales; `name`: the layer's, for messages."""


class StoredLayersHfQuantizer(HfQuantizer, ABC):
    """Makes room for others' packed tensors inside transformers' `from_pretrained`, and packs them afterwards."""

    requires_calibration = True  # nothing is quantised here
    is_trainable = True
    quantization_config: Any
    # The tensor that every packed layer has, and whose format it is.
    tensor, format_name = "qweight", ""
    # What only packed layers have beside it.
    parts: tuple[str, ...] = ("qzeros",)

    @abstractmethod
    def stored_layer(self, key: str, headers: Mapping[str, TensorHeader], layer: Any) -> StoredLayer:
        """What takes the tensors of a layer.

        Args:
            key: Its name in the files.
            headers: Of all their tensors.
            layer: The model's linear layer.

        Raises:
            ValueError: If the layer can't be taken over; names it, what it has and what was expected.
        """

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Optional[list[str]] = None, **kwargs: Any
    ) -> None:
        refuse_distributed_loading(model)
        headers = read_headers(checkpoint_files or [])
        stored = stored_layers(headers, self.tensor)
        if not stored:
            files = ", ".join(Path(file).name for file in checkpoint_files or ())
            raise ValueError(
                f"the checkpoint ({files}) has no {self.tensor}, as {self.format_name}'s layers do; it is damaged or of another "
                "format."
            )
        unfuse_stored(model, stored)
        in_file, modules = linear_layers_of(model, stored), dict(model.named_modules())
        untie(model, in_file)
        check_complete(model, headers, self.tensor, self.parts, in_file)
        for name, key in in_file.items():
            model.set_submodule(name, self.stored_layer(key, headers, modules[name]))

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        return without_merging(super().update_weight_conversions(weight_conversions, model), model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        pack_stored_layers(model)
        check_numbers(model)
        make_saveable(model)
        return model


def check_stored(
    name: str,
    tensors: Mapping[str, TensorHeader],
    expected: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]],
    weight: str,
) -> None:
    """Refuse a layer whose tensors aren't there, or have other types or shapes than expected.

    Args:
        name: The layer's name, for messages.
        tensors: Its headers.
        expected: By tensor the types and the shape; `g_idx` and `bias` may be missing.
        weight: What the layer stands for, for messages.

    Raises:
        ValueError: Names the layer, what it has and what was expected.
    """
    missing = [part for part in expected if part not in tensors and part not in ("g_idx", "bias")]
    if missing:
        raise ValueError(f"layer {name!r}: the checkpoint has no {missing[0]}; download or save it again.")
    for part, header in tensors.items():
        dtypes, shape = expected[part]
        if header.shape != shape or header.dtype not in dtypes:
            raise ValueError(
                f"layer {name!r}: {part} is {header.dtype} {list(header.shape)}; {weight} has {dtypes[0]} {list(shape)}. The "
                "checkpoint is damaged, or its config.json is another's."
            )


def linear_layers_of(model: PreTrainedModel, stored: list[str]) -> dict[str, str]:
    """The model's linear layers that a checkpoint has packed, mapped to their names in its files.

    An output head that the model doesn't have (a causal model's, loaded as a classifier) is left out.

    Raises:
        ValueError: If the model lacks one of the layers, or has something else there; names it and the way out.
    """
    in_file, modules = names_in_model(model, stored), dict(model.named_modules())
    linear = {name: key for name, key in in_file.items() if isinstance(modules[name], LINEAR_LAYERS)}
    lost = set(stored) - set(linear.values()) - {key for key in stored if _is_head(key) and key not in modules}
    if lost:
        raise ValueError(
            f"the checkpoint's layer {min(lost)!r} ({len(lost)} such) is no linear layer of {type(model).__name__}. Load it "
            "with the class that it was made from (auto_class=), and with its own config.json."
        )
    return linear


def _is_head(key: str) -> bool:
    """Whether a layer lies outside of a model's numbered blocks."""
    return not any(part.isdigit() for part in key.split("."))


def pack_stored_layers(model: nn.Module) -> None:
    """Pack what has been loaded.

    Raises:
        ValueError: If a layer's tensors aren't in memory; names it and the way out.
    """
    unpacked = 0
    # one after the other: what is packed goes before the next one is unpacked
    for name in [name for name, module in model.named_modules() if isinstance(module, StoredLayer)]:
        layer: Any = model.get_submodule(name)
        if any(tensor.device.type == "meta" for tensor in layer.parameters()):
            raise ValueError(
                f"layer {name!r} was offloaded, so its codes aren't there to be packed; load the model without offload "
                "(device_map=None or a device that holds it)."
            )
        replace_layer(model, name, layer.packed(name))
        unpacked += layer.out_features * layer.in_features
        del layer
        # walking the heap takes milliseconds, which ten thousand small layers (experts) would pay one by one
        if unpacked >= _RELEASED_AT_ONCE:
            release_heap()
            unpacked = 0
    release_heap()


def release_heap() -> None:
    """Give freed memory back to the system, which glibc keeps for later: of a large layer's codes, more than the layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:  # musl has none
        trim(0)


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
