# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Bits where they matter: a width for each layer under a budget of bytes, from what the loss loses by rounding it.

`bits_budget=3.0` is the bytes of the layers at 3 bits each, scales and zero points included. Within them, the widths are chosen
that together cost the loss least (`sensitivity.py` says what, `knapsack.py` chooses), and written into the config as `bits` and
`bits_pattern`: whatever is made with it afterwards needs no sensitivities.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peft_ext.checkpoint.pack_quantized import is_packed
from peft_ext.quant.binary import dequantize_binary
from peft_ext.quant.conversion import weight_of
from peft_ext.quant.experts import unfused_experts
from peft_ext.quant.formats import Uniform
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.uniform import dequantize
from peft_ext.scale_tuning.config import BUDGET_WIDTHS, ScaleTuningConfig
from peft_ext.scale_tuning.knapsack import choose
from peft_ext.scale_tuning.model import budget_unspent, check_targets
from peft_ext.scale_tuning.sensitivity import Batch, left_by_feedback, sensitivities
from peft_ext.tables import aligned, mebibytes


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BitAllocation:
    """
    Which layer got which width; `str()` of it is a picture of text: a line for each kind of layer, a digit for each of them.

    Attributes:
        budget (`float`): The average width that was asked for.
        widths (`dict`): Bits of each layer, by name.
        losses (`dict`): What the loss would rise by where a layer alone has 2, 3, 4 or 8 bits, in nats a token, by name; without
            the layers that the data didn't reach.
        nbytes (`int`): Bytes of the layers at these widths, with scales and zero points.
        budget_bytes (`int`): Bytes that they may have.
        average (`float`): Bits of a weight on average, without scales and zero points.
    """

    budget: float
    widths: Mapping[str, int]
    losses: Mapping[str, Mapping[int, float]] = field(repr=False)
    nbytes: int
    budget_bytes: int
    average: float

    @property
    def summary(self) -> str:
        """One line, such as `210 layers at 3.00 bits on average: 2 bits x40, 3 bits x122, 4 bits x48`."""
        counts = sorted(Counter(self.widths.values()).items())
        listed = ", ".join(f"{bits} bits x{count}" for bits, count in counts)
        return f"{len(self.widths)} layers at {self.average:.2f} bits on average: {listed}"

    def __str__(self) -> str:
        rows = [[kind, "".join(map(str, widths.values()))] for kind, widths in by_kind(self.widths).items()]
        sizes = f"{mebibytes(self.nbytes)} of {mebibytes(self.budget_bytes)}"
        return f"{self.summary}\n{sizes}, scales included; by block:\n{aligned(rows)}"


def allocate_bits(
    model: nn.Module, config: ScaleTuningConfig, batches: Iterable[Batch], progressbar: bool = True
) -> BitAllocation:
    """
    Choose the widths that a config's `bits_budget` asks for, and write them into it.

    One backward pass over the batches tells what the loss loses where a layer is rounded to 2, 3, 4 or 8 bits: to second order,
    by the diagonal of the Fisher information. Then the widths are chosen that lose least within the bytes of the budget.
    Where codes are found from data (`"calibrated"`), a forward pass before it tells how much of each input's error feedback
    undoes. Layers that share a weight, and the experts of a block, get one width.

    [`calibrate`] calls it where the config has a budget. Call it yourself for an initialisation without data, or to see what
    was chosen.

    Args:
        model (`nn.Module`):
            A float model of transformers; it isn't changed, except that fused experts become layers with names.
        config (`PeqaConfig` or `AlphaTuningConfig`):
            With `bits_budget`. Afterwards it has `bits`, the most frequent width, `bits_pattern` for the other layers, and no
            budget any more.
        batches (iterable of `dict` or `torch.Tensor`):
            As of [`calibrate`]; with labels, unless the model is a causal language model. About 2,000 tokens do. A batch at a
            time is in memory, with what its backward pass keeps.
        progressbar (`bool`, defaults to `True`):
            Whether to show one step per batch.

    Returns:
        [`BitAllocation`]

    Raises:
        ValueError: If there is no budget, no data, no loss, or nothing to quantise; or the layers can't be quantised so.

    Example:

        ```py
        >>> config = PeqaConfig(bits_budget=3.0, group_size=64)
        >>> print(allocate_bits(model, config, batches))
        >>> model = get_peft_model(model, config)
        ```
    """
    if config.bits_budget is None:
        raise ValueError("the config has no bits_budget; pass one, such as bits_budget=3.0.")
    resolved, layers = _float_targets(config, model)
    batches = list(batches)
    if not batches:
        raise ValueError(
            f"bits_budget={config.bits_budget:g} needs data to weigh the layers by, and batches is empty; pass a few batches of "
            "training data."
        )

    def errors(name: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        for bits in BUDGET_WIDTHS:
            yield rounding_error(resolved, name, weight, bits)

    shares = None
    if config.needs_data:
        from peft_ext.scale_tuning.calibration import joined  # which calls us

        shares = left_by_feedback(model, layers, joined(model, batches))
    losses = sensitivities(model, layers, errors, batches, shares, progressbar)
    return choose_widths(model, config, losses)


def spread_bits(model: nn.Module, config: ScaleTuningConfig) -> BitAllocation:
    """The same without data, for planning: as if each weight mattered alike, whose error quarters with every bit.

    Args:
        model: On the meta device, or any other.
        config: As of [`allocate_bits`].
    """
    _, layers = _float_targets(config, model)
    losses = {
        name: [weight_of(layer).numel() * 4.0**-bits for bits in BUDGET_WIDTHS] for name, layer in layers.items()
    }
    return choose_widths(model, config, losses)


def choose_widths(model: nn.Module, config: ScaleTuningConfig, losses: Mapping[str, Sequence[float]]) -> BitAllocation:
    """The widths that lose least within the budget, from any measure of what layers lose; written into the config.

    Args:
        model, config: As of [`allocate_bits`].
        losses: By layer, what it loses at 2, 3, 4 and 8 bits.
    """
    assert config.bits_budget is not None
    resolved, layers = _float_targets(config, model)
    allocation = _allocated(model, resolved, layers, config.bits_budget, losses)
    write_widths(config, allocation.widths, model)
    return allocation


def announce_bits(allocation: BitAllocation) -> None:
    """Say to the log, at level INFO, who got what."""
    logger.info("bits_budget=%g: %s.", allocation.budget, allocation.summary)


def rounding_error(config: ScaleTuningConfig, name: str, weight: torch.Tensor, bits: int) -> torch.Tensor:
    """What rounding moves a weight `[out, in]` by, without data, in the format that the config has for the layer."""
    number_format = config.format_at(name, bits)
    quantized = number_format.quantize(weight, number_format.default_method)
    rounded = dequantize(*quantized) if isinstance(number_format, Uniform) else dequantize_binary(*quantized)
    return rounded - weight


def layer_bytes(config: ScaleTuningConfig, name: str, layer: nn.Module, bits: int) -> int:
    """Bytes of a layer's codes, scales and zero points at that width."""
    weight = weight_of(layer)
    packed = PackedLinear.empty(config.format_at(name, bits), weight.shape, weight.dtype, None)
    return sum(parameter.nbytes for parameter in packed.parameters())


def units(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """The layers in groups that get one width: those that share a weight, and the experts of a block.

    Not q, k and v, nor gate and up: vLLM, which runs them as one, takes codes of 2 and 3 bits in wider containers only, and these
    are of one width for the whole file.
    """
    names = list(names)
    leader = {name: name for name in names}

    def lead(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    keys: dict[Any, str] = {}
    experts = tuple(f"{prefix}." for prefix in unfused_experts(model))
    modules = dict(model.named_modules())
    for name in names:
        belongs: list[Any] = [prefix for prefix in experts if name.startswith(prefix)]
        belongs.append(id(getattr(modules[name], "weight", modules[name])))
        for key in belongs:
            leader[lead(name)] = lead(keys.setdefault(key, name))
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(lead(name), []).append(name)
    return list(found.values())


def write_widths(config: ScaleTuningConfig, widths: Mapping[str, int], model: nn.Module) -> None:
    """Put widths into a config, which has no budget then: the most frequent as `bits`, the others' as `bits_pattern`."""
    most = Counter(widths.values()).most_common(1)[0][0]
    experts = tuple(unfused_experts(model))
    pattern = {}
    for name, bits in widths.items():
        if bits != most:
            inside = next((prefix for prefix in experts if name.startswith(f"{prefix}.")), None)
            pattern[name if inside is None else rf"{inside}\..+"] = bits  # experts have one width
    config.bits, config.bits_pattern, config.bits_budget = most, pattern, None


def _float_targets(config: ScaleTuningConfig, model: nn.Module) -> tuple[ScaleTuningConfig, dict[str, nn.Module]]:
    """The config with everything spelt out that it leaves open, and the layers that it would quantise."""
    resolved = copy.copy(config)
    resolved.target_modules = resolved.target_modules or "all-linear"
    targets = check_targets(resolved, model)
    if not targets:
        raise ValueError(f"Target modules {config.target_modules} not found in the base model.")
    layers = {name: module for name, module in targets.items() if not is_packed(module)}
    if not layers:
        raise ValueError(budget_unspent(config, []))
    return resolved, layers


def _allocated(
    model: nn.Module,
    config: ScaleTuningConfig,
    layers: Mapping[str, nn.Module],
    budget: float,
    losses: Mapping[str, Sequence[float]],
) -> BitAllocation:
    costs = {
        name: [layer_bytes(config, name, layer, bits) for bits in BUDGET_WIDTHS] for name, layer in layers.items()
    }
    budget_bytes = math.floor(sum(_interpolated(each, budget) for each in costs.values()))
    unreached = [name for name in layers if name not in losses]
    kept = max(index for index, bits in enumerate(BUDGET_WIDTHS) if bits <= budget)
    if unreached:
        warnings.warn(
            f"bits_budget: the batches never reached {len(unreached)} of {len(layers)} layers, such as {unreached[0]!r}, which "
            f"get {BUDGET_WIDTHS[kept]} bits; pass batches that do, or leave them out of target_modules.",
            stacklevel=4,
        )
    widths = dict.fromkeys(layers, BUDGET_WIDTHS[kept])
    # what no data weigh keeps its share; of a unit, one layer that they reach decides for all
    groups = [group for group in units(model, layers) if any(name in losses for name in group)]
    inside = {name for group in groups for name in group}
    free = budget_bytes - sum(costs[name][kept] for name in layers if name not in inside)
    picks = choose(
        [_sums(costs[name] for name in group) for group in groups],
        [_sums(losses[name] for name in group if name in losses) for group in groups],
        free,
    )
    for group, pick in zip(groups, picks):
        widths.update(dict.fromkeys(group, BUDGET_WIDTHS[pick]))
    numbers = {name: weight_of(layer).numel() for name, layer in layers.items()}
    return BitAllocation(
        budget=budget,
        widths=widths,
        losses={name: dict(zip(BUDGET_WIDTHS, each)) for name, each in losses.items()},
        nbytes=sum(costs[name][BUDGET_WIDTHS.index(bits)] for name, bits in widths.items()),
        budget_bytes=budget_bytes,
        average=sum(numbers[name] * bits for name, bits in widths.items()) / sum(numbers.values()),
    )


def _interpolated(costs: Sequence[int], budget: float) -> float:
    """Bytes at a fractional width, between those of the widths around it."""
    for least, most, low, high in zip(BUDGET_WIDTHS, BUDGET_WIDTHS[1:], costs, costs[1:]):
        if budget <= most:
            return low + (high - low) * (budget - least) / (most - least)
    return costs[-1]


def _sums(rows: Iterable[Sequence[Any]]) -> list[Any]:
    return [sum(column) for column in zip(*rows)]


def by_kind(widths: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Layers' widths by what layers of all blocks are called (`mlp.down_proj`), then by the name in the model."""
    found: dict[str, dict[str, int]] = {}
    for name, bits in widths.items():
        found.setdefault(_kind(name), {})[name] = bits
    return found


def _kind(name: str) -> str:
    """A layer's name without what tells its block, `mlp.down_proj` of `model.layers.3.mlp.down_proj`."""
    parts = name.split(".")
    last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]) or name
