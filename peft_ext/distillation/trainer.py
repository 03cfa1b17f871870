# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Distillation for transformers' and TRL's trainers: `class Mine(DistillationMixin, SFTTrainer)`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn
from transformers import Trainer

from peft_ext.distillation.cached_logits import (
    DEFAULT_TOP_K,
    CachedLogits,
    data_digest,
    texts_of,
    tokenizer_digest,
)
from peft_ext.distillation.loss import Objective
from peft_ext.distillation.output_head import OutputHead, output_head
from peft_ext.distillation.student import student_pass
from peft_ext.distillation.teacher import LiveTeacher, load_teacher, teacher_digest
from peft_ext.examples import Example
from peft_ext.language_model import is_causal, text_config, unwrapped
from peft_ext.token_mean import share


logger = logging.getLogger(__name__)


def check_no_other_loss(args: Any) -> None:
    """Refuse a loss among a trainer's arguments that distillation would replace.

    Raises:
        ValueError: Names it.
    """
    smoothing, kind = args.label_smoothing_factor, getattr(args, "loss_type", "nll")
    for name, value, other in (
        ("label_smoothing_factor", smoothing, bool(smoothing)),
        ("loss_type", kind, kind not in ("nll", "chunked_nll")),
    ):
        if other:
            raise ValueError(f"{name}={value!r} is another loss than distillation's; leave it out, or distil nothing.")


