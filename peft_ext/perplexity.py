# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Perplexity of a causal language model on blocks of tokens."""

from __future__ import annotations

import math

import torch
from torch import nn
from tqdm.auto import tqdm

from peft_ext.language_model import device_of, inference


def perplexity(model: nn.Module, blocks: torch.Tensor, *, batch_size: int = 4, progressbar: bool = False) -> float:
    """exp of the mean loss of predicting each token of a block from those before it.

    Blocks are independent: the first token of each is seen but not predicted. The model is in eval mode meanwhile, and
    every part of it in its own mode afterwards.

    Args:
        model: A causal language model that returns a `loss` for `labels`, as transformers' and PEFT's do.
        blocks: Token ids `[blocks, block_size]`, see [`peft_ext.text.token_blocks`].
        batch_size: Blocks per forward pass; the result doesn't depend on it.
        progressbar: Show a progress bar.

    Returns:
        The perplexity; infinity if it is too large for a float.

    Raises:
        ValueError: If `blocks` is not 2-dimensional, is empty, or has blocks of one token; or `batch_size` is below 1.
    """
    if blocks.dim() != 2 or blocks.shape[0] == 0 or blocks.shape[1] < 2:
        raise ValueError(f"blocks must be [blocks, block_size] with at least 1 x 2 tokens, got {list(blocks.shape)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    device = device_of(model)
    total = 0.0
    with inference(model):
        for batch in tqdm(blocks.split(batch_size), desc="Perplexity", disable=not progressbar, leave=False):
            batch = batch.to(device)
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            total += loss.item() * batch.shape[0]
    try:
        return math.exp(total / blocks.shape[0])
    except OverflowError:
        return math.inf
