# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The tuner of bottleneck adapters."""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_ext.bottleneck.config import BottleneckConfig
from peft_ext.bottleneck.layer import CANNOT_MERGE, BottleneckLinear
from peft_ext.bottleneck.targets import TARGET_MODULES
from peft_ext.targets import check_called, check_supported, expand_all_linear, target_layers
from peft_ext.tuner import TunerModel


class BottleneckModel(TunerModel):
    """
    Creates a model with bottleneck adapters behind its sub-layers. Papers: https://huggingface.co/papers/1902.00751,
    https://huggingface.co/papers/2005.00247

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted.
        config ([`BottleneckConfig`]): The configuration of the adapters.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The model with adapters.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_ext import BottleneckConfig

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = get_peft_model(model, BottleneckConfig(bottleneck_dim=16))
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`BottleneckConfig`]): The configuration of the adapters.
    """

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLinear

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict) -> BottleneckConfig:
        if peft_config.target_modules is not None:
            return peft_config
        model_type = model_config.get("model_type")
        placements = TARGET_MODULES.get(model_type or "")
        if placements is None:
            raise ValueError(
                f"placement={peft_config.placement!r} is not known for models of type {model_type!r}. Please specify "
                "`target_modules` in `peft_config`: the names of the layers that end each sub-layer, such as "
                "['o_proj', 'down_proj']."
            )
        targets = placements[peft_config.placement]
        if isinstance(targets, str) and peft_config.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform` cannot be used with placement={peft_config.placement!r} on a {model_type!r}, whose "
                f"default `target_modules` is the regular expression {targets!r}; pass a narrower one instead."
            )
        peft_config.target_modules = targets if isinstance(targets, str) else set(targets)  # type: ignore[assignment]
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        """Check every target before any is changed."""
        if isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == "all-linear":
            for name, reason in expand_all_linear(peft_config, model).items():
                warnings.warn(f"target_modules='all-linear' leaves {name!r} as it is: {reason}.", stacklevel=2)
        targets = target_layers(peft_config, model)
        check_called(targets, model)
        for name, module in targets.items():
            check_supported(name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def _weighted_fields(self, adapters: list[str], held: dict[str, BottleneckLinear]) -> dict[str, Any]:
        kinds = {name: self.peft_config[name].non_linearity for name in adapters}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"adapters of different non-linearities can't share one bottleneck: {kinds}.")
        # where a layer holds fewer of them, the rest stays zero
        return {
            "bottleneck_dim": max(layer.width_of(adapters) for layer in held.values()),
            "reduction_factor": None,
        }
