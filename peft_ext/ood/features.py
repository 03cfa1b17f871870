# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What detectors see of texts: the input of a classifier's last linear layer, states of layers below it if asked for, and its
logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Union

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from peft_ext.language_model import check_tokens, device_of, inference, unwrapped
from peft_ext.ood.classifier import PooledClassifier, layer_list, pool
from peft_ext.threads import hooks_of_this_thread


class Features(NamedTuple):
    """Of each text, what the head sees `[texts, size]` and what it gives `[texts, labels]`; float32, on the CPU.

    With `layers`, the features are unit vectors side by side: of each layer's state, and last of what the head sees.
    """

    features: torch.Tensor
    logits: torch.Tensor


def extract(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    batch_size: int = 64,
    progressbar: bool = False,
    layers: Sequence[int] = (),
) -> Features:
    """Run texts through a classifier of transformers, adapted by PEFT or not, in eval mode.

    Args:
        model: A model for sequence classification: its output has `logits`, made by a linear layer.
        tokenizer: Its tokenizer.
        texts: The texts; one without tokens, such as an empty one, is read as the tokenizer's start token.
        max_length: Tokens of a text at most.
        batch_size: Texts at a time; those of similar length go together.
        progressbar: Show one.
        layers: Layers of the body whose states stand beside the head's input, numbered as transformers' `hidden_states`: 1 is
            what the first layer gives; negative numbers count from the end. A state is pooled as [`PooledClassifier`] does;
            for other models, it is the last token's of a causal one and the mean over an encoder's. See [`chosen_layers`].

    Raises:
        ValueError: If there is no text, the model has no linear layer that makes its logits, or no such layer.
    """
    if not texts:
        raise ValueError("texts is empty; there is nothing to extract features from.")
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    for index, tokens in enumerate(encoded):
        if not tokens:
            tokens.append(_stand_in(tokenizer, texts[index]))
    check_tokens(model, encoded, tokenizer)
    order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    parts: list[Features] = []
    with inference(model), head_recorded(model) as recorded, _layers_recorded(model, layers) as states:
        for start in tqdm(range(0, len(order), batch_size), disable=not progressbar, desc="Features", leave=False):
            rows = [{"input_ids": encoded[index]} for index in order[start : start + batch_size]]
            batch = tokenizer.pad(rows, return_tensors="pt").to(device_of(model))
            logits = model(**batch).logits
            features = one_per_text(recorded, logits).float()
            if states:
                pooling = _pooling_of(model, recorded)
                vectors = [pool(state.float(), batch["attention_mask"], pooling) for state in states.values()]
                features = torch.cat([nn.functional.normalize(each, dim=-1) for each in (*vectors, features)], dim=-1)
            parts.append(Features(features.cpu(), logits.float().cpu()))
    inverse = torch.empty(len(order), dtype=torch.long)
    inverse[torch.tensor(order)] = torch.arange(len(order))
    features, logits = (torch.cat(tensors)[inverse] for tensors in zip(*parts))
    return Features(features, logits)


def chosen_layers(model: nn.Module, layers: Union[None, str, Sequence[int]]) -> list[int]:
    """The numbers of layers, counted from the first, in their order.

    Args:
        model: The classifier.
        layers: Numbers as [`extract`] takes them; None: none; `"auto"`: the last but one, if there is one.

    Raises:
        ValueError: If the model has no such layer, or its layers can't be told.
    """
    if layers is None or len(layers) == 0:
        return []
    stack = layer_list(unwrapped(model))
    if isinstance(layers, str):
        if layers != "auto":
            raise ValueError(f"layers={layers!r} must be 'auto', None, or numbers of layers such as [-2].")
        return [] if stack is None or len(stack) < 2 else [len(stack) - 1]
    if stack is None:
        raise ValueError(f"layers={layers!r}: no list of layers was found in a {type(unwrapped(model)).__name__}.")
    count, found = len(stack), set[int]()
    for number in layers:
        index = number + count + 1 if isinstance(number, int) and number < 0 else number
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= index <= count:
            raise ValueError(
                f"layers={layers!r}: {number!r} is none of the model's {count} layers; choose from 1 to {count}."
            )
        found.add(index)
    return sorted(found)


def _pooling_of(model: nn.Module, recorded: dict[str, torch.Tensor]) -> str:
    """How a text's states become one: as the classifier does it, or the last token's where it makes logits of every token."""
    base = unwrapped(model)
    if isinstance(base, PooledClassifier):
        return base.config.pooling
    return "last" if recorded["input"].ndim == 3 else "mean"


@contextmanager
def _layers_recorded(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block, holds what came out of layers `[batch, tokens, size]`.

    (By hooks of our own: those that transformers leaves in a model that was asked for `output_hidden_states` can't be pickled.)
    """
    recorded: dict[int, torch.Tensor] = {}
    numbers = chosen_layers(model, layers)
    stack = layer_list(unwrapped(model)) if numbers else None

    def recorder(number: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            recorded[number] = output if isinstance(output, torch.Tensor) else output[0]

        return record

    with hooks_of_this_thread([] if stack is None else [(stack[number - 1], recorder(number)) for number in numbers]):
        yield recorded


def _stand_in(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """What a text without tokens is read as: the start of a text."""
    for name in ("bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    raise ValueError(f"the text {text!r} has no tokens, and the tokenizer no special token to stand for it.")


@contextmanager
def head_recorded(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Within the block, holds what came into and out of the last linear layer with as many outputs as labels."""
    labels = _num_labels(model)
    recorded: dict[str, torch.Tensor] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        recorded["input"], recorded["output"] = args[0], output

    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == labels]
    with hooks_of_this_thread((head, record) for head in heads):
        yield recorded


def _num_labels(model: nn.Module) -> int:
    labels = getattr(getattr(unwrapped(model), "config", None), "num_labels", None)
    if labels is None:
        raise ValueError(
            f"{type(model).__name__} has no config with num_labels; pass a model for sequence classification."
        )
    return labels


def one_per_text(recorded: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """The head's input of the token whose logits the model gave `[batch, size]`."""
    if not recorded or recorded["output"].shape[-1] != logits.shape[-1]:
        raise ValueError("no linear layer makes this model's logits; detectors need the features behind one.")
    features = recorded["input"]
    if features.ndim == 2:
        return features
    if features.ndim != 3 or recorded["output"].shape[:2] != features.shape[:2]:
        raise ValueError(
            f"the input of the model's head has shape {tuple(features.shape)}; expected one row per text."
        )
    # causal classifiers of transformers make logits of all tokens, and pick those of the last that isn't padding
    match = (recorded["output"] == logits[:, None, :]).all(dim=-1).float()
    position = match * torch.arange(1, features.shape[1] + 1, device=match.device)
    return features[torch.arange(len(features), device=features.device), position.argmax(dim=1)]
