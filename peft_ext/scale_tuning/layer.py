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
from peft_ext.sharding import gathered_for_now, is_dtensor, whole


_NONE = nn.ModuleDict({})  # of tuners without zero points


class Mixture:
    """Which adapter each sample of a batch uses; made once for a forward or a whole `generate`, for all layers.

    Args:
        adapter_names: One for each sample; `"__base__"` for none.
    """

    def __init__(self, adapter_names: list[str]) -> None:
        self.names = list(dict.fromkeys(adapter_names)) or ["__base__"]
        index = {name: position for position, name in enumerate(self.names)}
        self.choice = torch.tensor([index[name] for name in adapter_names], dtype=torch.int64)
        self._scales: dict[ScaleTuningLinear, tuple[torch.Tensor, Optional[torch.Tensor]]] = {}

    def of_rows(self, samples: torch.Tensor) -> Mixture:
        """The same for rows that are parts of samples, `samples` says of which; stacked scales are shared."""
        rows = copy.copy(self)
        rows.choice = self.choice[samples.to(self.choice.device)]
        return rows

    def scales_of(self, layer: ScaleTuningLinear) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The scales of the adapters in one layer `[n, out, groups(, bits)]`, and their zero points where any has its own."""
        if layer in self._scales:
            return self._scales[layer]
        found = layer.stacked_scales(self.names), layer.stacked_zero_points(self.names)
        if found[0][0].numel() == layer.out_features:
            # per channel they are little, and stacking them would take as long as a token's product
            self._scales[layer] = found
        return found


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

    An adapter that trains zero points has a second tensor for them, `[out, groups]`: zero point = z0 + delta, whatever the
    parametrisation of the scale.
    """

    prefix: str  # of the tuner's parameters
    adapter_layer_names: tuple[
        str, ...
    ]  # `("<prefix>delta",)`, and `"<prefix>zero_delta"` where zero points can be trained
    other_param_names: tuple[str, ...] = ("parametrization",)

    base_layer: PackedLinear
    active_adapters: list[str]
    # while adapters are merged: the base's own scale and zero point, so that unmerging is exact
    unmerged_scale: Optional[torch.Tensor]
    unmerged_zero_point: Optional[torch.Tensor]

    def __init__(self, base_layer: PackedLinear, adapter_name: str, config: ScaleTuningConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict({}))
        self.parametrization: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.register_buffer("unmerged_scale", None, persistent=False)
        self.register_buffer("unmerged_zero_point", None, persistent=False)
        self._unmerged_sym = False
        self._active_adapter: str | list[str] = adapter_name
        self.unfrozen: set[str] = set()  # adapters that may require gradients
        self.update_layer(adapter_name, config)

    @property
    def deltas(self) -> nn.ModuleDict:
        """The adapters' [`Delta`]s by name."""
        return getattr(self, f"{self.prefix}delta")

    @property
    def zero_deltas(self) -> nn.ModuleDict:
        """The [`Delta`]s of zero points by the names of those adapters that train them."""
        return getattr(self, f"{self.prefix}zero_delta", _NONE)

    def holds(self, adapter_name: str) -> bool:
        """Whether the layer has the adapter."""
        return adapter_name in self.deltas

    def delta(self, adapter_name: str) -> torch.Tensor:
        """The trained tensor of one adapter."""
        return self.deltas[adapter_name].weight  # type: ignore[return-value]

    def zero_delta(self, adapter_name: str) -> Optional[torch.Tensor]:
        """What an adapter adds to the zero points; None if it doesn't train them."""
        deltas = self.zero_deltas
        return deltas[adapter_name].weight if adapter_name in deltas else None  # type: ignore[return-value]

    def product_options(self) -> dict[str, Any]:
        """What the tuner asks of the layer's product; arguments of [`PackedLinear`]'s forward."""
        return {}

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter."""
        scale, dtype = self.base_layer.scale, self.base_layer.compute_dtype
        if config.inference_mode:  # to be loaded, perhaps by who doesn't widen half precision as PEFT does
            dtype = torch.promote_types(dtype, torch.float32)
        shapes = {f"{self.prefix}delta": config.trained_shape(scale.shape)}
        if config.trains_zero_points:
            shapes[f"{self.prefix}zero_delta"] = tuple(scale.shape)
        for kind, shape in shapes.items():
            delta = torch.zeros(shape, dtype=dtype, device=scale.device)
            if not config.init_weights:
                delta.normal_(std=0.1)
            getattr(self, kind)[adapter_name] = Delta(delta)
        self.parametrization[adapter_name] = config.parametrization
        self.unfrozen.add(adapter_name)
        BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; trained from now on, unless `inference_mode` is True.

        PEFT's own looks at every adapter of a layer: half a second with a thousand of them. The others are frozen already.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for deltas in (self.deltas, self.zero_deltas):
            for name in self.unfrozen.union(names):
                if name in deltas and (delta := deltas[name].weight).is_leaf:  # a parametrised one isn't
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

    def base_zero_point(self) -> Optional[torch.Tensor]:
        """The zero point of the base layer, whatever is merged into it at the moment."""
        return self.base_layer.zero_point if self.unmerged_zero_point is None else self.unmerged_zero_point

    def fingerprint(self, planes: Optional[torch.Tensor] = None, zero_point: Optional[torch.Tensor] = None) -> int:
        """As [`PackedLinear.fingerprint`], of the base layer without what is merged into it."""
        zero_point = zero_point if self.unmerged_zero_point is None else self.unmerged_zero_point
        return self.base_layer.fingerprint(planes, zero_point)

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

    def zero_point_for(self, delta: torch.Tensor, base: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The zero points that a delta makes of the base's; of the delta's shape, which may have more dimensions in front.

        Args:
            base: Where the layer's own are sharded and have been gathered already: the whole ones.
        """
        base = self.base_zero_point() if base is None else base
        assert base is not None  # only integers have deltas of zero points
        dtype = torch.promote_types(torch.promote_types(delta.dtype, self.base_scale().dtype), torch.float32)
        return base.to(device=delta.device, dtype=dtype) + delta.to(dtype)

    def zero_delta_of(self, zero_point: torch.Tensor) -> torch.Tensor:
        """The delta for which [`zero_point_for`] gives `zero_point`."""
        base = self.base_zero_point()
        assert base is not None
        dtype = torch.promote_types(zero_point.dtype, torch.float32)
        return zero_point.to(dtype) - base.to(device=zero_point.device, dtype=dtype)

    def combined_zero_point(self, adapter_names: list[str]) -> Optional[torch.Tensor]:
        """The zero points of several adapters, their deltas summed; None if none of them trains any."""
        if not self.zero_deltas:
            return None
        found = [delta for name in adapter_names if (delta := self.zero_delta(name)) is not None]
        return self.zero_point_for(sum(found[1:], found[0])) if found else None

    @torch.no_grad()
    def stacked_zero_points(self, adapter_names: list[str]) -> Optional[torch.Tensor]:
        """The zero points of several adapters `[n, out, groups]`, for inference; None if none of them trains any."""
        found = [self.zero_delta(name) for name in adapter_names] if self.zero_deltas else []
        like = next((delta for delta in found if delta is not None), None)
        if like is None:
            return None
        return self.zero_point_for(torch.stack([torch.zeros_like(like) if one is None else one for one in found]))

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
        zero_delta = self.zero_delta(adapter_name)
        if zero_delta is not None:
            zero_delta.zero_()
            for name, weight in zip(adapters, weights):
                own = self.zero_delta(name)
                if own is not None:
                    zero_delta.add_(own, alpha=weight)

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
        base = self.base_layer
        self._check_writable()
        with torch.no_grad():
            scale = self.combined_scale([*self.merged_adapters, *names])
            zero_point = self.combined_zero_point([*self.merged_adapters, *names])
            assert scale is not None  # names isn't empty
            if safe_merge and not all(
                whole(torch.isfinite(one).all()) for one in (scale, zero_point) if one is not None
            ):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
            if zero_point is not None:
                self._check_takes_zero_points()
            # in place: who shards the model gathers from these very tensors
            if self.unmerged_scale is None:
                self.unmerged_scale = base.scale.detach().clone()
            base.scale.copy_(scale)
            if zero_point is not None:
                assert base.zero_point is not None
                if self.unmerged_zero_point is None:
                    self.unmerged_zero_point, self._unmerged_sym = base.zero_point.detach().clone(), base.sym
                if base.zero_point.is_floating_point():
                    base.zero_point.copy_(zero_point)
                else:
                    base.set_zero_point(zero_point.to(self.unmerged_scale.dtype))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give the base layer its own scale back, to the bit."""
        if self.unmerged_scale is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._check_writable()
        base, before = self.base_layer, self.unmerged_zero_point
        with torch.no_grad():
            base.scale.copy_(self.unmerged_scale)
            if before is not None:
                assert base.zero_point is not None
                if before.is_floating_point():
                    base.zero_point.copy_(before)
                else:
                    base.set_zero_point(before, self._unmerged_sym)
        self.unmerged_scale = self.unmerged_zero_point = None
        self.merged_adapters.clear()

    def _check_writable(self) -> None:
        """Refuse to write to what is lost when the layer's parts are next gathered."""
        if gathered_for_now(self.base_layer, self.base_layer.scale):
            raise ValueError(
                "FSDP2 has gathered this layer's scales at the moment, so what is merged into them would be lost; call "
                "model.reshard() on the outermost wrapped module before merging or unmerging."
            )
        if hasattr(self.base_layer.scale, "ds_id"):
            raise ValueError(
                "DeepSpeed ZeRO-3 has the scales in pieces, into which nothing can be merged; save the adapter (save_pretrained "
                "of trainer.save_model) and merge it in a process without DeepSpeed."
            )

    def _check_takes_zero_points(self) -> None:
        base = self.base_layer
        if is_dtensor(base.scale) and base.zero_point is not None and not base.zero_point.is_floating_point():
            raise ValueError(
                "the trained zero points are float and the base's are integers, whose place they can't take while FSDP2 shards "
                "the model; save the adapter and merge it in one process."
            )

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
            if self.unmerged_scale is not None and is_dtensor(self.unmerged_scale):  # nothing is written in a forward
                zero_point = None if self.unmerged_zero_point is None else whole(self.unmerged_zero_point)
                return self.base_layer(x, scale=whole(self.unmerged_scale), zero_point=zero_point)
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x)
        return self.base_layer(
            x,
            scale=self.combined_scale(self.active_adapters),
            zero_point=self.combined_zero_point(self.active_adapters),
            **self.product_options(),
        )

    def _mixed_batch_forward(self, x: torch.Tensor, mixture: Mixture) -> torch.Tensor:
        check_length(len(mixture.choice), len(x))
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        scales, zero_points = mixture.scales_of(self)
        return self.base_layer.forward_mixed(x, scales, mixture.choice.to(x.device), zero_points)

    def _apply(self, fn, recurse=True):
        # what unmerging gives back stays as precise as it was, as the base layer's own does
        before = {name: getattr(self, name) for name in ("unmerged_scale", "unmerged_zero_point")}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, name)
            if tensor is not None and torch.promote_types(after.dtype, tensor.dtype) != after.dtype:
                setattr(self, name, tensor.to(after.device))
        return self

    def __repr__(self) -> str:
        return self.prefix.replace("_", ".") + super().__repr__()


def trained_part(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The scales that an adapter trains, of all; `like` has the adapter's shape."""
    return scale if scale.shape == like.shape else scale[..., : like.shape[-1]]
