# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The training loop that all methods of a benchmark share, and the tiny model of its smoke run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Optional

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.core.models import named
from peft_ext.models import load
from peft_ext.text import PYTHON_DOCS, load_text


SMOKE_VOCAB = 256  # bytes
# Models and data of the smaller sizes: random weights, weights trained for a while on Python's documentation; bytes as tokens.
TINY, SMALL, BYTES = "tiny random Llama", "small trained Llama", "bytes of Python's documentation"
_SMALL_STEPS = 80


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a method trains."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    learning_rate: float,
    name: str = "Training",
    warmup_share: float = 0.1,
    progressbar: bool = True,
    loss_of: Optional[Callable[[nn.Module, Mapping[str, torch.Tensor]], torch.Tensor]] = None,
) -> list[float]:
    """One pass over `batches`, with AdamW and no weight decay, linear warm-up, then cosine decay to zero.

    Args:
        model: A causal language model; what `requires_grad` is trained.
        batches: Its inputs with labels, taken in order, so that every method sees the same; see [`causal_batches`].
        learning_rate: The peak learning rate.
        loss_of: The loss of model and batch; by default the model's own.

    Returns:
        The loss of every step; cut short if it is NaN or infinite.
    """
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(len(batches), warmup_share))
    model.train()
    losses: list[float] = []
    for batch in tqdm(batches, desc=name, disable=not progressbar, leave=False):
        loss = model(**batch, use_cache=False).loss if loss_of is None else loss_of(model, batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    model.eval()
    return losses


def causal_batches(blocks: torch.Tensor, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Blocks of tokens `[steps * batch_size, tokens]` as batches in which every token is predicted."""
    return [{"input_ids": batch, "labels": batch} for batch in blocks.split(batch_size)]


def _cosine(steps: int, warmup_share: float):
    warmup = max(1, round(warmup_share * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


class Restart:
    """Brings trained parameters back to where they stood when this was made, for the next learning rate."""

    def __init__(self, model: nn.Module) -> None:
        self.start = [(parameter, parameter.detach().clone()) for parameter in trainable(model)]

    @torch.no_grad()
    def __call__(self) -> None:
        for parameter, start in self.start:
            parameter.copy_(start)
            parameter.grad = None


def byte_blocks(texts: Sequence[str], block_size: int) -> torch.Tensor:
    """Bytes as tokens `[n, block_size]`, for models without a tokenizer."""
    data = torch.frombuffer(bytearray("\n".join(texts).encode()), dtype=torch.uint8).long()
    return data[: len(data) // block_size * block_size].view(-1, block_size)


def sample_blocks(blocks: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` blocks in random order, each at most once in a round over the data."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(list(_rounds(len(blocks), count, generator)))
    return blocks[order[:count]]


def _rounds(size: int, count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    for _ in range(math.ceil(count / size)):
        yield torch.randperm(size, generator=generator)


def tiny_llama(hidden_size: int = 128, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A small Llama with random weights; its widths are multiples of 64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SMOKE_VOCAB,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def float_model(name: str, seed: int = 0) -> nn.Module:
    """A model in float32: [`TINY`], [`SMALL`], `FLOAT_BASE`, or any that `peft_ext.models.load` knows."""
    if name == TINY:
        return tiny_llama(seed=seed)
    return (
        trained_llama(64, steps=_SMALL_STEPS, seed=seed) if name == SMALL else load(named(name), dtype=torch.float32)
    )


def trained_llama(
    hidden_size: int, layers: int = 4, steps: int = 300, seed: int = 0, blocks: Optional[torch.Tensor] = None
) -> LlamaForCausalLM:
    """A byte-level Llama, trained from scratch.

    Args:
        hidden_size: Its width.
        layers: Its layers.
        steps: Batches of 16 blocks.
        seed: Of its weights and of the order of blocks.
        blocks: Bytes `[n, tokens]`; by default the first half of Python's documentation, so that it can be tuned on the second.
    """
    if blocks is None:
        blocks = byte_blocks(load_text(PYTHON_DOCS).train, 128)
        blocks = blocks[: len(blocks) // 2]
    model = tiny_llama(hidden_size, layers, seed)
    batches = causal_batches(sample_blocks(blocks, 16 * steps, seed), 16)
    train(model, batches, learning_rate=3e-3 * math.sqrt(64 / hidden_size), name=f"Pre-training, {hidden_size} wide")
    return model
