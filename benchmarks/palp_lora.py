# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What PALP is measured against: LoRA with a classification head, trained by transformers' Trainer."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments


class Classifier(nn.Module):
    """The language model's backbone under LoRA, and a linear layer on the last token's hidden state."""

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__()
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        self.backbone = get_peft_model(model, lora)
        self.head = nn.Linear(model.config.hidden_size, classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: Any = None) -> dict[str, Any]:
        """Padded on the left."""
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, -1]
        logits = self.head(states.float())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def lora_accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    training: tuple[list[str], np.ndarray],
    test: tuple[list[str], np.ndarray],
    epochs: int,
    seed: int,
    batch_size: int = 16,
    learning_rate: float = 3e-4,
) -> float:
    """Accuracy on the test texts after training.

    Args:
        model: A backbone (`AutoModel`) of its own: it is changed.
        tokenizer: Its tokenizer, with a padding token.
        training, test: Whole texts and their labels.
        epochs, seed, batch_size, learning_rate: Of the training.
    """
    torch.manual_seed(seed)
    names = np.unique(training[1])
    classifier = Classifier(model, len(names))
    rows = [
        {"text": text, "label": int(code)}
        for text, code in zip(training[0], np.searchsorted(names, training[1]).tolist())
    ]

    def batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        found = _encoded(tokenizer, [row["text"] for row in rows])
        return {**found, "labels": torch.tensor([row["label"] for row in rows])}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=0.1,
            lr_scheduler_type="linear",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        )
        Trainer(classifier, arguments, train_dataset=rows, data_collator=batch).train()  # type: ignore[arg-type]
    classifier.eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(test[0]), 32):
            inputs = _encoded(tokenizer, test[0][start : start + 32])
            device = classifier.head.weight.device
            found.append(classifier(**{n: v.to(device) for n, v in inputs.items()})["logits"].argmax(-1).cpu())
    return 100 * float(np.mean(names[torch.cat(found).numpy()] == test[1]))


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, torch.Tensor]:
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=256)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
