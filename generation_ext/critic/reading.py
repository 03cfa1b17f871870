# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a critic reads of a text: states of some layers after its last token, each perhaps beside its mean over the text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import nn

from generation_ext.shared_prefix.candidates import Branches, Prefix
from generation_ext.shared_prefix.encoded_text import LastStates
from generation_ext.shared_prefix.inner_states import decoder_layers, states_of
from generation_ext.shared_prefix.running_states import NOTHING, Wanted, running_means
from peft_ext.language_model import LanguageModel, hidden_size, text_config


AUTO = "auto"
Layer = Union[int, str, list[int], tuple[int, ...], None]


@dataclass(frozen=True)
class Reading:
    """What a critic reads, as one vector for each text: layer by layer the state, and its mean over the text if there is one.

    The text is all that the language model was fed: prompt and continuation, without padding.

    Attributes:
        layers: Indices of hidden states, from 1 (after the first layer) to `last`.
        last: The number of layers: the last hidden states, which the output head reads.
        running_mean: Whether there are means.
    """

    layers: tuple[int, ...]
    last: int
    running_mean: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is the last hidden state alone, which every forward pass gives."""
        return self.layers == (self.last,) and not self.running_mean

    @property
    def wanted(self) -> Wanted:
        """What a forward pass has to be asked for, plain readings included."""
        return Wanted(frozenset(self.layers), frozenset(self.layers if self.running_mean else ()))

    def of(self, text: Union[Prefix, Branches, LastStates]) -> torch.Tensor:
        """`[batch, size]` of a text, `[batch, k, size]` of candidates."""
        running = text.running
        if self.plain and self.last not in running.states:
            assert text.hidden is not None
            return text.hidden
        means = {index: running.mean(index) for index in self.layers} if self.running_mean else {}
        return self._joined(running.states, means)

    def after_each_token(self, states: dict[int, torch.Tensor], real: Optional[torch.Tensor] = None) -> torch.Tensor:
        """`[batch, tokens, size]`, of the text up to each token.

        Args:
            states: Index -> `[batch, tokens, hidden]`, from the text's beginning on.
            real: False where a token is padding, `[batch, tokens]`; None: nowhere.
        """
        means = {index: running_means(states[index], real) for index in self.layers} if self.running_mean else {}
        return self._joined(states, means)

    def _joined(self, states: dict[int, torch.Tensor], means: dict[int, torch.Tensor]) -> torch.Tensor:
        parts = []
        for index in self.layers:
            parts.append(states[index])
            if self.running_mean:
                parts.append(means[index])
        device = parts[-1].device
        return parts[0] if len(parts) == 1 else torch.cat([part.to(device) for part in parts], dim=-1)


def wanted_by(readings: Iterable[Reading]) -> Wanted:
    """What forward passes have to be asked for by several critics; nothing where all take the last hidden state alone."""
    readings = list(readings)
    wanted = NOTHING
    for reading in readings if not all(reading.plain for reading in readings) else ():
        wanted = wanted | reading.wanted
    return wanted


def checked_layers(model: nn.Module, layer: Layer, running_mean: bool) -> tuple[Optional[list[int]], int]:
    """A critic's layers and the width of what it reads, from what a user writes.

    Args:
        model: The language model.
        layer: From 1, the states after the first layer, to the number of layers; negative ones count from the end, -1
            is the last; several; `"auto"`: one in the middle, until a better one is chosen; None: the last.
        running_mean: Whether the means are read, too.

    Returns:
        The layers in their order, None for the last one alone; and the width.

    Raises:
        ValueError: If the model has no such layer.
    """
    language_model = LanguageModel(model)
    layers = decoder_layers(language_model)
    count = len(layers) if layers is not None else 1
    if layer == AUTO:
        chosen = [middle(count)] if layers is not None else [count]
    else:
        given = [-1] if layer is None else [layer] if isinstance(layer, int) else layer
        chosen = _indices(given, count, layer, type(language_model.base).__name__, layers is None)
    size = sum(widths(model, chosen)) * (2 if running_mean else 1)
    return (None if chosen == [count] else chosen), size


def middle(count: int) -> int:
    """The layer that is read until one is chosen."""
    return max(1, round(0.6 * count))


def reading_of(config: Any, model: nn.Module) -> Reading:
    """What a critic of this config reads of a language model."""
    layers = decoder_layers(LanguageModel(model))
    last = len(layers) if layers is not None else 1
    return Reading(tuple(config.layers or [last]), last, config.running_mean)


def read_width(config: Any, model: nn.Module) -> int:
    """Width of what a critic of this config reads."""
    reading = reading_of(config, model)
    return sum(widths(model, reading.layers)) * (2 if reading.running_mean else 1)


def read(
    model: nn.Module,
    reading: Reading,
    input_ids: torch.Tensor,
    attention_mask: Optional[torch.Tensor] = None,
    **inputs: Any,
) -> torch.Tensor:
    """What a critic reads after each token of texts, from one forward pass; gradients go through it.

    Args:
        model: The language model.
        reading: What.
        input_ids: `[batch, tokens]`; of an encoder-decoder the decoder's.
        attention_mask: 0 where a token is padding.
        inputs: What else the backbone takes.

    Returns:
        `[batch, tokens, size]`.
    """
    language_model = LanguageModel(model)
    real = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if real is not None and language_model.takes_positions and not bool(real[:, 0].all()):
        inputs["position_ids"] = (real.long().cumsum(dim=-1) - 1).clamp(min=0)

    def run() -> torch.Tensor:
        return language_model.backbone(input_ids=input_ids, use_cache=False, **inputs)[0]

    if reading.plain:
        return run()
    return reading.after_each_token(states_of(decoder_layers(language_model), reading.layers, run, ends=True), real)


def widths(model: nn.Module, indices: Sequence[int]) -> list[int]:
    """Widths of hidden states; OPT projects its last ones."""
    last, inner = hidden_size(model), text_config(LanguageModel(model).backbone).hidden_size
    layers = decoder_layers(LanguageModel(model))
    return [inner if layers is not None and index < len(layers) else last for index in indices]


def modules_behind(model: nn.Module, indices: Optional[list[int]]) -> set[nn.Module]:
    """Modules of the layers that hidden states of these indices don't depend on; None: the last ones."""
    layers = decoder_layers(LanguageModel(model))
    if layers is None or indices is None:
        return set()
    return {module for layer in layers[max(indices) :] for module in layer.modules()}


def _indices(given: Any, count: int, layer: Any, name: str, unknown: bool) -> list[int]:
    indices: list[int] = []
    for index in given if isinstance(given, (list, tuple)) else [None]:
        if not isinstance(index, int) or isinstance(index, bool) or not 1 <= abs(index) <= count:
            allowed = (
                "-1: its layers aren't a list that we know" if unknown else f"from 1 to {count}, from -{count} to -1"
            )
            raise ValueError(f"layer={layer!r}: model ({name}) takes {allowed}, a list of these, or 'auto'.")
        indices.append(index if index > 0 else index + count + 1)
    if not indices or len(set(indices)) < len(indices):
        raise ValueError(f"layer={layer!r} must name at least one layer, and none twice.")
    return sorted(indices)
