# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Assisted decoding (an assistant model, prompt lookup): drafted tokens are read in one forward pass of `generate`, whose
states and keys are those of every text that ends within the draft. Candidates behind all of these are one pass more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from generation_ext.shared_prefix.cache import PrefixLayer, masks
from generation_ext.shared_prefix.candidates import Prefix, run_reading, takes_trees, windows_of_layers
from generation_ext.shared_prefix.encoded_text import ForwardRecorder, LastStates
from peft_ext.language_model import LanguageModel


@dataclass
class Draft:
    """A text, tokens that were drafted after it, and what `generate`'s pass over them gave; of a single row.

    Attributes:
        tokens: Of the text and the drafted ones, `[1, length]`.
        text: How many of them are the text's.
        states: What is read of the text, and of the text with the first, the first two ... drafted tokens, `[drafted + 1, ...]`.
        logits: `[1, drafted + 1, vocabulary]`.
        prefix: The text with all drafted tokens, as it lies in `generate`'s cache until it is cropped; None: candidates
            can't be tried behind parts of it in one pass.
        positions: Those of a candidate behind each, `[..., 1, drafted + 1]`; None: they are counted.
    """

    tokens: torch.Tensor
    text: int
    states: LastStates
    logits: torch.Tensor
    prefix: Optional[Prefix]
    positions: Optional[torch.Tensor]

    @property
    def drafted(self) -> int:
        """How many tokens were drafted."""
        return self.tokens.shape[1] - self.text

    def at(self, places: list[int]) -> LastStates:
        """What is read of some of the texts, by how many drafted tokens they have."""
        rows = torch.tensor(places)
        assert self.states.hidden is not None
        return LastStates(self.states.hidden[rows], self.states.running.rows(rows))

    def place(self, input_ids: torch.Tensor) -> Optional[int]:
        """How many of the drafted tokens a text ends with; None if it isn't this text with some of them."""
        place = input_ids.shape[1] - self.text
        if len(input_ids) != 1 or not 0 <= place <= self.drafted:
            return None
        return place if torch.equal(input_ids, self.tokens[:, : input_ids.shape[1]].to(input_ids.device)) else None

    def branch(self, model: LanguageModel, places: list[int], candidates: torch.Tensor) -> Optional[LastStates]:
        """What is read of candidates behind some of the texts, `[places, k, ...]`, from one forward pass.

        Args:
            model: What has encoded the draft.
            places: How many drafted tokens come before each row of candidates.
            candidates: `[places, k]`.

        Returns:
            None if the cache has changed since, or doesn't hold what they look back on.
        """
        prefix = self.prefix
        if prefix is None or prefix.cache.get_seq_length() != prefix.length:
            return None
        count = candidates.shape[1]
        # how many tokens of the cache each candidate sees
        seen = torch.tensor([prefix.length - self.drafted + place for place in places])
        windows = windows_of_layers(model, prefix.cache)
        starts = {window: 0 if window is None else max(0, int(seen.min()) - window + 1) for window in set(windows)}
        layers = []
        for layer, window in zip(prefix.cache.layers, windows):
            skipped = prefix.length - layer.keys.shape[-2]  # a layer with a window has dropped some
            if skipped > starts[window] or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                return None
            start = starts[window] - skipped
            layers.append(PrefixLayer(layer.keys[:, :, start:], layer.values[:, :, start:], prefix.length))
        device = prefix.hidden.device
        real = torch.ones(1, prefix.length, dtype=torch.bool) if prefix.mask is None else prefix.mask.cpu()
        apart = torch.eye(len(places) * count, dtype=torch.bool)[None].to(device)

        def visible(window: Optional[int]) -> tuple[torch.Tensor, torch.Tensor]:
            start = starts.get(window, 0)
            slots = torch.arange(start, prefix.length)
            shown = (slots < seen[:, None]) & real[:, start:]
            if window is not None:
                shown &= slots > seen[:, None] - window
            return shown.repeat_interleave(count, dim=0)[None].to(device), apart

        at = seen[None] if self.positions is None else self.positions[..., places]
        running = self.at(places).running
        hidden, each = run_reading(
            model,
            candidates.reshape(1, -1).to(device),
            Cache(layers=layers),
            running.layers,
            ends=True,
            attention_mask=masks(model, visible, prefix.hidden.dtype),
            position_ids=at.repeat_interleave(count, dim=-1).to(device),
            **prefix.cross,
        )
        shape = (len(places), count)
        states = {index: state[0].unflatten(0, shape) for index, state in each.items()}
        return LastStates(None if hidden is None else hidden[0].unflatten(0, shape), running.branched(states))


def draft_of(recorder: ForwardRecorder, input_ids: torch.Tensor) -> Optional[Draft]:
    """The last forward pass, if it read tokens that were drafted after this text `[1, tokens]`."""
    recorded, logits = recorder.recorded, recorder.logits
    if recorded is None or logits is None or recorded.states is None or len(input_ids) != 1:
        return None
    fed = recorded.input_ids
    drafted = recorder.drafted(input_ids)
    if fed is None or drafted is None or not 0 < drafted < min(recorded.tokens, logits.shape[1]):
        return None
    own = recorded.tokens - drafted
    if own > input_ids.shape[1] or not torch.equal(fed[:, :own].to(input_ids), input_ids[:, -own:]):
        return None
    cache = recorded.cache()
    prefix = None if cache is None else recorder.whole(recorded, cache)
    if prefix is not None and not takes_trees(recorder.model, prefix):
        prefix = None
    tokens = torch.cat([input_ids, fed[:, own:].to(input_ids)], dim=1)
    running = recorder.running(recorded, [tokens[:, : input_ids.shape[1] + place] for place in range(drafted + 1)])
    if running is None:
        return None
    return Draft(
        tokens=tokens,
        text=input_ids.shape[1],
        states=LastStates(recorded.states[0, own - 1 :], running),
        logits=logits[:, -drafted - 1 :],
        prefix=prefix,
        positions=None if recorded.positions is None else recorded.positions[..., own - 1 :] + 1,
    )
