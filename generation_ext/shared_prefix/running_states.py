# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""States of the text so far beside the mean over all of its tokens, which goes along with it: one step further for a token,
in another order for beams, in as many ways as there are candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Optional

import torch


@dataclass(frozen=True)
class Wanted:
    """What is read of a text.

    Attributes:
        states: Indices of the hidden states that are read: n those after layer n.
        means: Those of which the mean over the text is kept, too.
    """

    states: frozenset[int] = frozenset()
    means: frozenset[int] = frozenset()

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(self.states | other.states, self.means | other.means)

    @property
    def layers(self) -> list[int]:
        """All of them, in the model's order."""
        return sorted(self.states | self.means)


NOTHING = Wanted()


@dataclass
class RunningStates:
    """Of each text its last token's states, and sums over its tokens.

    Attributes:
        states: Index -> `[..., hidden]`, of the last token.
        sums: Index -> `[..., hidden]` float32, over the text's tokens, prompt and continuation alike, padding left out.
        counts: How many tokens that are, `[...]` float32.
    """

    states: dict[int, torch.Tensor] = field(default_factory=dict)
    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    counts: Optional[torch.Tensor] = None

    @property
    def layers(self) -> list[int]:
        """The indices of all states that are read, in the model's order."""
        return sorted({*self.states, *self.sums})

    def mean(self, index: int) -> torch.Tensor:
        """The mean of the states of one index over the text, float32 `[..., hidden]`."""
        assert self.counts is not None
        total = self.sums[index]
        return total / self.counts.to(total.device).clamp(min=1)[..., None]

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> RunningStates:
        """The same after a change of all tensors' leading dimensions."""
        return RunningStates(
            {index: change(state) for index, state in self.states.items()},
            {index: change(total) for index, total in self.sums.items()},
            None if self.counts is None else change(self.counts),
        )

    @classmethod
    def stacked(cls, each: Sequence[RunningStates]) -> RunningStates:
        """Those of several batches as one."""
        counts = [one.counts for one in each if one.counts is not None]
        return cls(
            {index: torch.cat([one.states[index] for one in each]) for index in each[0].states},
            {index: torch.cat([one.sums[index] for one in each]) for index in each[0].sums},
            torch.cat(counts) if counts else None,
        )

    def rows(self, rows: torch.Tensor) -> RunningStates:
        """Those of some rows, or the same in another order."""
        return self.each(lambda tensor: tensor[rows.to(tensor.device)])

    def branched(self, states: dict[int, torch.Tensor]) -> RunningStates:
        """Those of each text `[batch]` with one more token, in several ways: of states `[batch, k, hidden]`."""
        sums = {index: total[:, None] + states[index].to(total) for index, total in self.sums.items()}
        counts = None
        if self.counts is not None and sums:
            counts = (self.counts[:, None] + 1).expand(next(iter(sums.values())).shape[:2])
        return RunningStates({index: states[index] for index in self.states}, sums, counts)

    def chosen(self, choice: torch.Tensor) -> RunningStates:
        """One of the ways of each text, `[batch]`."""

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            own = choice.to(tensor.device)
            return tensor[torch.arange(len(own), device=own.device), own]

        return self.each(pick)

    def after(
        self, states: dict[int, torch.Tensor], wanted: Wanted, real: Optional[torch.Tensor] = None
    ) -> RunningStates:
        """Those of each text `[batch]` with more tokens.

        Args:
            states: Index -> `[batch, tokens, hidden]` of the tokens, at least one.
            wanted: What is to be kept of them.
            real: False where a token is padding, `[batch, tokens]`; None: nowhere.
        """
        sums, counts = {}, self.counts
        for index in wanted.means:
            new = states[index].float()
            total = new.sum(dim=1) if real is None else (new * real.to(new)[..., None]).sum(dim=1)
            sums[index] = total + self.sums[index] if index in self.sums else total
        if sums:
            some = next(iter(sums.values()))
            more = real.to(some).sum(dim=1) if real is not None else some.new_full(some.shape[:1], new.shape[1])
            counts = more if counts is None else counts.to(more.device) + more
        return RunningStates({index: states[index][:, -1] for index in wanted.states}, sums, counts)

    def clone(self) -> RunningStates:
        """A copy, which doesn't keep larger tensors alive."""
        return self.each(torch.Tensor.clone)


