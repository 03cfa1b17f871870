# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How a model's layers become packed under a tuner's config: which, by which initialisation, and what can't be."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping
from dataclasses import asdict
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import skip_init_on_device
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from peft_ext.checkpoint import pack_quantized
from peft_ext.quant.conversion import LINEAR_LAYERS, check_layer, quantize_layer, weight_of
from peft_ext.quant.formats import LATTICE, NumberFormat, same_format
from peft_ext.quant.lattice import find_lattice
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.packed_module import replace_layer
from peft_ext.quant.replaceable import acts_linearly, check_own_weight
from peft_ext.scale_tuning.config import BASE, DEFAULT_BITS, DEFAULT_GROUP_SIZE, ScaleTuningConfig
from peft_ext.targets import check_supported


@skip_init_on_device
def pack_layer(
    module: Any,
    config: ScaleTuningConfig,
    name: str,
    hessian: Optional[torch.Tensor] = None,
    shift: Optional[torch.Tensor] = None,
) -> PackedLinear:
    """The packed counterpart of a layer. Codes that exist are taken over; a float weight is quantised.

    Args:
        module: `nn.Linear`, `Conv1D`, a compressed-tensors layer or a [`PackedLinear`].
        config: Format and initialisation.
        name: The layer's name, for messages and `bits_pattern`.
        hessian, shift: `[in, in]`, for the calibrated initialisation; see `quantize_calibrated`.

    Raises:
        ValueError: If the weight can't be quantised so; names the layer.
    """
    if isinstance(module, PackedLinear):
        return module
    if pack_quantized.is_compressed(module):
        return pack_quantized.take_over(module, name)
    # a calibrated initialisation that saw no input for this layer falls back on the best without data
    number_format = config.format_of(name)
    fallback = config.init_method == LATTICE or (config.needs_data and hessian is None)  # a lattice was taken before
    method = number_format.default_method if fallback else config.init_method
    packed = quantize_layer(module, number_format, method, name, hessian, shift)
    packed.origin = method
    return packed


