# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Whether stock transformers can load a model whose linear layers have no float weight: it is tried on the meta device.

While a compressed-tensors checkpoint is loaded compressed, its layers have `weight_packed` and no `weight`. After the
tensors have arrived, transformers runs the model's own initialisation over all modules. It leaves alone what has been
loaded, but in some models (T5, Mamba, SigLIP, Falcon) it reads `layer.weight` first, and loading ends in an AttributeError.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.utils.quantization_config import QuantizationMethod

from peft_ext.quant.experts import UnfusedExperts


def loads_without_weights(model: PreTrainedModel, layers: Iterable[str]) -> bool:
    """Whether a model of this class can be initialised while some of its layers have no `weight`.

    Args:
        model: Its class and config count, not its layers.
        layers: Names of the layers that a checkpoint has compressed.
    """
    try:
        skeleton = _skeleton(model)
        for parameter in skeleton.parameters():
            parameter._is_hf_initialized = True  # as if it had been loaded
        for name in layers:
            del skeleton.get_submodule(name)._parameters["weight"]
        for tied in getattr(skeleton, "all_tied_weights_keys", None) or {}:
            skeleton.get_parameter(tied)
        skeleton.initialize_weights()
    except Exception:  # whatever it is that the model's own code raises: the loader would end in it
        return False
    return True


def names_in_stock(model: PreTrainedModel) -> set[str]:
    """The names of all modules that a model of this class has before anything of ours is done to it."""
    return {name for name, _ in _skeleton(model).named_modules()}


def is_rebuilt(model: PreTrainedModel) -> bool:
    """Whether transformers puts other modules into a model of this class before it loads a compressed-tensors checkpoint.

    Llama 4's experts become one module each, and the fused tensors that we save would be found by none of them.
    """
    return any(map(_is_patched, model.modules()))


def is_unfused_by_stock(blocks: Iterable[UnfusedExperts]) -> bool:
    """Whether these are experts that transformers makes one module each of, for a compressed-tensors checkpoint."""
    return all(_is_patched(block.fused) for block in blocks)


def _is_patched(module: nn.Module) -> bool:
    patch = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__)
    return patch is not None and QuantizationMethod.COMPRESSED_TENSORS in patch["quantization_methods"]


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"), no_init_weights():
        return type(model)(config)
