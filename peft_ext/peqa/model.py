# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The PEQA tuner."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_ext.peqa.layer import PeqaLinear
from peft_ext.scale_tuning.model import ScaleTuningModel


# Layers to whose output a model adds in place, by the class of the block that does: they keep their product.
_CHANGED_IN_PLACE = {"Llama4TextMoe": "shared_expert.down_proj"}


class PeqaModel(ScaleTuningModel):
    """
    Creates a PEQA model: integer weights, frozen, whose scales are tuned. Paper:
    https://huggingface.co/papers/2305.14152

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted.
        config ([`PeqaConfig`]): The configuration of the PEQA model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The PEQA model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_ext import PeqaConfig

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = get_peft_model(model, PeqaConfig(bits=4, group_size=64))
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`PeqaConfig`]): The configuration of the PEQA model.
    """

    prefix: str = "peqa_"
    tuner_layer_cls = PeqaLinear

    def _layer_around(self, target: nn.Module, adapter_name: str, peft_config: Any, name: str) -> nn.Module:
        layer: Any = super()._layer_around(target, adapter_name, peft_config, name)
        layer.keep_product = layer.keep_product or _is_changed_in_place(self.model, name)
        return layer


def _is_changed_in_place(model: nn.Module, name: str) -> bool:
    for block, ending in _CHANGED_IN_PLACE.items():
        prefix = name.removesuffix(f".{ending}")
        if prefix != name and type(model.get_submodule(prefix)).__name__ == block:
            return True
    return False
