# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What an adapter file holds: for every layer its plain scales and a fingerprint of the codes that they belong to.

<layer>.peqa_scale   float [out, groups]
<layer>.peqa_codes   int64 [1], see PackedLinear.fingerprint
"""

from __future__ import annotations

import torch
from torch import nn

from peft_ext.peqa.config import PeqaConfig
from peft_ext.peqa.layer import PeqaLayer


_SCALE, _CODES, _DELTA = "peqa_scale", "peqa_codes", "peqa_delta"
_PEFT_PREFIX = "base_model.model."


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
        delta = result.pop(f"{name}.{_DELTA}.{adapter_name}", None)
        if delta is None:
            continue
        base = layer.base_scale() if layer.merged else state_dict.get(f"{name}.base_layer.scale", layer.base_scale())
        with torch.no_grad():
            result[f"{name}.{_SCALE}.{adapter_name}"] = layer.scale_for(delta, base, adapter_name)
        codes = torch.tensor([layer.base_layer.fingerprint()], dtype=torch.int64)
        result[f"{name}.{_CODES}.{adapter_name}"] = codes
    return result


def from_file(
    model: nn.Module, config: PeqaConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Check a file's fingerprints and scales against the model, and turn the scales into deltas.

    Raises:
        ValueError: If the file belongs to other codes, or its scales don't fit or aren't finite; names the layer.
    """
    result = dict(state_dict)
    for name, layer in _layers(model, adapter_name).items():
        scale, codes = (_pop(result, f"{name}.{key}") for key in (_SCALE, _CODES))
        if scale is None:
            continue  # PEFT reports the missing delta
        where = f"adapter {adapter_name!r}, layer {name.removeprefix(_PEFT_PREFIX)!r}"
        _check_codes(codes, layer, config, where)
        _check_scale(scale, layer, where)
        delta = layer.delta_of(scale.to(layer.base_scale().device), adapter_name)
        result[f"{name}.{_DELTA}"] = delta.to(layer.peqa_delta[adapter_name].dtype)
    left = [key for key in result if key.endswith((f".{_SCALE}", f".{_CODES}"))]
    if left:
        raise ValueError(
            f"the adapter file has {left[0]!r} ({len(left)} such entries), but the adapter {adapter_name!r} does not "
            f"tune that layer here. It belongs to {_base(config)}; load it onto that, with its own adapter_config.json."
        )
    return result


def _check_codes(codes: torch.Tensor | None, layer: PeqaLayer, config: PeqaConfig, where: str) -> None:
    if codes is None or codes.dtype != torch.int64 or codes.numel() != 1:
        raise ValueError(
            f"{where}: the file has no fingerprint of the codes; it is damaged or not a peft-ext adapter."
        )
    if int(codes) != layer.base_layer.fingerprint():
        raise ValueError(
            f"{where}: the adapter was trained on other integer codes than this model has, so its scales mean nothing "
            f"here. It belongs to {_base(config)} at {config.bits} bits, group_size={config.group_size}, "
            f"init_method={config.init_method!r}: load that (a float base in the same dtype as in training), or "
            "the packed base that was saved beside the adapter."
        )


def _check_scale(scale: torch.Tensor, layer: PeqaLayer, where: str) -> None:
    expected = layer.base_scale().shape
    if scale.shape != expected:
        raise ValueError(f"{where}: scales of shape {tuple(scale.shape)}, expected {tuple(expected)}.")
    if not scale.is_floating_point() or not torch.isfinite(scale).all():
        raise ValueError(f"{where}: the scales have NaN or infinity (or aren't float); the file is damaged.")


def _base(config: PeqaConfig) -> str:
    return (
        f"the base model {config.base_model_name_or_path!r}"
        if config.base_model_name_or_path
        else "another base model"
    )


def _layers(model: nn.Module, adapter_name: str) -> dict[str, PeqaLayer]:
    return {
        name.removeprefix("_fsdp_wrapped_module."): module
        for name, module in model.named_modules()
        if isinstance(module, PeqaLayer) and adapter_name in module.peqa_delta
    }


def _pop(state_dict: dict[str, torch.Tensor], key: str) -> torch.Tensor | None:
    """Keys have PEFT's prefix in files; a model into which layers were injected directly has none."""
    return state_dict.pop(key, state_dict.pop(_PEFT_PREFIX + key, None))
