# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The tuner layer of all scale tuners: a packed linear layer and, for every adapter, what it changes about the scales."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from peft_ext.mixed_batches import check_length, mixed_forward
from peft_ext.quant.linear import PackedLinear
from peft_ext.scale_tuning.config import ScaleTuningConfig


class Mixture:
    """Which adapter each sample of a batch uses; made once for a forward or a whole `generate`, for all layers.

    Args:
        adapter_names: One for each sample; `"__base__"` for none.
    """

    def __init__(self, adapter_names: list[str]) -> None:
        self.names = list(dict.fromkeys(adapter_names)) or ["__base__"]
        index = {name: position for position, name in enumerate(self.names)}
        self.choice = torch.tensor([index[name] for name in adapter_names], dtype=torch.int64)
        self._scales: dict[ScaleTuningLinear, torch.Tensor] = {}

    def of_rows(self, samples: torch.Tensor) -> Mixture:
        """The same for rows that are parts of samples, `samples` says of which; stacked scales are shared."""
        rows = copy.copy(self)
        rows.choice = self.choice[samples.to(self.choice.device)]
        return rows

    def scales_of(self, layer: ScaleTuningLinear) -> torch.Tensor:
        """The scales of the adapters in one layer `[n, out, groups(, bits)]`."""
        if layer in self._scales:
            return self._scales[layer]
        scales = layer.stacked_scales(self.names)
        if scales[0].numel() == layer.out_features:
            # per channel they are little, and stacking them would take as long as a token's product
            self._scales[layer] = scales
        return scales


