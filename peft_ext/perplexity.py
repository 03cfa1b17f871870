# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Perplexity of a causal language model on blocks of tokens, or on the tokens of examples that are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from peft_ext.examples import IGNORED, Example
from peft_ext.language_model import check_tokens, device_of, inference


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
    check_tokens(model, blocks.tolist(), what="block")
    device = device_of(model)
    total = 0.0
    with inference(model):
        for batch in tqdm(blocks.split(batch_size), desc="Perplexity", disable=not progressbar, leave=False):
            batch = batch.to(device)
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            total += loss.item() * batch.shape[0]
    return _exp(total / blocks.shape[0])


def example_perplexity(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int = 4, progressbar: bool = False
) -> float:
    """exp of the mean loss of the tokens that are trained: all of a text, a completion, the assistant's turns.

    Every such token counts the same, whichever example it stands in; the first token of an example is only seen. Of a
    mixture of experts, the router's own loss isn't in it.

    Args:
        model: A causal language model; in eval mode meanwhile, and in its own mode afterwards.
        examples: See [`peft_ext.examples.Encoder`].
        batch_size: Examples per forward pass; the result doesn't depend on it.
        progressbar: Show a progress bar.

    Returns:
        The perplexity; infinity if it is too large for a float.

    Raises:
        ValueError: If no token is trained, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    count = sum(example.trained for example in examples)
    if count == 0:
        raise ValueError("the examples have no token that is trained, so there is nothing to measure.")
    check_tokens(model, (example.input_ids for example in examples), what="example")
    device, total = device_of(model), 0.0
    ordered = sorted(examples, key=lambda example: len(example.input_ids))  # little padding
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    with inference(model):
        for batch in tqdm(batches, desc="Perplexity", disable=not progressbar, leave=False):
            inputs = padded(batch)
            labels = inputs.pop("labels")[:, 1:].to(device)
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            trained = labels != IGNORED
            total += nn.functional.cross_entropy(
                logits[trained].float(), labels[trained].to(logits.device), reduction="sum"
            ).item()
    return _exp(total / count)


def padded(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Examples as a batch, padded on the right: `input_ids`, `attention_mask` and `labels`, int64 `[batch, tokens]`."""

    def columns(rows: Sequence[list[int]], padding: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)

    ids = [example.input_ids for example in examples]
    return {
        "input_ids": columns(ids, 0),  # which token pads is of no matter: it is masked, and comes last
        "attention_mask": columns([[1] * len(row) for row in ids], 0),
        "labels": columns([example.labels for example in examples], IGNORED),
    }


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
