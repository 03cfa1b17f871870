# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the loss loses where a layer is rounded to each of several widths, from one backward pass of the float model.

Rounding moves a weight by `dW`. To second order the loss then rises by `dW^T H dW / 2`, and near a trained model the Hessian
`H` is about the Fisher information, of which the diagonal is kept: `sum(E[g^2] * dW^2) / 2` with gradients `g` of single tokens.
For a linear layer they are products of what went in and of what comes back, `delta x^T`, so that the sum over tokens of their
squares is one product of matrices, `(delta^2)^T x^2`.

A layer's `dW` and `E[g^2]` are made when the backward pass reaches it and given up before it goes on: beside the pass itself,
without gradients of weights, a few tensors of one layer's size are there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Union

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from peft_ext.examples import IGNORED
from peft_ext.language_model import device_of, inference, is_causal
from peft_ext.quant.conversion import weight_of
from peft_ext.quant.matmul import linear


Batch = Union[torch.Tensor, Mapping[str, Any]]
Errors = Callable[[str, torch.Tensor], Iterable[torch.Tensor]]


def sensitivities(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    errors: Errors,
    batches: Iterable[Batch],
    progressbar: bool = False,
) -> dict[str, list[float]]:
    """How much the loss of a batch's tokens rises, to second order, where each layer alone is rounded.

    Args:
        model: A float model; its weights, modes and `requires_grad` are what they were afterwards.
        layers: Float layers of it, by name: `nn.Linear` or `Conv1D`.
        errors: Of a layer's name and weight `[out, in]`: what each width moves the weight by, `[out, in]` each, one after
            the other.
        batches: What the model takes, see [`calibrate`]. A batch without labels is predicted token by token.

    Returns:
        By layer, nats a token for each width. Layers that no batch reaches are left out.

    Raises:
        ValueError: If there are no batches, or the model has no loss for one.
    """
    found: dict[str, list[float]] = {}

    def add(name: str, layer: nn.Module, x: torch.Tensor, delta: torch.Tensor) -> None:
        squares = _squared_gradients(x, delta)
        rises = [float((squares * error.square()).sum()) / 2 for error in errors(name, weight_of(layer).detach())]
        found[name] = [one + more for one, more in zip(found.get(name, [0.0] * len(rises)), rises)]

    tokens = 0
    with inference(model), _probed(model, layers, add):
        for batch in tqdm(batches, desc="Sensitivities", unit="batch", disable=not progressbar, leave=False):
            with torch.enable_grad():
                loss, count = _loss(model, batch)
                loss.backward()
            tokens += count
    if not tokens:
        raise ValueError(
            "the batches have no token to predict; pass training data, by which bits_budget weighs the layers."
        )
    return {name: [rise / tokens for rise in rises] for name, rises in found.items()}


def _squared_gradients(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of the squared gradients of a weight, float32 `[out, in]`; x: `[..., in]`, delta: `[..., out]`."""
    x, delta = (each.reshape(-1, each.shape[-1]).float().square() for each in (x, delta))
    return linear(delta.t(), x.t())


@contextmanager
def _probed(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    found: Callable[[str, nn.Module, torch.Tensor, torch.Tensor], None],
) -> Iterator[None]:
    """While the block runs, a backward pass tells what went into each layer and what comes back to its output, and makes no
    gradient of any parameter."""

    def hook(name: str) -> Callable[..., torch.Tensor]:
        def after(layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled() or not output.numel():
                return output
            if not output.requires_grad:  # before it there is nothing that has a gradient
                output = output.detach().requires_grad_().clone()
            x = args[0].detach()
            output.register_hook(lambda delta: found(name, layer, x, delta.detach()))
            return output

        return after

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def _loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
    """The model's own loss of a batch, summed over what is predicted, and how much that is."""
    device, causal = device_of(model), isinstance(model, PreTrainedModel) and is_causal(model)
    causal = causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    inputs: dict[str, Any] = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
    inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    if "labels" not in inputs and causal and "input_ids" in inputs:
        labels, mask = inputs["input_ids"], inputs.get("attention_mask")
        inputs["labels"] = labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
    if getattr(getattr(model, "config", None), "use_cache", False):
        inputs["use_cache"] = False
    loss = (
        getattr(model(**inputs), "loss", None) if isinstance(model, PreTrainedModel) and "labels" in inputs else None
    )
    if loss is None:
        raise ValueError(
            f"bits_budget weighs layers by a loss, which {type(model).__name__} has none of for the batches; pass a model of "
            "transformers and batches with labels, or name widths yourself: bits= and bits_pattern=."
        )
    labels = inputs["labels"]
    count = int(((labels[..., 1:] if causal else labels) != IGNORED).sum())
    return loss * count, count
