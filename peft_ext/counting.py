# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How many weights a model has, where PEFT and transformers count them: packed codes count as the weights that they stand for.

Codes are bytes, and what sizes memory by `numel()` (DeepSpeed's partitions, accelerate's device maps) has to be told bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftMixedModel, PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_ext.quant.packed_module import PackedModule
from peft_ext.registration import extend_method


def weights_beyond_bytes(model: nn.Module) -> int:
    """How many more weights the packed layers stand for than they have bytes of codes; less than 0 above 8 bits."""
    # tied ones share their codes, which are counted once
    layers = {id(module.planes): module for module in model.modules() if isinstance(module, PackedModule)}
    return sum(layer.in_features * layer.out_features - layer.planes.nelement() for layer in layers.values())


def install() -> None:
    """Extend the counts of PEFT and transformers; again is harmless."""
    for owner in (PeftModel, PeftMixedModel):
        extend_method(owner, "get_nb_trainable_parameters", _pair)
    extend_method(PreTrainedModel, "num_parameters", _number)


def _pair(original: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    @functools.wraps(original)
    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        trainable, total = original(self)
        return trainable, total + weights_beyond_bytes(self)

    return get_nb_trainable_parameters


def _number(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        found = original(self, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        return found if only_trainable else found + weights_beyond_bytes(self)

    return num_parameters
