# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The one table of tuner cases that drives every behaviour of the PEFT contract, and the helpers that its tests share.

A new tuner adds rows to `CASES`; what only one tuner promises is tested in that tuner's own files.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_ext import AlphaTuningConfig, BottleneckConfig, PeqaConfig
from tests.tiny.models import TINY_MODELS, inputs, logits_of, tiny


_FRESH: dict[tuple, PeftModel] = {}


@dataclass(frozen=True)
class Case:
    """A tiny model with a tuner's config. `strength`: how far `move_adapter` moves it from the identity; `lr`: a learning
    rate that lowers the loss within a few steps."""

    name: str
    model: str
    config_cls: type[PeftConfig]
    kwargs: dict[str, Any] = field(default_factory=dict)
    strength: float = 0.1
    lr: float = 1e-2

    def config(self, **overrides) -> PeftConfig:
        return self.config_cls(**{**copy.deepcopy(self.kwargs), **overrides})

    def float_model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return tiny(self.model, dtype)

    def inputs(self) -> dict[str, torch.Tensor]:
        return inputs(self.model)

    def fresh(self, adapter_name: str = "default", dtype: torch.dtype = torch.float32, **overrides) -> PeftModel:
        """The model with an adapter as the tuner starts it, the same at every call: an identity.

        Each is wrapped once and copied: finding a layer's codes takes far longer than what most tests look at.
        """
        key = (repr(self), adapter_name, dtype, repr(overrides))
        if key not in _FRESH:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                _FRESH[key] = get_peft_model(self.float_model(dtype), self.config(**overrides), adapter_name).eval()
        return copy.deepcopy(_FRESH[key])

    def moved(self, adapter_name: str = "default", dtype: torch.dtype = torch.float32, **overrides) -> PeftModel:
        """The model with an adapter away from the identity, so that a path that ignores it can't pass."""
        model = self.fresh(adapter_name, dtype, **overrides)
        move_adapter(model, adapter_name, strength=self.strength)
        return model

    def with_two_adapters(self) -> PeftModel:
        """Adapters "default" (active) and "other", both away from the identity and unlike each other."""
        key = (repr(self), "default", "other")
        if key not in _FRESH:
            model = self.moved()
            model.add_adapter("other", self.config())
            move_adapter(model, "other", strength=self.strength, seed=1)
            _FRESH[key] = model.eval()
        return copy.deepcopy(_FRESH[key])

    def logits(self, model: nn.Module, **kwargs) -> torch.Tensor:
        with torch.no_grad():
            return logits_of(model, self.inputs(), **kwargs)

    @property
    def merges(self) -> bool:
        """Whether the tuner's adapters can be merged; a non-linear one's can't."""
        return self.config_cls is not BottleneckConfig

    @property
    def saves_modules(self) -> bool:
        """Whether a module is trained in full beside the adapter, by its own name or as a classifier's head."""
        return bool(self.kwargs.get("modules_to_save")) or self.kwargs.get("task_type") == "SEQ_CLS"

    @property
    def generates(self) -> bool:
        return TINY_MODELS[self.model].generates


def _peqa(name: str, model: str, strength: float = 0.1, **kwargs) -> Case:
    return Case(f"peqa-{name}", model, PeqaConfig, kwargs, strength)


def _alpha(name: str, model: str, strength: float = 0.1, **kwargs) -> Case:
    return Case(f"alphatuning-{name}", model, AlphaTuningConfig, kwargs, strength)


def _bottleneck(name: str, model: str, strength: float = 0.1, **kwargs) -> Case:
    return Case(f"bottleneck-{name}", model, BottleneckConfig, kwargs, strength, lr=2e-3)


