# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the loss loses where a layer is rounded to each of several widths, from one backward pass of the float model.

Rounding moves a weight by `dW`. To second order the loss then rises by `dW^T H dW / 2`, and near a trained model the Hessian
`H` is about the Fisher information, of which the diagonal is kept: `sum(E[g^2] * dW^2) / 2` with gradients `g` of single tokens.
For a linear layer they are products of what went in and of what comes back, `delta x^T`, so that the sum over tokens of their
squares is one product of matrices, `(delta^2)^T x^2`.

Error feedback, by which codes are found from data, makes later inputs of a layer pay for the errors of earlier ones. What is left
of an input's error is the share of its variance that the later ones don't explain: `left_by_feedback` measures the shares, and
each column of `dW^2` counts by its own.

A layer's `dW` and `E[g^2]` are made when the backward pass reaches it and given up before it goes on: beside the pass itself,
without gradients of weights, a few tensors of one layer's size are there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional, Union

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from peft_ext.examples import IGNORED
from peft_ext.language_model import device_of, inference, is_causal
from peft_ext.quant.conversion import weight_of
from peft_ext.quant.matmul import linear


Batch = Union[torch.Tensor, Mapping[str, Any]]
# Of the mean energy, added to each input's; and rows below which a layer isn't calibrated: both as `calibrate` has them.
_DAMPING, _LEAST_ROWS = 0.01, 32
Errors = Callable[[str, torch.Tensor], Iterable[torch.Tensor]]


def sensitivities(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    errors: Errors,
    batches: Iterable[Batch],
    shares: Optional[Mapping[str, torch.Tensor]] = None,
    progressbar: bool = False,
) -> dict[str, list[float]]:
    """How much the loss of a batch's tokens rises, to second order, where each layer alone is rounded.

    Args:
        model: A float model; its weights, modes and `requires_grad` are what they were afterwards.
        layers: Float layers of it, by name: `nn.Linear` or `Conv1D`.
        errors: Of a layer's name and weight `[out, in]`: what each width moves the weight by, `[out, in]` each, one after
            the other.
        batches: What the model takes, see [`calibrate`]. A batch without labels is predicted token by token.
        shares: Of layers, what is left of each input's error, `[in]`; 1 without. See [`left_by_feedback`].

    Returns:
        By layer, nats a token for each width. Layers that no batch reaches are left out.

    Raises:
        ValueError: If there are no batches, or the model has no loss for one.
    """
    found: dict[str, list[float]] = {}

    def add(name: str, layer: nn.Module, x: torch.Tensor, delta: torch.Tensor) -> None:
        squares = _squared_gradients(x, delta)
        if shares is not None and name in shares:
            squares *= shares[name]
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


def left_by_feedback(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Batch, damping: float = _DAMPING
) -> dict[str, torch.Tensor]:
    """Of each input of each layer, the share of its variance that the inputs behind it don't explain: what error feedback leaves
    of the damage that rounding does there. One forward pass, of which no layer's inputs are kept.

    Args:
        model: A float model.
        layers: Float layers of it, by name.
        inputs: All batches as one.
        damping: As of [`quantize_calibrated`].

    Returns:
        `[in]` by layer, from 0 to 1; layers that see few inputs, by which nothing is calibrated either, are left out.
    """
    found: dict[str, torch.Tensor] = {}
    last: tuple[torch.Tensor, torch.Tensor] | None = None
    mask = None if isinstance(inputs, torch.Tensor) else inputs.get("attention_mask")

    def before(name: str, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal last
        x = args[0]
        if name in found or x.numel() < _LEAST_ROWS * x.shape[-1]:
            return
        if last is None or last[0] is not x:  # q, k and v share theirs
            rows = x[mask.bool()] if mask is not None and x.shape[:-1] == mask.shape else x
            last = x, unexplained(rows.reshape(-1, x.shape[-1]), damping)
        found[name] = last[1]
        if len(found) == len(layers):
            raise _AllSeen

    handles = [layer.register_forward_pre_hook(partial(before, name)) for name, layer in layers.items()]
    try:
        with inference(model):
            model(inputs) if isinstance(inputs, torch.Tensor) else model(**inputs)
    except _AllSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def unexplained(x: torch.Tensor, damping: float = _DAMPING) -> torch.Tensor:
    """The shares `[in]` of one layer's inputs `[rows, in]`, rounded by falling energy, as error feedback does."""
    x = x.float()
    hessian = linear(x.t(), x.t()) / len(x)
    energy = hessian.diagonal().clone()
    hessian.diagonal().add_(damping * energy.mean().clamp(min=torch.finfo(energy.dtype).tiny))
    damped = hessian.diagonal().clone()
    order = energy.argsort(descending=True, stable=True)
    # 1 / u_i^2 is the variance of the i-th given those behind it, with U^T U the inverse
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    left = torch.linalg.cholesky(inverse, upper=True).diagonal().square().reciprocal()
    shares = torch.empty_like(energy)
    shares[order] = left
    return (shares / damped).clamp(0, 1)


class _AllSeen(Exception):
    """Ends the forward pass behind the last layer's input."""


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
