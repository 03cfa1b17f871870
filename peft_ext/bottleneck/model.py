# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The tuner of bottleneck adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext.bottleneck.config import BottleneckConfig
from peft_ext.bottleneck.layer import CANNOT_MERGE, BottleneckLinear
from peft_ext.bottleneck.targets import TARGET_MODULES
from peft_ext.mixed_batches import adapters_per_sample
from peft_ext.targets import target_layers
from peft_ext.weighted_adapters import check_weighted, exactly


class BottleneckModel(BaseTuner):
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
            _maybe_include_all_linear_layers(peft_config, model)
        for name, module in target_layers(peft_config, model).items():
            inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if not isinstance(inner, (nn.Linear, Conv1D)):
                raise ValueError(
                    f"Target module {name!r} is a {type(inner).__name__}, which is not supported. Currently, only "
                    "`torch.nn.Linear` and `Conv1D` are; leave it out of `target_modules` or name it in `exclude_modules`."
                )

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        if isinstance(target, BottleneckLinear):
            target.update_layer(adapter_name, peft_config)
            return
        new_module = BottleneckLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        new_module.train(target.training)
        self._replace_module(parent, target_name, new_module, target)

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """With `adapter_names`, hand every tuner layer the name of each sample's adapter for the time of a forward."""
        return adapters_per_sample(
            self, kwargs.get("adapter_names"), kwargs.get("num_beams"), lambda names: {"adapter_names": names}
        )

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """
        Add a new adapter that adds `sum_i weights[i] * adapter_i(y)`: one bottleneck holds them side by side.

        Args:
            adapters (`list`):
                List of adapter names to be merged.
            weights (`list`):
                List of weights for each adapter.
            adapter_name (`str`):
                Name of the new adapter.

        Raises:
            ValueError: If an adapter doesn't exist, the lists differ in length, non-linearities differ, or several
                adapters have `modules_to_save`.
        """
        if adapter_name in self.peft_config:
            return
        check_weighted(self, adapters, weights)
        kinds = {name: self.peft_config[name].non_linearity for name in adapters}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"adapters of different non-linearities can't share one bottleneck: {kinds}.")
        held = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, BottleneckLinear) and any(adapter in layer.bottleneck_down for adapter in adapters)
        }
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            **exactly(held),
            # where a layer holds fewer of them, the rest stays zero
            bottleneck_dim=max(_width(layer, adapters) for layer in held.values()),
            reduction_factor=None,
        )
        self.inject_adapter(self.model, adapter_name)
        self.set_requires_grad(adapter_name, False)
        for layer in held.values():
            _set_weighted(layer, adapters, weights, adapter_name)


def _width(layer: BottleneckLinear, adapters: list[str]) -> int:
    return sum(layer.adapter(name)[0].out_features for name in adapters if name in layer.bottleneck_down)


@torch.no_grad()
def _set_weighted(layer: BottleneckLinear, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    down, up = layer.adapter(adapter_name)
    for parameter in (*down.parameters(), *up.parameters()):
        parameter.zero_()
    bias, start = torch.zeros_like(up.bias), 0
    for name, weight in zip(adapters, weights):
        if name not in layer.bottleneck_down:
            continue
        one_down, one_up = layer.adapter(name)
        part = slice(start, start + one_down.out_features)
        down.weight[part], down.bias[part] = one_down.weight, one_down.bias
        up.weight[:, part] = weight * one_up.weight
        bias += weight * one_up.bias
        start = part.stop
    up.bias.copy_(bias)
