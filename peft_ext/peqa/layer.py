# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The tuner layer of PEQA: a packed linear layer and, for every adapter, what its scales add to the base's."""

from __future__ import annotations

import warnings
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from peft_ext.peqa.config import PeqaConfig
from peft_ext.quant.linear import PackedLinear


class PeqaLayer(BaseTunerLayer):
    """Adapter bookkeeping. The trained tensor of an adapter is `delta` `[out, groups]`, zero at the start:

    scale = s0 * (1 + delta) (relative), s0 * exp(delta) (log) or s0 + delta (absolute), with s0 the base layer's
    scale.
    """

    adapter_layer_names: tuple[str, ...] = ("peqa_delta",)
    other_param_names: tuple[str, ...] = ("peqa_parametrization",)

    unmerged_scale: Optional[
        torch.Tensor
    ]  # while adapters are merged: the base's own scale, so that unmerging is exact
    base_layer: PackedLinear
    active_adapters: list[str]

    def __init__(self, base_layer: PackedLinear) -> None:
        self.base_layer = base_layer
        self.peqa_delta = nn.ParameterDict({})
        self.peqa_parametrization: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.keep_product = False

    def update_layer(self, adapter_name: str, config: PeqaConfig) -> None:
        """Add an adapter."""
        delta = torch.zeros_like(self.base_layer.scale, dtype=self.base_layer.compute_dtype)
        if not config.init_weights:
            delta.normal_(std=0.1)
        self.peqa_delta[adapter_name] = nn.Parameter(delta)
        self.peqa_parametrization[adapter_name] = config.parametrization
        self.keep_product = self.keep_product or config.keep_product
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def base_scale(self) -> torch.Tensor:
        """The scale of the base layer `[out, groups]`, whatever is merged into it at the moment."""
        return self.base_layer.scale if self.unmerged_scale is None else self.unmerged_scale

    def scale_of(self, adapter_name: str) -> torch.Tensor:
        """The scale of one adapter `[out, groups]`."""
        return self.scale_for(self.peqa_delta[adapter_name], self.base_scale(), adapter_name)

    def scale_for(self, delta: torch.Tensor, base: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The scale that `delta` makes of `base` under an adapter's parametrisation; all `[out, groups]`."""
        kind = self.peqa_parametrization[adapter_name]
        if kind == "absolute":
            return base + delta
        return base * (1 + delta if kind == "relative" else delta.exp())

    def delta_of(self, scale: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The delta for which [`scale_of`] gives `scale` `[out, groups]`.

        Raises:
            ValueError: If no delta does: a log-parametrised scale can't change its sign.
        """
        base = self.base_scale().detach().to(scale)
        kind = self.peqa_parametrization[adapter_name]
        if kind == "absolute":
            return scale - base
        if kind == "relative":
            return scale / base - 1
        if not (scale / base > 0).all():
            raise ValueError("parametrization='log' can't stand for scales of another sign; use 'relative'.")
        return (scale / base).log()

    def combined_scale(self, adapter_names: list[str]) -> Optional[torch.Tensor]:
        """The scale of several adapters: what each adds to the base's is summed. None if the layer has none of
        them."""
        names = [name for name in adapter_names if name in self.peqa_delta]
        if not names:
            return None
        scale = self.scale_of(names[0])
        for name in names[1:]:
            scale = scale + (self.scale_of(name) - self.base_scale())
        return scale

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # no dtype: loaded deltas must not be rounded to a half precision base's
        return self.base_layer.scale.device, None


class PeqaLinear(nn.Module, PeqaLayer):
    """A [`PackedLinear`] whose scales adapters replace."""

    def __init__(self, base_layer: PackedLinear, adapter_name: str, config: PeqaConfig) -> None:
        super().__init__()
        PeqaLayer.__init__(self, base_layer)
        self.register_buffer("unmerged_scale", None, persistent=False)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Write the adapters' scales into the base layer.

        Args:
            safe_merge (`bool`, *optional*):
                Check the merged scales for NaN and infinity first, and leave the layer as it was if there are any.
            adapter_names (`list[str]`, *optional*):
                The adapters to merge; all active ones by default.

        Raises:
            ValueError: If `safe_merge` finds NaN or infinity.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in adapter_names or [] if name in self.peqa_delta]
        if not names:
            return
        with torch.no_grad():
            scale = self.combined_scale([*self.merged_adapters, *names])
            assert scale is not None  # names isn't empty
            if safe_merge and not torch.isfinite(scale).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
            if self.unmerged_scale is None:
                self.unmerged_scale = self.base_layer.scale.data
            self.base_layer.scale.data = scale.to(self.unmerged_scale.dtype)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give the base layer its own scale back, to the bit."""
        if self.unmerged_scale is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer.scale.data = self.unmerged_scale
        self.unmerged_scale = None
        self.merged_adapters.clear()

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: Optional[list[str]] = None, **kwargs: Any
    ) -> torch.Tensor:
        """`[..., in] -> [..., out]`; `adapter_names` gives each sample of the batch its own adapter (inference)."""
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x)
        return self.base_layer(x, scale=self.combined_scale(self.active_adapters), keep_product=self.keep_product)

    def _mixed_batch_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively. (A model that reshapes its batch before this layer "
                "can't mix adapters in it.)"
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        names = list(dict.fromkeys(adapter_names)) or ["__base__"]
        scales = torch.stack(
            [self.scale_of(name) if name in self.peqa_delta else self.base_scale() for name in names]
        ).detach()
        choice = torch.tensor([names.index(name) for name in adapter_names], device=x.device)
        return self.base_layer.forward_mixed(x, scales, choice)

    def __repr__(self) -> str:
        return "peqa." + super().__repr__()
