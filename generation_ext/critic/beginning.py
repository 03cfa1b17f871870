# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a critic's training takes from its first roll-outs: the layer that is read, by what states are standardised, where the
head begins, and the penalty in the loss."""

from __future__ import annotations

import warnings
from typing import Any, Optional

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn

from generation_ext.critic.advantages import discounted_outcomes
from generation_ext.critic.batches import has_lora, outcomes_of, seed_of, states_mask
from generation_ext.critic.ridge import Explained, best_of, candidate_layers, explained_by, fit_head, slope_of
from generation_ext.critic.rollouts import Rollout, fill_hidden, without_hidden
from generation_ext.critic.run_files import RunFiles
from generation_ext.critic.training_config import CriticConfig
from generation_ext.critic.value import Critic


_LAYER = -3  # in the place of an iteration's number, for seeds


class Beginning:
    """A training's beginning.

    Args:
        critic: Is changed: its layer, mean and deviation, and its head.
        language_model: The frozen one.
        args: The training's.
        files: Where the penalty is kept.

    Attributes:
        l2: The penalty in the loss; 0 until it is known.
        layers_explained: Share of the outcome's variance that each layer explains, where one was chosen among several.
        unlogged: The same, until it is logged.
    """

    def __init__(self, critic: Critic, language_model: nn.Module, args: CriticConfig, files: RunFiles) -> None:
        self.critic, self.language_model, self.args, self._files = critic, language_model, args, files
        self.layers_explained: dict[int, float] = {}
        self.unlogged: dict[int, float] = {}
        self.forget()

    def forget(self) -> None:
        """Before another training."""
        self._penalty: Optional[float] = None
        self.l2 = self.args.l2 or 0.0

    def prepare(self, rollouts: list[Rollout]) -> None:
        """Choose the layer, standardise hidden states and start at the mean outcome, by the first roll-outs; unless the critic
        has been trained before."""
        critic = self.critic
        if self.is_over:
            return
        mask = states_mask(rollouts)
        outcomes = discounted_outcomes(outcomes_of(rollouts), mask, self.args.gamma)
        explained = self._explain(rollouts, outcomes)
        self.fill_hidden(rollouts)
        critic.fit_standardisation(torch.cat([rollout.hidden for rollout in rollouts if rollout.hidden is not None]))
        if has_lora(critic):
            for rollout in rollouts:
                rollout.hidden = None
        start = float(outcomes[mask].mean())
        critic.start_at(start)
        if explained is not None and critic.config.head == "linear" and self.args.closed_form:
            self._penalty = explained.penalty_of(len(rollouts))
            if self.args.l2 is None:
                self.l2 = self._penalty_in_loss(explained, start)
                self._files.keep_l2(self.l2)
        with torch.no_grad():
            for fitted in (critic.mean, critic.std, critic.head.bias):
                fitted.copy_(broadcast(fitted.detach()))

    def fill_hidden(self, rollouts: list[Rollout]) -> None:
        """The states that are read, where roll-outs lack them."""
        missing = without_hidden(rollouts, self.critic.reading(self.language_model))
        fill_hidden(self.language_model, missing, self.args.rollout_batch_size, self.critic)

    @property
    def is_over(self) -> bool:
        """Whether the critic has been trained before, or this is done."""
        return bool((self.critic.mean != 0).any()) or bool((self.critic.std != 1).any())

    @property
    def layer_is_open(self) -> bool:
        """Whether roll-outs come before it is known which of their states are read."""
        return self.critic.config.choose_layer and not self.is_over

    def _explain(self, rollouts: list[Rollout], outcomes: torch.Tensor) -> Optional[Explained]:
        """What a linear map of the critic's layer knows; the layer is chosen, if it still is to be. All processes take the first
        one's."""
        args: CriticConfig = self.args
        config, reading = self.critic.config, self.critic.reading(self.language_model)
        choices = [reading.layers]
        if self.layer_is_open:
            choices = [(index,) for index in candidate_layers(self.language_model, reading)]
        elif has_lora(self.critic) or config.head != "linear" or not args.closed_form:
            return None
        seed = seed_of(args.seed, _LAYER)
        found: list[Any] = [explained_by(self.language_model, self.critic, choices, rollouts, outcomes, seed)]
        broadcast_object_list(found)
        if not found[0]:
            if self.layer_is_open:
                warnings.warn(
                    f"layer='auto': {len(rollouts)} roll-outs, or outcomes that are all the same, don't tell layers apart; the "
                    f"critic reads layer {reading.layers[0]}.",
                    stacklevel=2,
                )
            return None
        if not self.layer_is_open:
            return found[0][0]
        by_layer = {layers[0]: each for layers, each in zip(choices, found[0])}
        best = best_of(by_layer)
        config.layers = None if best == reading.last else [best]
        self.layers_explained = self.unlogged = {index: each.share for index, each in by_layer.items()}
        return by_layer[best]

    def _penalty_in_loss(self, explained: Explained, mean: float) -> float:
        args: CriticConfig = self.args
        return explained.penalty_of(args.rollouts_per_iteration) * slope_of(args.value_loss, mean)

    def go_on(self, rollouts: list[Rollout]) -> None:
        """Find the loss's penalty for a run that goes on in the middle of an iteration: the one on disk; where nothing is kept,
        the one that this iteration's roll-outs choose."""
        args: CriticConfig = self.args
        if args.l2 is not None:
            return
        kept = self._files.kept_l2()
        if kept is not None or args.save_rollouts or not args.closed_form:
            self.l2 = kept or 0.0
            return
        mask = states_mask(rollouts)
        outcomes = discounted_outcomes(outcomes_of(rollouts), mask, args.gamma)
        explained = self._explain(rollouts, outcomes)
        self.l2 = 0.0 if explained is None else self._penalty_in_loss(explained, float(outcomes[mask].mean()))

    def fit_head(self, rollouts: list[Rollout], targets: torch.Tensor) -> None:
        """Begin where ridge regression on the first roll-outs ends; all processes take the first one's."""
        if self._penalty is None:
            return
        states = [rollout.hidden for rollout in rollouts if rollout.hidden is not None]
        rows = [row[: rollout.states] for row, rollout in zip(targets, rollouts)]
        fit_head(self.critic, states, rows, self._penalty)
        self._penalty = None
        with torch.no_grad():
            for fitted in (self.critic.head.weight, self.critic.head.bias):
                fitted.copy_(broadcast(fitted.detach()))
