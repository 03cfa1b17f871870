# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What is measured of generated texts whatever they are about: perplexity under a language model, diversity,
repetition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from peft_ext.ngrams import distinct, repetition


__all__ = ["continuation_perplexity", "distinct", "repetition"]


@torch.no_grad()
def continuation_perplexity(
    model: nn.Module, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], batch_size: int = 32
) -> float:
    """Perplexity of continuations given their prompts, over all their tokens.

    Args:
        model: A causal language model that steered nothing.
        prompts, continuations: Tokens; empty continuations are left out.
    """
    pairs = [(list(p), list(c)) for p, c in zip(prompts, continuations) if len(c)]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    loss, count = 0.0, 0
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        width = max(len(p) + len(c) for p, c in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for row, (prompt, continuation) in enumerate(batch):
            length = len(prompt) + len(continuation)
            ids[row, :length] = torch.tensor(prompt + continuation)
            mask[row, :length] = 1
            labels[row, len(prompt) : length] = torch.tensor(continuation)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        loss += nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    return math.exp(loss / count) if count else math.nan
