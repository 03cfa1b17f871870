# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Trains one classifier of the study with transformers' Trainer; selects by accuracy on in-distribution validation
texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import (
    BatchEncoding,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_ext.files import scratch
from peft_ext.ood.contrastive import ByClass, supervised_contrastive_loss
from peft_ext.ood.features import Features, head_recorded, one_per_text
from peft_ext.ood.metrics import id_accuracy
from peft_ext.ood.study.data import Data


# Inverse strengths of regularisation that the linear probe chooses from.
PROBE_STRENGTHS = (1.0, 10.0, 100.0)


@dataclass(frozen=True)
class TrainingOptions:
    """How classifiers are trained.

    Attributes:
        epochs: At most.
        patience: Epochs without better validation accuracy after which training stops; None: all epochs.
        batch_size: Of training.
        eval_batch_size: Of everything else.
        max_length: Tokens of a text at most.
        learning_rates: Of each method (`full`, `lora`, ...); several are a grid, searched with the first seed. Others take
            their method's default.
        head_learning_rate: Of the head, which starts from nothing.
        weight_decay: Of weights; biases and norms have none.
        warmup_ratio: Share of the steps.
        calibration_examples: Training texts that packed methods calibrate on.
        contrastive: Weight of a supervised contrastive term on what the head sees, beside cross-entropy; 0: none.
        contrastive_temperature: Its temperature.
        together: With it, texts of a class that stand side by side in a batch.
        arguments: More of transformers' `TrainingArguments`.
    """

    epochs: int = 10
    patience: Optional[int] = 2
    batch_size: int = 32
    eval_batch_size: int = 64
    max_length: int = 128
    learning_rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    head_learning_rate: float = 5e-3
    weight_decay: float = 0.1
    warmup_ratio: float = 0.1
    calibration_examples: int = 256
    contrastive: float = 0.0
    contrastive_temperature: float = 0.1
    together: int = 4
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.contrastive < float("inf"):
            raise ValueError(f"contrastive={self.contrastive!r} must be a finite number of at least 0.")
        if not self.contrastive_temperature > 0:
            raise ValueError(f"contrastive_temperature={self.contrastive_temperature!r} must be greater than 0.")
        if not 2 <= self.together <= self.batch_size:
            raise ValueError(
                f"together={self.together!r} must be at least 2, and at most the batch size, {self.batch_size}."
            )


class Trained(NamedTuple):
    """What training came to."""

    validation_accuracy: float
    epochs: float


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    options: TrainingOptions,
    learning_rate: float,
    seed: int,
) -> Trained:
    """Train what requires gradients; the model is left as it was after its best epoch.

    Args:
        model: The classifier, prepared by `methods.apply`.
        tokenizer: Its tokenizer.
        data: Texts and labels.
        options: How.
        learning_rate: Of all but the head.
        seed: Of the batches' order.
    """
    best = _KeepBest(options.patience)
    with scratch("ood-study") as folder, head_recorded(model) as recorded:
        trainer = _Trainer(
            model=model,
            args=_arguments(str(folder), options, learning_rate, seed),
            train_dataset=_encoded(tokenizer, data.train, options.max_length),
            eval_dataset=_encoded(tokenizer, data.validation, options.max_length),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda output: {"accuracy": id_accuracy(output.predictions.argmax(-1), output.label_ids)},
            callbacks=[best],
        )
        trainer.head_learning_rate = options.head_learning_rate
        trainer.options, trainer.recorded = options, recorded
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    best.restore(model)
    return Trained(best.accuracy, best.epochs)


def probe(
    head: nn.Linear, train: Features, labels: Sequence[int], validation: Features, truth: Sequence[int]
) -> Trained:
    """Fit the head alone, on features of the frozen model: logistic regression without bias, its regularisation chosen on
    validation accuracy. The head is set to it.
    """
    # brought to a mean length of 1, so that the same strengths suit any model; the head takes the scale over
    scale = float(train.features.norm(dim=1).mean())
    best: tuple[float, Optional[np.ndarray]] = (-1.0, None)
    for strength in PROBE_STRENGTHS:
        model = LogisticRegression(C=strength, fit_intercept=False, max_iter=500)
        model.fit(train.features.numpy() / scale, labels)
        accuracy = id_accuracy(model.predict(validation.features.numpy() / scale), truth)
        if accuracy > best[0]:
            weight = np.zeros((head.out_features, head.in_features))
            # two classes have one row, whose negative is the other's
            rows = model.coef_ if len(model.classes_) > 2 else np.concatenate([-model.coef_, model.coef_]) / 2
            weight[model.classes_] = rows / scale
            best = accuracy, weight
    with torch.no_grad():
        head.weight.copy_(torch.tensor(best[1]))
    return Trained(best[0], 0)


