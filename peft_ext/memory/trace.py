# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A training step and a generation on the meta device, and what was alive at their peaks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Optional, cast
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from peft_ext.distillation.cached_logits import DEFAULT_TOP_K, CachedTeaching
from peft_ext.distillation.loss import Objective
from peft_ext.distillation.output_head import output_head
from peft_ext.distillation.student import student_pass
from peft_ext.distillation.teacher import LiveTeacher
from peft_ext.language_model import unwrapped
from peft_ext.memory.tracker import ACTIVATIONS, GRADIENTS, STATES, WEIGHTS, AllocationTracker, FusedAttention
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.functional import code_blocks
from peft_ext.scale_tuning.bit_budget import spread_bits
from peft_ext.scale_tuning.config import ScaleTuningConfig
from peft_ext.targets import left_out


# By transformers' names; sgd is without momentum, as there.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


# Where a teacher is: its likeliest tokens on disk, or it runs on the same device.
CACHED, LIVE = "cached", "live"
TEACHERS = (CACHED, LIVE)


@dataclass(frozen=True)
class TrainingStep:
    """What a training step does, in the words of transformers' TrainingArguments; `max_length` in TRL's.

    `distill` says where a teacher is, `"cached"` or `"live"`; None: there is none. `teacher_top_k` is of a cached one.

    Raises:
        ValueError: If a number is below 1, or the optimiser or the teacher's place is unknown.
    """

    per_device_train_batch_size: int = 4
    max_length: int = 1024
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    optim: str = "adamw_torch"
    distill: Optional[str] = None
    teacher_top_k: int = DEFAULT_TOP_K

    def __post_init__(self) -> None:
        if self.distill is not None and self.distill not in TEACHERS:
            raise ValueError(f"distill={self.distill!r} is unknown; choose one of {TEACHERS}.")
        names = ("per_device_train_batch_size", "max_length", "gradient_accumulation_steps", "teacher_top_k")
        check_positive(**{name: getattr(self, name) for name in names})
        if self.optim not in OPTIMIZERS:
            raise ValueError(f"optim={self.optim!r} is unknown; choose one of {tuple(OPTIMIZERS)}.")


@dataclass(frozen=True)
class Generation:
    """What is generated at once.

    Raises:
        ValueError: If a number is below 1, or `context_length` below 2.
    """

    batch_size: int = 1
    context_length: int = 1024

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size)
        if self.context_length < 2:
            raise ValueError(f"context_length={self.context_length} must be at least 2: a prompt and a token.")


def check_positive(**arguments: int) -> None:
    """Refuse numbers below 1.

    Raises:
        ValueError: Names the argument.
    """
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


@dataclass(frozen=True)
class TrainingTrace:
    """What a training step had alive beside the weights, in bytes.

    `backward` and `update` are the peaks of forward and backward, and of the optimiser's step; see
    [`AllocationTracker`].
    """

    backward: dict[int, int]
    update: dict[int, int]
    states: list[torch.Tensor]  # of the optimiser, on the meta device


@dataclass(frozen=True)
class GenerationTrace:
    """What a generation had alive beside the weights, in bytes: its cache at the end, and what else at the peak."""

    cache: int
    activations: int