def running_means(states: torch.Tensor, real: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The mean over the text up to each token, float32 `[batch, tokens, hidden]` as the states."""
    weights = (
        states.new_ones(states.shape[:2], dtype=torch.float32) if real is None else real.to(states.device).float()
    )
    return (states.float() * weights[..., None]).cumsum(dim=1) / weights.cumsum(dim=1).clamp(min=1)[..., None]


# Of more tokens of one pass, only the last ones' states are kept apart: drafts that are thrown away again are fewer.
_APART = 64


@dataclass
class FedStates:
    """What one forward pass added to texts; the mean can be taken after any of its last tokens.

    Attributes:
        wanted: What is kept.
        base: Of the text before the tokens that are kept apart.
        first: How many tokens that is, as the cache counts them.
        states: Index -> `[batch, tokens, hidden]` of those kept apart.
        real: False where one of them is padding.
        rows: The texts `[batch, n]` of the rows of `base`; None: the rows are the same as those of `states`.
        prompts: Which rows have the same prompt; None: rows with the same text have the same.
        began: Where the first pass that was seen began, as the cache counts; a text has to begin there, or with the cache.
        text: The texts as they were last asked for, and how many tokens these are, as the cache counts them.
    """

    wanted: Wanted
    base: RunningStates
    first: int
    states: dict[int, torch.Tensor]
    real: Optional[torch.Tensor]
    rows: Optional[torch.Tensor] = None
    prompts: Optional[torch.Tensor] = None
    began: int = 0
    text: Optional[tuple[torch.Tensor, int]] = None

    @classmethod
    def of(
        cls,
        wanted: Wanted,
        states: dict[int, torch.Tensor],
        real: Optional[torch.Tensor],
        length: int,
        before: Optional[FedStates],
        prompts: Callable[[], Optional[torch.Tensor]],
    ) -> FedStates:
        """Of a pass.

        Args:
            wanted: What is to be kept.
            states: Index -> `[batch, tokens, hidden]` of all tokens of the pass.
            real: False where one of them is padding, `[batch, tokens]`; None: nowhere.
            length: The cache's tokens after it.
            before: The pass before on the same cache, if there was one.
            prompts: Gives `prompts` for a pass that begins texts.
        """
        tokens = next(iter(states.values())).shape[1]
        start = length - tokens
        fed = cls(wanted, RunningStates(), start, states, real)
        if before is not None and before.first <= start <= before.length and start:
            fed.base, fed.rows, fed.prompts = before._at(start), before._text_until(start), before.prompts
            fed.began = before.began
        else:
            fed.began, fed.prompts = start, prompts()
        return fed._shortened(tokens)

    @property
    def length(self) -> int:
        """Tokens after the pass, as the cache counts them."""
        return self.first + next(iter(self.states.values())).shape[1]

    def at_end_of(self, text: torch.Tensor, length: int) -> Optional[RunningStates]:
        """The running states after texts.

        Args:
            text: `[batch, n]`.
            length: Their tokens, as the cache counts them.

        Returns:
            None if the pass doesn't tell: the cache had a part of the text that wasn't seen.
        """
        if not self.first < length <= self.length:
            return None
        if self.began and length - text.shape[1] != self.began:
            return None
        if self.rows is not None:
            now = text[:, : self.rows.shape[1]]
            rows = same_rows(self.rows, now, lambda: self.prompts)
            if rows is None:
                return None
            if not _in_order(rows, len(self.rows)):
                self.base = self.base.rows(rows)
            self.rows = now
        if self.base.counts is not None and len(self.base.counts) != len(text):
            return None
        self.text = (text, length)
        return self._at(length)

    def moved(self, running: RunningStates, length: int, text: torch.Tensor) -> FedStates:
        """The same after more tokens that no recorded pass was fed, see [`ForwardRecorder.went_on`]."""
        empty = {index: state[:, :0] for index, state in self.states.items()}
        sums = RunningStates({}, running.sums, running.counts)
        return FedStates(self.wanted, sums, length, empty, None, rows=text, prompts=self.prompts, text=(text, length))

    def _at(self, length: int) -> RunningStates:
        count = length - self.first
        if count == 0:
            return self.base
        real = None if self.real is None else self.real[:, :count]
        return self.base.after({index: state[:, :count] for index, state in self.states.items()}, self.wanted, real)

    def _text_until(self, length: int) -> Optional[torch.Tensor]:
        if self.text is None or self.text[1] < length:
            return None
        text, end = self.text
        return text[:, : text.shape[1] - (end - length)]

    def _shortened(self, tokens: int) -> FedStates:
        """Without the states of tokens long gone, which are in the sums."""
        early = max(tokens - _APART, 0)
        if not early:
            return self
        kept = {index: state[:, early:].clone() for index, state in self.states.items()}
        real = None if self.real is None else self.real[:, early:]
        return replace(self, base=self._at(self.first + early), first=self.first + early, states=kept, real=real)


def same_rows(
    known: torch.Tensor, texts: torch.Tensor, prompts: Callable[[], Optional[torch.Tensor]]
) -> Optional[torch.Tensor]:
    """Which of the known texts `[m, n]` each text `[batch, n]` is, `[batch]`; None if some is none.

    Args:
        known, texts: Tokens.
        prompts: Gives numbers of the known texts' prompts `[m]`, which the texts have in the same order; a text is only one that
            has the same prompt.
    """
    known = known.to(texts.device)
    if known.shape == texts.shape and torch.equal(known, texts):
        return torch.arange(len(texts), device=texts.device)
    if known.shape[1] != texts.shape[1]:
        return None
    same = (known[None] == texts[:, None]).all(dim=-1)
    numbers = prompts()
    if numbers is not None:
        if len(known) != len(texts):
            return None
        numbers = numbers.to(same.device)
        same &= numbers[None] == numbers[:, None]
    diagonal = torch.eye(*same.shape, dtype=torch.bool, device=same.device)
    own = same & diagonal  # a row's own text before others that are the same
    same = torch.where(own.any(dim=1, keepdim=True), own, same)
    return same.int().argmax(dim=1) if same.any(dim=1).all() else None


def numbered(tensors: Iterable[Optional[torch.Tensor]]) -> Optional[torch.Tensor]:
    """Rows that are the same in all tensors have the same number, `[batch]`; None without tensors."""
    numbers = [
        torch.unique(tensor.reshape(len(tensor), -1), dim=0, return_inverse=True)[1].cpu()
        for tensor in tensors
        if tensor is not None
    ]
    return torch.unique(torch.stack(numbers, dim=1), dim=0, return_inverse=True)[1] if numbers else None


def _in_order(rows: torch.Tensor, count: int) -> bool:
    return len(rows) == count and torch.equal(rows, torch.arange(count, device=rows.device))