class Delta(nn.Module):
    """The trained tensor of one adapter, as `weight`.

    A module of its own, as LoRA's matrices are: TRL's trainers make a reference by copying the parameters whose names
    have `.default.` in them.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class ScaleTuningLinear(nn.Module, BaseTunerLayer):
    """A [`PackedLinear`] whose scales adapters replace; base of the tuners' layers.

    The trained tensor of an adapter is `delta`, zero at the start: scale = s0 * (1 + delta) (relative),
    s0 * exp(delta) (log) or s0 + delta (absolute), with s0 the base layer's scale. `delta` is shaped like the scale,
    `[out, groups]`, or for a binary coding `[out, groups, trained]`, of which the first `trained` alphas are trained.
    """

    prefix: str  # of the tuner's parameters
    adapter_layer_names: tuple[str, ...]  # `("<prefix>delta",)`
    other_param_names: tuple[str, ...] = ("parametrization",)

    base_layer: PackedLinear
    active_adapters: list[str]
    # while adapters are merged: the base's own scale, so that unmerging is exact
    unmerged_scale: Optional[torch.Tensor]

    def __init__(self, base_layer: PackedLinear, adapter_name: str, config: ScaleTuningConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        setattr(self, f"{self.prefix}delta", nn.ModuleDict({}))
        self.parametrization: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.register_buffer("unmerged_scale", None, persistent=False)
        self._active_adapter: str | list[str] = adapter_name
        self.unfrozen: set[str] = set()  # adapters that may require gradients
        self.update_layer(adapter_name, config)

    @property
    def deltas(self) -> nn.ModuleDict:
        """The adapters' [`Delta`]s by name."""
        return getattr(self, f"{self.prefix}delta")

    def holds(self, adapter_name: str) -> bool:
        """Whether the layer has the adapter."""
        return adapter_name in self.deltas

    def delta(self, adapter_name: str) -> torch.Tensor:
        """The trained tensor of one adapter."""
        return self.deltas[adapter_name].weight  # type: ignore[return-value]

    def product_options(self) -> dict[str, Any]:
        """What the tuner asks of the layer's product; arguments of [`PackedLinear`]'s forward."""
        return {}

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter."""
        scale, dtype = self.base_layer.scale, self.base_layer.compute_dtype
        if config.inference_mode:  # to be loaded, perhaps by who doesn't widen half precision as PEFT does
            dtype = torch.promote_types(dtype, torch.float32)
        delta = torch.zeros(config.trained_shape(scale.shape), dtype=dtype, device=scale.device)
        if not config.init_weights:
            delta.normal_(std=0.1)
        self.deltas[adapter_name] = Delta(delta)
        self.parametrization[adapter_name] = config.parametrization
        self.unfrozen.add(adapter_name)
        BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; trained from now on, unless `inference_mode` is True.

        PEFT's own looks at every adapter of a layer: half a second with a thousand of them. The others are frozen already.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        deltas = self.deltas
        for name in self.unfrozen.union(names):
            if name in deltas and (delta := self.delta(name)).is_leaf:  # under FSDP1 it may not be one
                delta.requires_grad_(name in names and not inference_mode)
        self.unfrozen.clear()
        if not inference_mode:
            self.unfrozen.update(names)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        if requires_grad:
            self.unfrozen.update([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def base_scale(self) -> torch.Tensor:
        """The scale of the base layer, whatever is merged into it at the moment."""
        return self.base_layer.scale if self.unmerged_scale is None else self.unmerged_scale

    def scale_of(self, adapter_name: str) -> torch.Tensor:
        """The scale of one adapter, shaped like the base layer's."""
        trained = self.scale_for(self.delta(adapter_name), self.base_scale(), adapter_name)
        return self._with_frozen_part(trained)

    @torch.no_grad()
    def stacked_scales(self, adapter_names: list[str]) -> torch.Tensor:
        """The scales of several adapters `[n, out, groups(, bits)]`, for inference; the base's where the layer lacks one."""
        held = {name: self.delta(name) for name in adapter_names if name in self.deltas}
        if len({(self.parametrization[name], delta.shape) for name, delta in held.items()}) != 1:
            return torch.stack([self.scale_of(name) if name in held else self.base_scale() for name in adapter_names])
        first, delta = next(iter(held.items()))
        stacked = torch.stack([held[name] if name in held else torch.zeros_like(delta) for name in adapter_names])
        return self._with_frozen_part(self.scale_for(stacked, self.base_scale(), first))

    def _with_frozen_part(self, trained: torch.Tensor) -> torch.Tensor:
        """All scales; `trained` are the first of them, `[..., out, groups(, trained)]`."""
        frozen = self.base_scale()[..., trained.shape[-1] :]
        if not frozen.shape[-1]:
            return trained
        return torch.cat([trained, frozen.to(trained.dtype).expand(*trained.shape[:-1], -1)], -1)

    def scale_for(self, delta: torch.Tensor, base: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """What `delta` makes of the trained part of `base` under an adapter's parametrisation; shaped like `delta`."""
        base = trained_part(base, delta)
        delta = delta.to(torch.promote_types(base.dtype, delta.dtype))  # 1 + delta takes more digits than delta
        kind = self.parametrization[adapter_name]
        if kind == "absolute":
            return base + delta
        return base * (1 + delta if kind == "relative" else delta.exp())

    def delta_of(self, scale: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The delta for which [`scale_for`] gives `scale`, which has the delta's shape.

        Raises:
            ValueError: If no delta does: a log-parametrised scale can't change its sign.
        """
        base = trained_part(self.base_scale().detach(), scale).to(scale.device)
        scale = scale.to(base.dtype)
        kind = self.parametrization[adapter_name]
        if kind == "absolute":
            return scale - base
        # a scale of zero stays one, whatever the delta
        ratio = torch.where(base == 0, torch.ones_like(scale), scale / base)
        if kind == "relative":
            return ratio - 1
        if not (ratio > 0).all():
            raise ValueError("parametrization='log' can't stand for scales of another sign; use 'relative'.")
        return ratio.log()

    def combined_scale(self, adapter_names: list[str]) -> Optional[torch.Tensor]:
        """The scale of several adapters, each one's change of the base's summed; None if the layer has none of them."""
        names = [name for name in adapter_names if name in self.deltas]
        if not names:
            return None
        scale = self.scale_of(names[0])
        for name in names[1:]:
            scale = scale + (self.scale_of(name) - self.base_scale())
        return scale

    @torch.no_grad()
    def set_weighted(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Give an adapter the weighted sum of what others change about the base's scale."""
        base, delta = self.base_scale(), self.delta(adapter_name)
        scale = base.clone()
        for name, weight in zip(adapters, weights):
            if self.holds(name):
                scale += weight * (self.scale_of(name) - base)
        delta.copy_(self.delta_of(trained_part(scale, delta), adapter_name))

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # no dtype: loaded deltas must not be rounded to a half precision base's
        return self.base_layer.scale.device, None

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
        names = [name for name in adapter_names or [] if name in self.deltas]
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
        self,
        x: torch.Tensor,
        *args: Any,
        adapter_names: Optional[list[str]] = None,
        mixture: Optional[Mixture] = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`[..., in] -> [..., out]`.

        `adapter_names` gives each sample of the batch its own adapter (inference), and so does `mixture`, which all
        layers share.
        """
        if adapter_names is not None:
            mixture = Mixture(adapter_names)
        if mixture is not None:
            return self._mixed_batch_forward(x, mixture)
        found = mixed_forward(self, x, args, kwargs)
        if found is not None:
            return found
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x)
        return self.base_layer(x, scale=self.combined_scale(self.active_adapters), **self.product_options())

    def _mixed_batch_forward(self, x: torch.Tensor, mixture: Mixture) -> torch.Tensor:
        check_length(len(mixture.choice), len(x))
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        return self.base_layer.forward_mixed(x, mixture.scales_of(self), mixture.choice.to(x.device))

    def __repr__(self) -> str:
        return self.prefix.replace("_", ".") + super().__repr__()


def trained_part(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The scales that an adapter trains, of all; `like` has the adapter's shape."""
    return scale if scale.shape == like.shape else scale[..., : like.shape[-1]]