def empty_model(config: PretrainedConfig, dtype: torch.dtype, peft_config: Optional[PeftConfig] = None) -> nn.Module:
    """A causal language model on the meta device, ready to be tuned: by a PEFT method, or in full without one.

    A packed checkpoint's config stands for the float model; the method says what is packed.

    Raises:
        ValueError: If the config is no causal language model's, or PEFT refuses the layers.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model_type={config.model_type!r} is no causal language model's; only those that AutoModelForCausalLM "
            "knows can be planned."
        )
    config = copy.deepcopy(config)
    config._name_or_path = ""  # there is no checkpoint to take codes from
    for name in ("quantization_config", "packed_bits"):
        vars(config).pop(name, None)
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if peft_config is None:
        return model
    if getattr(peft_config, "target_modules", None) == "all-linear" and not getattr(
        peft_config, "exclude_modules", None
    ):
        # PEFT's own tuners take routers for linear layers, and die of what they return
        peft_config = copy.copy(peft_config)
        peft_config.exclude_modules = set(left_out(model))
    if getattr(peft_config, "bits_budget", None) is not None:
        peft_config = copy.copy(peft_config)
        spread_bits(model, cast(ScaleTuningConfig, peft_config))
    return get_peft_model(model, peft_config)


def trace_training(model: Any, step: TrainingStep, teacher: Optional[nn.Module] = None) -> TrainingTrace:
    """Train a model on the meta device for two steps; the peaks are the second's, when the optimiser has its states.

    The loss is the model's own, on rows without padding, as transformers' Trainer computes it; or distillation's, in pieces.

    Args:
        model: The student.
        step: What a step does.
        teacher: For `step.distill == "live"`; its weights aren't in the trace.

    Raises:
        ValueError: If the model can't run without data.
    """
    if step.gradient_checkpointing:
        # the backward runs the blocks again outside of the modes that are on around it
        options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), FusedAttention())}
        # its name from transformers 5.23 on, before it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options)
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[step.optim](trained, lr=1e-3)
    tokens = _tokens(step.per_device_train_batch_size, step.max_length)
    states: list[torch.Tensor] = []
    loss_of = _own_loss if step.distill is None else _distillation(model, step, teacher)
    with _tracked(model) as tracker:
        if teacher is not None:
            tracker.assign([*teacher.parameters(), *teacher.buffers()], WEIGHTS)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.assign([p.grad], GRADIENTS))
        for _ in range(2):
            tracker.take_peaks()
            for _ in range(min(step.gradient_accumulation_steps, 2)):  # a third one would need what the second does
                loss_of(model, tokens).backward()
            backward = tracker.take_peaks()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            update = tracker.take_peaks()
            values = (value for state in optimizer.state.values() for value in state.values())
            states = [value for value in values if isinstance(value, torch.Tensor) and value.is_meta]
            tracker.assign(states, STATES)
    return TrainingTrace(backward, update, states)


def _own_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def _distillation(
    model: Any, step: TrainingStep, teacher: Optional[nn.Module]
) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    head, live = output_head(model), None if teacher is None else LiveTeacher(teacher)

    def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": tokens, "labels": tokens}
        if live is not None:
            teaching: Any = live.of(inputs)
        else:
            count = tokens.shape[0] * (tokens.shape[1] - 1)
            log_probs = torch.empty(count, step.teacher_top_k + 1, device="meta")
            teaching = CachedTeaching(
                log_probs, torch.empty(count, step.teacher_top_k, dtype=torch.long, device="meta")
            )
        return student_pass(model, inputs, teaching, Objective(), head).sums.loss

    return loss_of


@torch.no_grad()
def trace_generation(model: nn.Module, generation: Generation) -> GenerationTrace:
    """Read a prompt of all but the last token at once, the worst case, then generate one token.

    Raises:
        ValueError: If the model can't run without data, or keeps no cache.
    """
    model.eval()
    prompt = _tokens(generation.batch_size, generation.context_length - 1)
    # as generate does
    takes_logits = isinstance(model, PreTrainedModel) and model._supports_logits_to_keep()
    options: dict[str, Any] = {"logits_to_keep": 1} if takes_logits else {}
    with _tracked(model) as tracker:
        cache = getattr(model(input_ids=prompt, use_cache=True, **options), "past_key_values", None)
        if cache is None:
            raise ValueError(
                f"{type(model).__name__} keeps no cache of keys and values, which a plan of serving needs."
            )
        tokens = prompt[:, :1]
        cache = model(input_ids=tokens, past_key_values=cache, use_cache=True).past_key_values
        held, peak = tracker.live[ACTIVATIONS], max(tracker.take_peaks().values())
        del cache
    size = held - tracker.live[ACTIVATIONS]
    return GenerationTrace(cache=size, activations=peak - size)


def _tokens(rows: int, length: int) -> torch.Tensor:
    return torch.zeros(rows, length, dtype=torch.long, device="meta")


@contextmanager
def _tracked(model: nn.Module) -> Iterator[AllocationTracker]:
    for layer in packed_layers(model).values():
        # makes the tables of unpacking (1 MiB), which the process keeps: only the first plan would count them
        next(code_blocks(layer.packed, 1, layer.compute_dtype))
    try:
        with AllocationTracker() as tracker, FusedAttention(), patch("torch.autocast", _autocast):
            tracker.assign([*model.parameters(), *model.buffers()], WEIGHTS)
            yield tracker
    except (RuntimeError, NotImplementedError) as error:  # PyTorch's, of meta tensors
        raise ValueError(
            f"{type(unwrapped(model)).__name__} can't be planned: it doesn't run on PyTorch's meta device, where there are "
            f"neither weights nor data ({error})."
        ) from error


class _autocast(torch.autocast):
    """The meta device, which PyTorch knows no autocast of, computes in the dtypes that it is given (PEFT's LoRA on experts
    turns autocast off around its product)."""

    def __new__(cls, device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else _AUTOCAST(device_type, *args, **kwargs)


_AUTOCAST = torch.autocast