CASES = [
    _peqa("llama-4bit", "llama", bits=4, task_type="CAUSAL_LM"),
    _peqa("llama-3bit-groups", "llama", bits=3, group_size=16, init_method="mse", task_type="CAUSAL_LM"),
    _peqa(
        "llama-8bit-sym-list", "llama", bits=8, sym=True, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    ),
    _peqa("llama-absolute", "llama", bits=4, parametrization="absolute", task_type="CAUSAL_LM", strength=0.01),
    _peqa("llama-log", "llama", bits=2, group_size=8, parametrization="log", task_type="CAUSAL_LM"),
    _peqa("llama-float-zeros", "llama", bits=4, group_size=16, zero="float", task_type="CAUSAL_LM"),
    _peqa("gpt2-2bit-float-zeros", "gpt2", bits=2, zero="float", fan_in_fan_out=True, task_type="CAUSAL_LM"),
    _peqa("llama-zeros", "llama", bits=4, trained="scales+zeros", task_type="CAUSAL_LM"),
    _peqa(
        "llama-3bit-float-zeros-trained",
        "llama",
        bits=3,
        group_size=16,
        zero="float",
        trained="scales+zeros",
        task_type="CAUSAL_LM",
    ),
    _peqa("gpt2-sym-zeros", "gpt2", bits=4, group_size=16, sym=True, trained="scales+zeros", fan_in_fan_out=True),
    _peqa("gpt2-4bit", "gpt2", bits=4, fan_in_fan_out=True, task_type="CAUSAL_LM"),
    _peqa("gpt2-3bit-groups", "gpt2", bits=3, group_size=32, fan_in_fan_out=True),
    _peqa("opt-4bit", "opt", bits=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    _peqa(
        "neox-regex", "gpt_neox", bits=4, target_modules=r".*\.(query_key_value|dense_4h_to_h)", task_type="CAUSAL_LM"
    ),
    _peqa("t5-4bit", "t5", bits=4, task_type="SEQ_2_SEQ_LM"),
    _peqa("t5-groups-list", "t5", bits=3, group_size=8, target_modules=["q", "v", "wo"]),
    _peqa("bert-4bit", "bert", bits=4, task_type="SEQ_CLS"),
    _peqa("mlp-4bit", "mlp", bits=4, target_modules=["lin0", "lin1"]),
    _peqa("mlp-groups-head", "mlp", bits=3, group_size=2, target_modules=["lin0"], modules_to_save=["head"]),
    _peqa("conv-4bit", "conv", bits=4, target_modules=["lin0"]),
    _alpha("llama-4bit", "llama", bits=4, task_type="CAUSAL_LM"),
    _alpha("llama-3bit-groups-all", "llama", bits=3, group_size=16, trained_alphas="all", task_type="CAUSAL_LM"),
    _alpha("llama-greedy-log", "llama", bits=2, init_method="greedy", parametrization="log", task_type="CAUSAL_LM"),
    _alpha("gpt2-4bit", "gpt2", bits=4, fan_in_fan_out=True, task_type="CAUSAL_LM"),
    _alpha("opt-absolute", "opt", bits=3, parametrization="absolute", task_type="CAUSAL_LM", strength=0.01),
    _alpha("neox-list", "gpt_neox", bits=3, target_modules=["query_key_value", "dense"], task_type="CAUSAL_LM"),
    _alpha("t5-3bit", "t5", bits=3, task_type="SEQ_2_SEQ_LM"),
    _alpha("bert-all", "bert", bits=3, trained_alphas="all", task_type="SEQ_CLS"),
    _alpha("mlp-1bit-head", "mlp", bits=1, target_modules=["lin0"], modules_to_save=["head"]),
    _alpha("conv-groups", "conv", bits=2, group_size=2, target_modules=["lin0"]),
    _bottleneck("llama", "llama", bottleneck_dim=4, task_type="CAUSAL_LM"),
    _bottleneck("llama-list-gelu", "llama", target_modules=["q_proj", "up_proj"], non_linearity="gelu"),
    _bottleneck("gpt2-pfeiffer", "gpt2", reduction_factor=4, placement="pfeiffer", task_type="CAUSAL_LM"),
    _bottleneck("opt", "opt", bottleneck_dim=4, non_linearity="silu", task_type="CAUSAL_LM"),
    _bottleneck("neox-regex", "gpt_neox", bottleneck_dim=3, target_modules=r".*\.(dense|dense_4h_to_h)"),
    _bottleneck("t5", "t5", bottleneck_dim=4, task_type="SEQ_2_SEQ_LM"),
    _bottleneck("bert-pfeiffer", "bert", bottleneck_dim=4, placement="pfeiffer", task_type="SEQ_CLS"),
    _bottleneck("mlp-head", "mlp", bottleneck_dim=4, target_modules=["lin0"], modules_to_save=["head"]),
    _bottleneck("conv", "conv", bottleneck_dim=4, target_modules=["lin0"]),
]
# For bookkeeping, which knows neither bits nor groups, start or parametrisation: one row for each tuner, architecture and
# whether there is a head that is trained in full.
ONE_PER_ARCHITECTURE = list({(row.config_cls, row.model, row.saves_modules): row for row in reversed(CASES)}.values())[
    ::-1
]
CASES_THAT_GENERATE = [case for case in CASES if case.generates]
CASES_THAT_MERGE = [case for case in CASES if case.merges]
TRANSFORMERS_CASES = [case for case in CASES if TINY_MODELS[case.model].blocks]


def over(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrises `case` over these rows only."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


once_per_architecture = over(ONE_PER_ARCHITECTURE)


def prefix_of(model: PeftModel) -> str:
    """The prefix of the tuner's parameters, such as `"peqa_"`."""
    return PEFT_TYPE_TO_PREFIX_MAPPING[next(iter(model.peft_config.values())).peft_type]


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """The tuner's own parameters of one adapter (without `modules_to_save`), by full name."""
    found = {}
    for layer_name, layer in tuner_layers(model).items():
        for attribute in layer.adapter_layer_names:
            entries = getattr(layer, attribute)
            if adapter_name not in entries:
                continue
            name, entry = f"{layer_name}.{attribute}.{adapter_name}", entries[adapter_name]
            inner = {name: entry} if isinstance(entry, nn.Parameter) else _named(entry, name)
            found.update(inner)
    return found


def _named(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def move_adapter(model: nn.Module, adapter_name: str = "default", strength: float = 0.1, seed: int = 0) -> None:
    """Add noise to every parameter of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    parameters = adapter_parameters(model, adapter_name)
    if not parameters:
        raise AssertionError(f"The model has no parameters for the adapter {adapter_name!r}.")
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((strength * noise).to(parameter.dtype))


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to the order of float additions, relative to the largest number."""
    scale = max(expected.abs().max().item(), 1e-6)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.0, atol=tolerance * scale)


def assert_differs(actual: torch.Tensor, other: torch.Tensor, at_least: float = 1e-3) -> None:
    """Further apart than rounding: the mean difference exceeds `at_least` of the mean size."""
    difference = (actual.float() - other.float()).abs().mean() / other.float().abs().mean()
    assert difference > at_least, f"the outputs differ by only {difference:.2e} (relative)"


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss that every kind of model has and to which every layer contributes; of real tokens only, since an empty
    token's norm can blow a small step up."""
    logits, mask = logits_of(model, batch).float(), batch.get("attention_mask")
    if mask is not None and logits.shape[:2] == mask.shape:
        logits = logits * mask.unsqueeze(-1)
    return logits.square().mean()


def train(model: PeftModel, batch: dict[str, torch.Tensor], steps: int = 3, lr: float = 1e-2) -> list[float]:
    """A few AdamW steps; returns the losses before each."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses
