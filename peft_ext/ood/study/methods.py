# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The tuning methods that the study compares, at equal numbers of trained parameters solved from the model's config."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from peft_ext import AlphaTuningConfig, BottleneckConfig, PeqaConfig
from peft_ext.ood.classifier import PooledClassifier


class NotPossibleError(ValueError):
    """A method can't be applied to a model, or not at a budget: a stated skip, not a failure."""


class Solution(NamedTuple):
    """What meets a budget: the method's size (rank, width, group size; None if it has none) and its trained parameters,
    the head left out."""

    size: Optional[int]
    parameters: int


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        title: In tables.
        learning_rate: Where nothing else is configured.
        config: The PEFT config for a size; None for methods without one.
        size_name: What the size is called.
        grows: Whether more size means more parameters, linearly; otherwise the size is a group of inputs.
    """

    title: str
    learning_rate: float
    config: Optional[Callable[[int], PeftConfig]] = None
    size_name: str = ""
    grows: bool = True

    @property
    def packed(self) -> bool:
        """Whether it quantises the base."""
        return self.config is not None and not self.grows


def _peqa(bits: int) -> Callable[[int], PeftConfig]:
    return lambda group: PeqaConfig(bits=bits, group_size=group, init_method="calibrated", task_type="SEQ_CLS")


def _alphatuning(bits: int) -> Callable[[int], PeftConfig]:
    """In groups without data: calibrating binary codes in groups takes minutes, and gains little there."""
    return lambda group: AlphaTuningConfig(
        bits=bits, group_size=group, init_method="calibrated" if group == -1 else "alternating", task_type="SEQ_CLS"
    )


METHODS = {
    "full": Method("Full fine-tuning", 1e-4),
    "linear": Method("Linear probe", 0.0),
    "bottleneck": Method(
        "Adapter (Houlsby)", 2e-3, lambda size: BottleneckConfig(bottleneck_dim=size, task_type="SEQ_CLS"), "width"
    ),
    "lora": Method("LoRA", 2e-3, lambda size: LoraConfig(r=size, lora_alpha=16, task_type="SEQ_CLS"), "rank"),
    "prefix": Method(
        "Prefix-tuning",
        5e-3,
        lambda size: PrefixTuningConfig(
            num_virtual_tokens=10, prefix_projection=True, encoder_hidden_size=size, task_type="SEQ_CLS"
        ),
        "projection",
    ),
    "peqa_4bit": Method("PEQA, 4 bits", 1e-2, _peqa(4), "group", grows=False),
    "peqa_3bit": Method("PEQA, 3 bits", 1e-2, _peqa(3), "group", grows=False),
    "alphatuning_4bit": Method("AlphaTuning, 4 bits", 1e-2, _alphatuning(4), "group", grows=False),
    "alphatuning_3bit": Method("AlphaTuning, 3 bits", 1e-2, _alphatuning(3), "group", grows=False),
}


def get_method(name: str) -> Method:
    """A method by its name.

    Raises:
        ValueError: If there is none; lists those known.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; choose one of {sorted(METHODS)}.")
    return METHODS[name]


def solve(name: str, config: PretrainedConfig, budget: Optional[float]) -> Solution:
    """The size of a method whose trained parameters come closest to a share of the backbone's.

    Args:
        name: The method.
        config: The config of a [`PooledClassifier`]; models are made of it on the meta device, without memory.
        budget: The share, such as 0.001. Ignored by methods without a size.

    Raises:
        NotPossibleError: If the closest size is off by more than half of the budget, or PEFT can't apply the method.
    """
    method = get_method(name)
    model = _skeleton(config)
    total = sum(parameter.numel() for parameter in model.backbone.parameters())
    if method.config is None:
        return Solution(None, total if name == "full" else 0)
    if budget is None or not 0 < budget < 1:
        raise ValueError(f"budget={budget!r} of method {name!r} must be a share between 0 and 1.")
    target = budget * total
    solution = _by_slope(method, config, target) if method.grows else _by_groups(model, target)
    if abs(solution.parameters - target) > target / 2:
        raise NotPossibleError(
            f"{name} has no size near a budget of {budget:.2%} ({target:,.0f} parameters) on this model: the closest, "
            f"{method.size_name} {solution.size}, trains {solution.parameters:,}."
        )
    return solution


def apply(name: str, model: PooledClassifier, size: Optional[int], batches: Any = ()) -> nn.Module:
    """Make a classifier trainable by a method, the head always included.

    Args:
        name: The method.
        model: The classifier, which is changed.
        size: As [`solve`] found it.
        batches: Model inputs that packed methods calibrate on.

    Raises:
        NotPossibleError: If PEFT can't prefix the model.
    """
    from peft_ext import calibrate

    method = get_method(name)
    if method.config is None or size is None:
        return model
    config = method.config(size)
    if method.packed and config.needs_data:
        calibrate(model, config, list(batches), progressbar=False)
    if name != "prefix":
        return get_peft_model(model, config)
    kind = type(model.backbone).__name__
    try:
        adapted = get_peft_model(model, config)
        ids = torch.ones((1, 2), dtype=torch.long, device=model.device)
        loss = adapted(input_ids=ids, attention_mask=ids, labels=ids[0, :1] * 0).loss
        loss.backward()
    except Exception as error:
        raise NotPossibleError(f"PEFT can't prefix a {kind}: {type(error).__name__}: {error}") from error
    reached = any(p.grad is not None and p.grad.any() for p in adapted.prompt_encoder.parameters())
    adapted.zero_grad()
    if not reached:
        raise NotPossibleError(f"PEFT can't prefix a {kind}: the model doesn't look at its prefix.")
    return adapted


def trained_parameters(model: nn.Module) -> int:
    """Trainable parameters, the head left out."""
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".score." not in f".{n}")


def _skeleton(config: PretrainedConfig) -> PooledClassifier:
    with torch.device("meta"):
        return PooledClassifier(copy.deepcopy(config))


def _by_slope(method: Method, config: PretrainedConfig, target: float) -> Solution:
    """Sizes cost the same each, so two of them tell all."""

    def count(size: int) -> int:
        if method.config is None:
            return 0
        with torch.device("meta"):
            return trained_parameters(get_peft_model(_skeleton(config), method.config(size)))

    try:
        one, two = count(1), count(2)
    except (ValueError, TypeError, KeyError) as error:
        raise NotPossibleError(f"{method.title}: {error}") from error
    size = max(1, round((target - one) / (two - one)) + 1)
    return Solution(size, one + (size - 1) * (two - one))


def _by_groups(model: PooledClassifier, target: float) -> Solution:
    """One trained number for each group of inputs of each output: whole rows (-1), or any common divisor."""
    sizes = [shape for module in model.backbone.modules() if (shape := _shape(module)) is not None]
    common = math.gcd(*(inputs for inputs, _ in sizes))
    options = {-1: sum(outputs for _, outputs in sizes)}
    for group in (group for group in range(8, common + 1, 8) if common % group == 0):
        options[group] = sum(outputs * inputs // group for inputs, outputs in sizes)
    best = min(options, key=lambda group: abs(options[group] - target))
    return Solution(best, options[best])


def _shape(module: nn.Module) -> Optional[tuple[int, int]]:
    """Inputs and outputs of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else None
