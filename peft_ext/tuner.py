# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the models of all our tuners share: injection, mixed batches, and adapters that are weighted sums of others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Optional

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_ext import saved_adapters
from peft_ext.mixed_batches import MixedBatches


class TunerModel(MixedBatches, BaseTuner):
    """Base of the tuners' models, which say what `prefix` and `tuner_layer_cls` are."""

    tuner_layer_cls: type[Any]

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        saved_adapters.taken_from(model, config)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        refuse_unused(model, config, adapter_name, remapped)
        return remapped

    def _layer_around(self, target: nn.Module, adapter_name: str, peft_config: Any, name: str) -> nn.Module:
        """The tuner layer that takes a target's place; `name`: the target's."""
        return self.tuner_layer_cls(target, adapter_name, peft_config)

    def _weighted_fields(self, adapters: list[str], held: dict[str, Any]) -> dict[str, Any]:
        """What a weighted sum's config has other than the first adapter's; `held`: the layers that have any of them."""
        raise TypeError(f"{type(self).__name__} can't weigh adapters.")

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        new_module = self._layer_around(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        new_module.train(target.training)
        self._replace_module(parent, target_name, new_module, target)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """
        Add a new adapter that does what the others do, weighted and summed.

        Of scales it is `s0 + sum_i weights[i] * (s_i - s0)`; of bottlenecks it adds `sum_i weights[i] * adapter_i(y)`, and
        one bottleneck holds them side by side.

        Args:
            adapters (`list`):
                List of adapter names to be merged.
            weights (`list`):
                List of weights for each adapter.
            adapter_name (`str`):
                Name of the new adapter.

        Raises:
            ValueError: If an adapter doesn't exist, the lists differ in length, the adapters are of different kinds
                (non-linearities, types of target_modules), or several have `modules_to_save`.
        """
        if adapter_name in self.peft_config:
            return
        self._check_weighted(adapters, weights)
        held = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, self.tuner_layer_cls) and any(layer.holds(adapter) for adapter in adapters)
        }
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            # these very layers, whatever rules chose them
            target_modules=set(held),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            **self._weighted_fields(adapters, held),
        )
        try:
            self.inject_adapter(self.model, adapter_name)
        except ValueError:
            del self.peft_config[adapter_name]
            raise
        self.set_requires_grad(adapter_name, False)
        for layer in self.model.modules():
            if isinstance(layer, self.tuner_layer_cls) and layer.holds(adapter_name):
                layer.set_weighted(adapters, weights, adapter_name)

    def _check_weighted(self, adapters: list[str], weights: list[float]) -> None:
        """Refuse what can't be summed, in PEFT's words."""
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown:
            raise ValueError(f"Adapter {unknown[0]} does not exist")
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"got {len(adapters)} adapters and {len(weights)} weights; pass one weight per adapter.")
        wrappers = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        if any(sum(name in wrapper._adapters for name in adapters) > 1 for wrapper in wrappers):
            raise ValueError("Cannot add weighted adapters targeting the same module with modules_to_save.")


def refuse_unused(model: nn.Module, config: PeftConfig, adapter_name: str, tensors: Iterable[str]) -> None:
    """Refuse an adapter's tensors that nothing in the model takes, which PEFT would pass over.

    Args:
        model: Has the adapter's layers.
        config, adapter_name: Of the adapter.
        tensors: Their names, as they are in the model.

    Raises:
        ValueError: Names the first of them and the way out.
    """
    taken = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    taken.update(name for name, _ in model.named_buffers(remove_duplicate=False))
    if any("_fsdp_wrapped_module" in name for name in taken):  # other names; what was loaded before was checked
        return
    prefix = "base_model.model."
    left = sorted(name for name in tensors if not {name, name.removeprefix(prefix), prefix + name} & taken)
    if left:
        raise ValueError(
            f"adapter {adapter_name!r}: nothing in the model takes {left[0]!r} of its file ({len(left)} such tensors). It "
            f"belongs to {config.base_model_name_or_path or 'another base'!r}, or its adapter_config.json is another's; load "
            "it onto its own base, with its own config."
        )
