# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What an adapter file holds: for every layer its plain scales and a fingerprint of the codes that they belong to.

<layer>.peqa_scale          float [out, groups]
<layer>.peqa_codes          int64 [1], see PackedLinear.fingerprint
<layer>.peqa_zero_point     float [out, groups], where zero points are trained

<layer>.alphatuning_scale   float [out, groups, trained alphas]
<layer>.alphatuning_codes   int64 [1]
<layer>.alphatuning_frozen  float [4], where not all alphas are trained: what identifies the others
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Optional

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from peft_ext.scale_tuning.config import BASE, ScaleTuningConfig
from peft_ext.scale_tuning.layer import ScaleTuningLinear
from peft_ext.sharding import is_dtensor


# after the tuner's prefix
_SCALE, _CODES, _FROZEN, _DELTA = "scale", "codes", "frozen", "delta"
_ZERO_POINT, _ZERO_DELTA = "zero_point", "zero_delta"
_PEFT_PREFIX = "base_model.model."
# Frozen alphas may have been rounded to another dtype, but not tuned; relative to their norm.
_FROZEN_TOLERANCE = 0.01


def to_file(
    model: nn.Module, adapter_name: str, selected: dict[str, torch.Tensor], state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Replace deltas by plain scales and add fingerprints.

    Args:
        model: Holds the tuner layers.
        adapter_name: The adapter that is saved.
        selected: The adapter's part of `state_dict`, keys with the adapter's name.
        state_dict: The model's state dict; gathered, where the model is sharded.
    """
    result = dict(selected)
    for name, layer in _layers(model, adapter_name).items():
        key = f"{name}.{layer.prefix}"
        delta = result.pop(f"{key}{_DELTA}.{adapter_name}.weight", None)
        if delta is None:
            continue
        if layer.merged and is_dtensor(layer.base_scale()):
            raise ValueError("the model is sharded and has merged adapters; call unmerge_adapter() before saving one.")
        base = layer.base_scale() if layer.merged else state_dict.get(f"{name}.base_layer.scale", layer.base_scale())
        with torch.no_grad():
            result[f"{key}{_SCALE}.{adapter_name}"] = layer.scale_for(delta, base, adapter_name)
            if delta.shape != base.shape:
                result[f"{key}{_FROZEN}.{adapter_name}"] = _projections_of_frozen(base, delta)
        # of a sharded model only one process may come here, so nothing is gathered that is there already
        planes, zero_point = (state_dict.get(f"{name}.base_layer.{part}") for part in ("planes", "zero_point"))
        zero_delta = result.pop(f"{key}{_ZERO_DELTA}.{adapter_name}.weight", None)
        if zero_delta is not None:
            with torch.no_grad():
                result[f"{key}{_ZERO_POINT}.{adapter_name}"] = layer.zero_point_for(
                    zero_delta, zero_point if layer.unmerged_zero_point is None else None
                )
        codes = torch.tensor([layer.fingerprint(planes, zero_point)], dtype=torch.int64)
        result[f"{key}{_CODES}.{adapter_name}"] = codes
    return result


def from_file(
    model: nn.Module, config: ScaleTuningConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Check a file's fingerprints and scales against the model, and turn the scales into deltas.

    Raises:
        ValueError: If the file belongs to other codes, or its scales don't fit or aren't finite; names the layer.
    """
    result = dict(state_dict)
    layers = _layers(model, adapter_name)
    for name, layer in layers.items():
        where = f"adapter {adapter_name!r}, layer {name.removeprefix(_PEFT_PREFIX)!r}"
        own, base = layer.delta(adapter_name), layer.base_scale()
        found = _take(result, f"{name}.{layer.prefix}", layer.fingerprint, base, own.shape, config, where)
        if found is None:
            continue  # PEFT reports the missing delta
        delta = layer.delta_of(found.scale.to(base.device), adapter_name)
        result[f"{name}.{layer.prefix}{_DELTA}.weight"] = delta.to(own.dtype)
        if found.zero_point is not None:
            zero_delta = layer.zero_delta_of(found.zero_point.to(base.device))
            result[f"{name}.{layer.prefix}{_ZERO_DELTA}.weight"] = zero_delta.to(own.dtype)
    _refuse_other_layers(result, {layer.prefix for layer in layers.values()}, config, adapter_name)
    return result


class Plain(NamedTuple):
    """What a file has for a layer: float `scale` `[out, groups]`, of a binary coding the trained alphas `[out, groups,
    trained]`; and float `zero_point` `[out, groups]`, or None where zero points aren't trained."""

    scale: torch.Tensor
    zero_point: Optional[torch.Tensor]


def plain_scales(
    tensors: Mapping[str, torch.Tensor],
    base_scales: Mapping[str, torch.Tensor],
    fingerprint: Callable[[str], int],
    config: ScaleTuningConfig,
    adapter_name: str,
) -> dict[str, Plain]:
    """A file's scales by layer, checked against a packed base that has no tuner layers.

    Args:
        tensors: What the file holds.
        base_scales: The scales of the base's packed layers without any adapter, by the layer's name.
        fingerprint: Gives a layer's fingerprint, by its name.
        config, adapter_name: Of the adapter.

    Returns:
        [`Plain`] for each layer that the adapter tunes.

    Raises:
        ValueError: As [`from_file`], and if the file has no scales, or other tensors beside them.
    """
    left, found = dict(tensors), {}
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    for name, base in base_scales.items():
        where = f"adapter {adapter_name!r}, layer {name!r}"
        own = partial(fingerprint, name)
        plain = _take(left, f"{name}.{prefix}", own, base, config.trained_shape(base.shape), config, where)
        if plain is not None:
            found[name] = plain
    _refuse_other_layers(left, {prefix}, config, adapter_name)
    if not found:
        raise ValueError(f"adapter {adapter_name!r}: its file has no scales ({len(tensors)} other tensors).")
    if left:
        raise ValueError(
            f"adapter {adapter_name!r} has trained tensors beside its scales ({min(left)!r}; {len(left)} in all), which an "
            "adapter pool has no room for; load it through PeftModel.from_pretrained."
        )
    return found


def _take(
    tensors: dict[str, torch.Tensor],
    key: str,
    fingerprint: Callable[[], int],
    base: torch.Tensor,
    trained: Sequence[int],
    config: ScaleTuningConfig,
    where: str,
) -> Optional[Plain]:
    """Take a layer's entries out of `tensors` and check them; None if it has no scale there."""
    scale, codes, frozen = (_pop(tensors, key + part) for part in (_SCALE, _CODES, _FROZEN))
    if scale is None:
        return None
    zero_point = _pop(tensors, key + _ZERO_POINT)
    if zero_point is not None and not config.trains_zero_points:
        raise ValueError(
            f"{where}: the file has trained zero points, but its adapter_config.json doesn't say trained='scales+zeros'; it is "
            "another adapter's. Save or download both again."
        )
    _check_codes(codes, fingerprint, config, where)
    if scale.shape != torch.Size(trained):
        raise ValueError(f"{where}: scales of shape {tuple(scale.shape)}, expected {tuple(trained)}.")
    if not scale.is_floating_point() or not torch.isfinite(scale).all():
        raise ValueError(f"{where}: the scales have NaN or infinity (or aren't float); the file is damaged.")
    _check_frozen(frozen, base, scale, where)
    if config.trains_zero_points:
        if zero_point is None or zero_point.shape != base.shape:
            found = "no zero points" if zero_point is None else f"zero points of shape {tuple(zero_point.shape)}"
            raise ValueError(f"{where}: {found}, expected {tuple(base.shape)}, since trained={config.trained!r}.")
        if not zero_point.is_floating_point() or not torch.isfinite(zero_point).all():
            raise ValueError(f"{where}: the zero points have NaN or infinity (or aren't float); the file is damaged.")
    return Plain(scale, zero_point)


def _refuse_other_layers(
    left: dict[str, torch.Tensor], prefixes: set[str], config: ScaleTuningConfig, adapter_name: str
) -> None:
    endings = tuple(f".{prefix}{key}" for prefix in prefixes for key in (_SCALE, _CODES, _FROZEN, _ZERO_POINT))
    others = [key for key in left if key.endswith(endings)]
    if others:
        raise ValueError(
            f"the adapter file has {others[0]!r} ({len(others)} such entries), but the adapter {adapter_name!r} does "
            f"not tune that layer here. It belongs to {_base(config)}; load it onto that, with its own "
            "adapter_config.json."
        )


def _check_codes(
    codes: torch.Tensor | None, fingerprint: Callable[[], int], config: ScaleTuningConfig, where: str
) -> None:
    if codes is None or codes.dtype != torch.int64 or codes.numel() != 1:
        raise ValueError(
            f"{where}: the file has no fingerprint of the codes; it is damaged or not a peft-ext adapter."
        )
    if int(codes) != fingerprint():
        raise ValueError(
            f"{where}: the adapter was trained on other integer codes than this model has, so its scales mean nothing "
            f"here. It belongs to {_base(config)}{_format(config)}: load that (a float base in the same dtype as in "
            "training), or the packed base that was saved beside the adapter."
        )


def _check_frozen(frozen: torch.Tensor | None, base: torch.Tensor, trained: torch.Tensor, where: str) -> None:
    if trained.shape == base.shape:
        return
    expected = _projections_of_frozen(base, trained)
    if frozen is None or frozen.shape != expected.shape or not frozen.is_floating_point():
        raise ValueError(f"{where}: the file has nothing that identifies the frozen alphas; it is damaged.")
    tolerance = _FROZEN_TOLERANCE * torch.linalg.vector_norm(_frozen_part(base, trained)).item()
    if not torch.allclose(frozen.to(expected), expected, rtol=0.0, atol=tolerance):
        raise ValueError(
            f"{where}: this base has the adapter's codes but other alphas beside the first ones, such as those of an "
            "adapter with trained_alphas='all' that was merged into it; load the adapter onto its own base."
        )


def _projections_of_frozen(base: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """Four projections `[4]` of the alphas that an adapter leaves as they are.

    They move as far as the alphas do, so that they tell tuned ones from rounded ones, which a hash can't.
    """
    frozen = _frozen_part(base, trained)
    golden_angle = 2.399963  # waves of many frequencies, as good as random directions
    steps = torch.arange(1, 5, dtype=torch.float64, device=frozen.device) * golden_angle
    at = torch.arange(frozen.numel(), dtype=torch.float64, device=frozen.device)
    return torch.stack([(torch.cos(at * step) * frozen).sum() for step in steps]).float()


def _frozen_part(base: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    return base[..., trained.shape[-1] :].detach().double().flatten()


def _base(config: ScaleTuningConfig) -> str:
    if config.needs_data:
        made_from = (
            f", made from or lying at {config.base_model_name_or_path!r}," if config.base_model_name_or_path else ""
        )
        return f"the packed base that model.unload().save_pretrained(...) wrote{made_from}"
    return (
        f"the base model {config.base_model_name_or_path!r}"
        if config.base_model_name_or_path
        else "another base model"
    )


def _format(config: ScaleTuningConfig) -> str:
    if config.bits == BASE:
        return ", packed in several formats"
    return f" at {config.bits} bits, group_size={config.group_size}, init_method={config.init_method!r}"


def _layers(model: nn.Module, adapter_name: str) -> dict[str, ScaleTuningLinear]:
    return {
        name.removeprefix("_fsdp_wrapped_module."): module
        for name, module in model.named_modules()
        if isinstance(module, ScaleTuningLinear) and adapter_name in module.deltas
    }


def _pop(state_dict: dict[str, torch.Tensor], key: str) -> torch.Tensor | None:
    """Keys have PEFT's prefix in files; a model into which layers were injected directly has none."""
    return state_dict.pop(key, state_dict.pop(_PEFT_PREFIX + key, None))
