# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The tuner layer of bottleneck adapters: a frozen linear layer and small networks on its output."""

from __future__ import annotations

import math
import warnings
from typing import Any, Optional, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers.activations import ACT2FN

from peft_ext.bottleneck.config import BottleneckConfig
from peft_ext.mixed_batches import check_length, mixed_forward


CANNOT_MERGE = (
    "Bottleneck adapters can't be merged: behind their non-linearity, no weight of the base model computes the same. Keep "
    "them beside the base (save_pretrained, PeftModel.from_pretrained), or call unload() for the base without them."
)
_HOULSBY_DEVIATION = 0.01  # section 3.6 of the paper: performance is robust below 1e-2


class BottleneckLinear(nn.Module, BaseTunerLayer):
    """A linear layer whose output y becomes `y + sum_i up_i(act_i(down_i(y)))` over the active adapters.

    The sum makes several active adapters independent of their order, as LoRA's are.

    Args:
        base_layer: `nn.Linear`, `Conv1D`, a packed layer, or another tuner's layer around one.
        adapter_name: Name of the first adapter.
        config: Its config.
    """

    adapter_layer_names: tuple[str, ...] = ("bottleneck_down", "bottleneck_up")
    other_param_names: tuple[str, ...] = ("bottleneck_activation",)

    base_layer: nn.Module
    bottleneck_down: nn.ModuleDict
    bottleneck_up: nn.ModuleDict
    bottleneck_activation: nn.ModuleDict
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict({})
        self.bottleneck_up = nn.ModuleDict({})
        self.bottleneck_activation = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = _get_in_out_features(BaseTunerLayer.get_base_layer(self))
        self._active_adapter: str | list[str] = adapter_name
        self.update_layer(adapter_name, config)

    def adapter(self, adapter_name: str) -> tuple[nn.Linear, nn.Linear]:
        """An adapter's `down` and `up`."""
        return cast(nn.Linear, self.bottleneck_down[adapter_name]), cast(nn.Linear, self.bottleneck_up[adapter_name])

    def holds(self, adapter_name: str) -> bool:
        """Whether the layer has the adapter."""
        return adapter_name in self.bottleneck_down

    def width_of(self, adapter_names: list[str]) -> int:
        """The joint width of those adapters that the layer has."""
        return sum(self.adapter(name)[0].out_features for name in adapter_names if self.holds(name))

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter."""
        width = config.width_for(self.out_features)
        self.bottleneck_down[adapter_name] = nn.Linear(self.out_features, width)
        self.bottleneck_up[adapter_name] = nn.Linear(width, self.out_features)
        self.bottleneck_activation[adapter_name] = ACT2FN[config.non_linearity]
        self.reset_parameters(adapter_name, config)
        BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter_name)
        BaseTunerLayer.set_adapter(self, self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Initialise an adapter."""
        down, up = self.adapter(adapter_name)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)
        if not config.init_weights:
            nn.init.kaiming_uniform_(up.weight, a=math.sqrt(5))
        elif config.init_method == "identity":
            nn.init.zeros_(up.weight)
        else:
            for layer in (down, up):
                limit = 2 * _HOULSBY_DEVIATION
                nn.init.trunc_normal_(layer.weight, std=_HOULSBY_DEVIATION, a=-limit, b=limit)

    @torch.no_grad()
    def set_weighted(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Give an adapter the weighted sum of others: side by side in one bottleneck."""
        down, up = self.adapter(adapter_name)
        for parameter in (*down.parameters(), *up.parameters()):
            parameter.zero_()
        bias, start = torch.zeros_like(up.bias), 0
        for name, weight in zip(adapters, weights):
            if not self.holds(name):
                continue
            one_down, one_up = self.adapter(name)
            part = slice(start, start + one_down.out_features)
            down.weight[part], down.bias[part] = one_down.weight, one_down.bias
            up.weight[:, part] = weight * one_up.weight
            bias += weight * one_up.bias
            start = part.stop
        up.bias.copy_(bias)

    def change(self, output: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """What one adapter adds to the layer's output `[..., out]`; of its shape and dtype."""
        down, up = self.adapter(adapter_name)
        inner = self.bottleneck_activation[adapter_name](
            down(BaseTunerLayer._cast_input_dtype(self, output, down.weight.dtype))
        )
        return up(inner).to(output.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Refuse: a non-linear adapter has no place in a weight.

        Raises:
            ValueError: Always.
        """
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Warn that nothing is merged."""
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: Optional[list[str]] = None, **kwargs: Any
    ) -> torch.Tensor:
        """`[..., in] -> [..., out]`; `adapter_names` gives each sample of the batch its own adapter (inference)."""
        if adapter_names is None:
            found = mixed_forward(self, x, args, kwargs)
            if found is not None:
                return found
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return output
        if adapter_names is not None:
            check_length(len(adapter_names), len(x))
            return output + self._mixed_change(output, adapter_names)
        changes = [self.change(output, name) for name in self.active_adapters if name in self.bottleneck_down]
        for change in changes:
            output = output + change
        return output

    def _mixed_change(self, output: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        changes = torch.zeros_like(output)
        for name in dict.fromkeys(adapter_names):
            if name in self.bottleneck_down:
                rows = [row for row, chosen in enumerate(adapter_names) if chosen == name]
                changes[rows] = self.change(output[rows], name)
        return changes

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()