def take_lattices(config: ScaleTuningConfig, model: nn.Module, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Pack, in place, the float layers whose weights lie on a lattice of a format that the config allows (any that packed
    layers have, where it leaves bits and groups open); say which don't, since they will be rounded.

    Returns:
        The targets, packed layers in the place of those that were found.
    """
    sym, zero = getattr(config, "sym", None), getattr(config, "zero", None)
    several, found, left = modules_with_several_names(model), dict(targets), []
    floats = {
        name: module
        for name, module in targets.items()
        if isinstance(module, LINEAR_LAYERS)
        and not pack_quantized.is_packed(module)
        and module.weight.device.type != "meta"
    }
    for name, module in tqdm(
        floats.items(), desc="Looking for lattices", unit="layer", delay=1.0, disable=None, leave=False
    ):
        bits, group_size = config.asked_of(name)
        suits = module not in several and acts_linearly(module)
        asked = None if bits == BASE else bits
        lattice = find_lattice(weight_of(module), asked, group_size, sym, zero) if suits else None  # type: ignore[arg-type]
        if lattice is None:
            left.append(name)
            continue
        layer = PackedLinear.from_quantized(
            lattice.quantized,
            lattice.bits,
            module.bias,
            sym=lattice.sym,
            conv1d=isinstance(module, Conv1D),
            compute_dtype=module.weight.dtype,
        )
        layer.origin = LATTICE
        replace_layer(model, name, layer)
        found[name] = layer
    if left:
        warnings.warn(
            f"init_method={LATTICE!r}: the weights of {len(floats) - len(left)} of {len(floats)} layers lie on a lattice and are "
            f"taken over exactly; the others, such as {left[0]!r}, don't in any format that the config allows, and are rounded "
            f"by {config.number_format_cls.default_method!r}.",
            stacklevel=2,
        )
    return found


def modules_with_several_names(model: nn.Module) -> set[nn.Module]:
    """What a model has in more than one place."""
    seen: set[nn.Module] = set()
    several: set[nn.Module] = set()
    for _, module in model.named_modules(remove_duplicate=False):
        (several if module in seen else seen).add(module)
    return several


def free_weight(module: nn.Module, several: Container[nn.Module]) -> None:
    """Let go of the float weight of a layer that a packed one has replaced.

    PEFT, or a hook, holds the layer until the last one is packed. A layer that the model has under another name too
    keeps its weight, and so does a module that a weight is tied to.

    Args:
        several: Of the model's modules those with more than one name; found once, since a model may have very many layers.
    """
    if isinstance(module, LINEAR_LAYERS) and not isinstance(module, PackedLinear) and module not in several:
        module.weight = None


def take_format_of_base(config: ScaleTuningConfig, targets: Mapping[str, Any]) -> None:
    """Say in the config what it leaves open of the format: what the packed ones among the targets have, else the defaults.

    Where they differ, `bits` becomes "base" and what differs stays open, so that each layer's own is taken.

    Args:
        config: Left as it is where it says all, or tunes another format than the layers have.
        targets: The modules that the config names, by name.

    Raises:
        ValueError: If layers that are float still have no format to take; names one.
    """
    found = {name: _format_of_base(module, name) for name, module in targets.items()}
    packed = {name: one for name, one in found.items() if one is not None}
    own = {name: one for name, one in packed.items() if isinstance(one[1], config.number_format_cls)}
    fresh = [name for name in found if name not in packed]
    if fresh and not packed:
        config.format_of(fresh[0])  # refuses "base"
    kinds: dict[str, set[Any]] = {"bits": set(), "group_size": set(), "sym": set(), "zero": set()}
    for name, (in_features, number_format) in own.items():
        bits, group_size = config.asked_of(name)
        if bits is None or bits == BASE:
            kinds["bits"].add(number_format.bits)
        if group_size is None:
            kinds["group_size"].add((in_features, number_format.group_size))
        for kind in ("sym", "zero"):
            kinds[kind].add(getattr(number_format, kind, None))
    kinds["group_size"] = _group_sizes(kinds["group_size"])
    defaults = {"bits": DEFAULT_BITS, "group_size": DEFAULT_GROUP_SIZE, "sym": False, "zero": "int"}
    left_open = [name for name in kinds if getattr(config, name, 0) in (None, BASE)]
    differing = [name for name in left_open if len(kinds[name]) > 1]
    if differing and fresh:
        raise ValueError(
            f"layer {fresh[0]!r} ({len(fresh)} in all) is float, and the packed layers beside it differ in "
            f"{', '.join(differing)}; pass {', '.join(f'{name}=' for name in differing)} to say how it is to be packed (and "
            "bits_pattern, group_size_pattern for the others), or leave it out of target_modules."
        )
    for name in left_open:
        if name in differing:
            continue
        setattr(config, name, next(iter(kinds[name]), defaults[name]))
    if differing:
        config.bits = BASE


def _group_sizes(found: set[tuple[int, int]]) -> set[int]:
    """The group sizes among layers of so many inputs; a layer may consist of a single group."""
    if all(group_size == -1 for _, group_size in found):
        return {group_size for _, group_size in found}
    return {in_features if group_size == -1 else group_size for in_features, group_size in found}


def _format_of_base(module: Any, name: str) -> Optional[tuple[int, NumberFormat]]:
    """A packed layer's inputs and format; None of a float one."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, PackedLinear):
        return module.in_features, module.number_format
    if pack_quantized.is_compressed(module):
        return module.in_features, pack_quantized.format_of(module, name)
    return None


def check_target(module: Any, config: ScaleTuningConfig, name: str) -> None:
    """Refuse, before anything is changed, a layer that can't be tuned under this config.

    Raises:
        ValueError: Names the layer, what it has and what to pass instead.
    """
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if _is_offloaded(module):
        raise ValueError(
            f"layer {name!r} is offloaded, so its weight isn't there to be quantised or tuned; load the model without "
            "offload (device_map=None or a device that holds it). Packed, it takes a fraction of the memory."
        )
    found = _format_of_base(module, name)
    if found is not None:
        _check_format_of_base(config, name, *found)
    else:
        check_supported(name, module)
        _check_float_layer(module, config, name)


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a layer's weights elsewhere between forwards."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook]))


def _check_float_layer(module: Any, config: ScaleTuningConfig, name: str) -> None:
    check_own_weight(name, module)
    weight = module.weight
    if not acts_linearly(module):
        raise ValueError(
            f"layer {name!r} is a {type(module).__name__}, whose forward computes something else than a linear layer, which a "
            "packed one can't; leave it out of `target_modules` or name it in `exclude_modules`."
        )
    check_layer(name, module, config.format_of(name))
    if weight.device.type != "meta" and not torch.isfinite(weight).all():
        raise ValueError(f"the weight of layer {name!r} has NaN or infinity; repair or reload the model.")
    if config.fan_in_fan_out and not isinstance(module, Conv1D):
        message = f"fan_in_fan_out is set to True but {name!r} is a `torch.nn.Linear`; it is read as False there."
        warnings.warn(message, stacklevel=2)


def _check_format_of_base(config: ScaleTuningConfig, name: str, in_features: int, found: NumberFormat) -> None:
    """The codes of a packed base are kept as they are, so the config must describe them."""
    asked = config.format_of(name, found)
    if type(asked) is not type(found):
        raise ValueError(
            f"layer {name!r} is quantised already to {found.name}, but {type(config).__name__} tunes {asked.name}. Use "
            "the config of the base's own format, or start from the float model."
        )
    if not same_format(asked, found, in_features):
        differing = {key: value for key, value in asdict(found).items() if getattr(asked, key) != value}
        raise ValueError(
            f"layer {name!r} is quantised already with {differing}, but the config asks for "
            f"{ {key: getattr(asked, key) for key in differing} }. Its codes are never rounded again: pass "
            f"{', '.join(f'{key}={value!r}' for key, value in differing.items())}, or leave that out to take what each layer "
            "has, or start from the float model. (A config that was used on one model says what that had.)"
        )