class DistillationMixin:
    """Makes a trainer minimise `(1 - distill) * cross_entropy + distill * temperature**2 * KL(teacher || student)`.

    It stands before transformers' `Trainer` or TRL's `SFTTrainer` among the bases of a class. The tokens are those that the
    trainer's own loss is on (labels other than -100), scaled as the trainer scales it (`num_items_in_batch`, processes). Neither
    model's logits of a whole batch are made. In evaluation the loss is the trainer's own.

    Args:
        *args: The trainer's.
        teacher_model: A causal language model with the student's vocabulary, or a name that
            [`peft_ext.models.load`] takes (loaded in bfloat16). None: `teacher_logits` is complete, or `distill` is 0.
        distill, temperature, beta: See `loss.Objective`.
        teacher_device: Where the teacher runs; by default where a model that is passed is, and a named one beside the student.
        teacher_logits: A folder to keep the teacher's distributions in; made before the first step unless they are there, and
            then the teacher is let go.
        top_k: Tokens that are kept there for each.
        **kwargs: The trainer's.

    Raises:
        ValueError: If a value is out of its range, no teacher is there, or the trainer has a loss of its own.

    Example:

    ```py
    >>> class MyTrainer(DistillationMixin, SFTTrainer): ...
    >>> trainer = MyTrainer(model=packed, args=SFTConfig(...), train_dataset=data, teacher_model=float_model, distill=0.5)
    ```
    """

    # of the trainer that this stands before
    args: Any
    model: Any
    accelerator: Any

    def __init__(
        self,
        *args: Any,
        teacher_model: Union[None, str, nn.Module] = None,
        distill: float = 0.5,
        temperature: float = 1.0,
        beta: float = 0.0,
        teacher_device: Union[None, str, torch.device] = None,
        teacher_logits: Union[None, str, Path] = None,
        top_k: int = DEFAULT_TOP_K,
        **kwargs: Any,
    ) -> None:
        self.objective = Objective(distill, temperature, beta)
        if distill and teacher_model is None and teacher_logits is None:
            raise ValueError(f"distill={distill} needs teacher_model, or teacher_logits that are complete.")
        super().__init__(*args, **kwargs)
        self._teacher_named, self._teacher_device = teacher_model, teacher_device
        self._teacher_logits, self._top_k = teacher_logits, top_k
        self._teacher: Union[None, LiveTeacher, CachedLogits] = None
        self._head: Optional[OutputHead] = None
        self._ready = False
        self._parts: dict[str, list[torch.Tensor]] = {"cross_entropy": [], "divergence": []}
        if distill:
            self._check()
            # its loss is scaled by the items of all accumulated batches, whatever the model's own takes
            self.model_accepts_loss_kwargs = True

    def _check(self) -> None:
        """Refuse what another loss than ours, or another process, would be needed for."""
        check_no_other_loss(self.args)
        if getattr(self, "compute_loss_func", None) is not None:
            raise ValueError("compute_loss_func is another loss than distillation's; leave it out, or pass distill=0.")
        if not is_causal(self.accelerator.unwrap_model(self.model)):
            raise ValueError(
                f"distillation is for causal language models; the model is a {type(self.model).__name__}."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"distillation runs one process for each device, and here one has {self.args.n_gpu}; start it with "
                "`accelerate launch`, or show it one device (CUDA_VISIBLE_DEVICES)."
            )

    def prepare_teacher(self) -> None:
        """Load the teacher, or make its distributions on disk; `train` does it by itself."""
        if self._ready or not self.objective.distill:
            return
        student = self.accelerator.unwrap_model(self.model)
        self._head = output_head(student)
        if self._head is None:
            kind = type(unwrapped(student)).__name__
            logger.warning(
                "All logits of a batch are made at once, which takes memory: a %s can't make some of them.", kind
            )
        if self._teacher_logits is None:
            self._teacher = self._live()
            self._compare_vocabularies(self._teacher.vocabulary)
        else:
            with self.args.main_process_first(desc="the teacher's logits"):
                self._teacher = self._cached()
            self._teacher_named = None
        self._ready = True

    def _live(self) -> LiveTeacher:
        model, device = self._teacher_named, self._teacher_device
        if isinstance(model, str):
            model, device = load_teacher(model), device or self.args.device
        assert model is not None
        return LiveTeacher(model, self.objective.temperature, device)

    def _compare_vocabularies(self, vocabulary: int) -> None:
        own = text_config(self.accelerator.unwrap_model(self.model)).vocab_size
        if vocabulary != own:
            raise ValueError(
                f"teacher_model has a vocabulary of {vocabulary:,} tokens, the student of {own:,}; a teacher needs the "
                "student's own."
            )

    def _cached(self) -> CachedLogits:
        assert self._teacher_logits is not None
        examples = list(self._texts())
        cache = CachedLogits(
            self._teacher_logits,
            teacher=None if self._teacher_named is None else teacher_digest(self._teacher_named),
            tokenizer=tokenizer_digest(getattr(self, "processing_class", None)),
            data=data_digest(examples),
            vocabulary=text_config(self.accelerator.unwrap_model(self.model)).vocab_size,
            temperature=self.objective.temperature,
            top_k=self._top_k,
        )
        if not cache.complete:
            cache.fill(self._live(), examples, progressbar=not self.args.disable_tqdm)
        return cache

    def _texts(self) -> Iterator[Example]:
        """All texts that are trained on, as the collator makes them."""
        trainer: Any = self
        data = trainer.train_dataset
        if data is None or not hasattr(data, "__len__"):
            raise ValueError("teacher_logits needs a train_dataset that has a length, to read all of it beforehand.")
        collate = trainer.data_collator
        if hasattr(trainer, "_get_collator_with_removed_columns"):
            collate = trainer._get_collator_with_removed_columns(collate, description="training")
        for row in data:
            yield from texts_of(collate([row]))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, with the teacher ready."""
        self.prepare_teacher()
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective in training; the trainer's own loss in evaluation, and where `distill` is 0."""
        if not (self.objective.distill and self.model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        self.prepare_teacher()
        if "labels" not in inputs:
            raise ValueError("distillation needs labels in every batch, and the tokens of a whole text in each row.")
        assert self._teacher is not None
        balanced = getattr(self, "aux_loss_enabled", False)  # SFTTrainer's, of a mixture of experts
        batch = {**inputs, **({"output_router_logits": True} if balanced else {})}
        sums, tokens, outputs = student_pass(model, batch, self._teacher.of(inputs), self.objective, self._head)
        loss = share(self, sums.loss, tokens, num_items_in_batch)
        if balanced:
            steps = getattr(self, "current_gradient_accumulation_steps", 1) if num_items_in_batch is not None else 1
            loss = loss + getattr(self, "router_aux_loss_coef", 0.0) * outputs["aux_loss"].to(loss.device) / steps
        for name, values in self._parts.items():
            values.append(torch.stack([getattr(sums, name).float(), tokens.float()]))
        if return_outputs:
            with torch.no_grad():
                return loss, model(**{name: value for name, value in inputs.items() if name != "labels"})
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own, with the mean cross-entropy and divergence of this process's tokens since the last one."""
        if "loss" in logs:
            for name, values in self._parts.items():
                if values:
                    total, count = torch.stack(values).sum(0).tolist()
                    logs[name] = total / max(1.0, count)
                    values.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class DistillationTrainer(DistillationMixin, Trainer):
    """transformers' Trainer with [`DistillationMixin`]."""