def calibration_batch(tokenizer: PreTrainedTokenizerBase, data: Data, options: TrainingOptions) -> BatchEncoding:
    """Model inputs from training texts, evenly spread over them; padded on the right, which calibration passes over."""
    texts = data.train[0][:: max(1, len(data.train[0]) // options.calibration_examples)]
    batch = tokenizer(
        texts, truncation=True, max_length=options.max_length, padding=True, padding_side="right", return_tensors="pt"
    )
    return BatchEncoding({name: batch[name] for name in ("input_ids", "attention_mask")})


def _encoded(
    tokenizer: PreTrainedTokenizerBase, part: tuple[list[str], list[int]], max_length: int
) -> list[dict[str, Any]]:
    encoded = tokenizer(part[0], truncation=True, max_length=max_length)
    names = ("input_ids", "attention_mask")
    return [{**{name: encoded[name][row] for name in names}, "labels": label} for row, label in enumerate(part[1])]


class _KeepBest(TrainerCallback):
    """Keeps what is trained as it was after the best epoch, in memory, and stops when nothing gets better.

    (The Trainer's own way goes through checkpoints on disk, and refuses prefixes.)
    """

    def __init__(self, patience: Optional[int]) -> None:
        self.accuracy, self.epochs = -1.0, 0
        self._patience, self._since = patience, 0
        self._state: dict[str, torch.Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epochs += 1
        self._since += 1
        accuracy = kwargs["metrics"]["eval_accuracy"]
        if accuracy > self.accuracy:
            self.accuracy, self._since = accuracy, 0
            parameters = kwargs["model"].named_parameters()
            self._state = {name: value.detach().clone() for name, value in parameters if value.requires_grad}
        if self._patience is not None and self._since >= self._patience:
            control.should_training_stop = True

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put the best epoch's numbers back."""
        for name, value in model.named_parameters():
            if name in self._state:
                value.copy_(self._state[name])


class _Trainer(Trainer):
    """With a learning rate of its own for the head, and a contrastive term if the options have one."""

    head_learning_rate: float
    options: TrainingOptions
    recorded: dict[str, torch.Tensor]
    optimizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # losses are means of their batch here, both of them: Trainer divides them by the accumulation steps
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.options.contrastive and model.training:
            seen = one_per_text(self.recorded, outputs.logits)
            term = supervised_contrastive_loss(seen, inputs["labels"], self.options.contrastive_temperature)
            loss = loss + self.options.contrastive * term
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.options.contrastive:
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return ByClass([row["labels"] for row in rows], self.options.together, self.args.seed)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if getattr(self, "optimizer", None) is None:
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    rate = self.head_learning_rate if ".score." in f".{name}" else self.args.learning_rate
                    decays = parameter.ndim > 1 and "_delta" not in name  # vectors and scales do not
                    decay = self.args.weight_decay if decays else 0.0
                    groups.setdefault((rate, decay), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
            )
        return self.optimizer


def _arguments(folder: str, options: TrainingOptions, learning_rate: float, seed: int) -> TrainingArguments:
    arguments: dict[str, Any] = {
        "output_dir": str(Path(folder) / "checkpoints"),
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.eval_batch_size,
        "learning_rate": learning_rate,
        "weight_decay": options.weight_decay,
        "warmup_steps": options.warmup_ratio,  # below 1, a share
        "lr_scheduler_type": "cosine",
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "logging_strategy": "no",
        "train_sampling_strategy": "group_by_length",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": seed,
        "use_cpu": not torch.accelerator.is_available(),  # without it, bf16 is refused on a CPU
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    return TrainingArguments(**{**arguments, **options.arguments})
