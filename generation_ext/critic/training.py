# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Trains a critic on roll-outs of its frozen language model, with transformers' Trainer."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.utils import logging

from generation_ext.critic.action_values import Tried, action_value_loss, stacked, try_candidates
from generation_ext.critic.advantages import discounted_outcomes, generalized_advantages, terminal_rewards
from generation_ext.critic.batches import (
    EpochOrder,
    RolloutData,
    Values,
    has_lora,
    outcomes_of,
    padded_actions,
    padded_hidden,
    seed_of,
    states_mask,
    values_of,
)
from generation_ext.critic.beginning import Beginning
from generation_ext.critic.diagnostics import by_position, summary
from generation_ext.critic.losses import value_loss
from generation_ext.critic.model_config import CriticModelConfig
from generation_ext.critic.processor import CriticLogitsProcessor
from generation_ext.critic.reading import AUTO
from generation_ext.critic.rewards import RewardFunc, check_callable
from generation_ext.critic.rollouts import (
    Rollout,
    RolloutSampler,
    encode,
    prompt_rows,
    schedule,
)
from generation_ext.critic.run_files import RunFiles
from generation_ext.critic.training_config import CriticConfig
from generation_ext.critic.value import Critic
from peft_ext import trainer_checkpoints
from peft_ext.language_model import adapters_fingerprint


__all__ = ["CriticConfig", "CriticTrainer"]

_SAMPLING = ("max_new_tokens", "max_prompt_length", "temperature", "top_k", "top_p")
_EVALUATION, _TRIED = -1, -2  # in the place of an iteration's number, for seeds


class CriticTrainer(Trainer):
    """transformers' Trainer for a critic: `train()`, `evaluate()`, `save_model()`, `resume_from_checkpoint`, callbacks.

    A linear head begins as the ridge regression of the first roll-outs' outcomes on what the critic reads, with the penalty that
    does best on held-out prompts, and that penalty stays in the loss (`closed_form`, `l2`).

    A critic with `layer="auto"` gets its layer from the first roll-outs: one that explains most of the outcome of held-out
    ones, by linear maps (`layers_explained` has all of them, and the log `explained_variance_layer_12` and the like).

    Before each iteration it samples roll-outs from the language model and keeps the hidden states that `generate`
    computes; then the critic is fitted on those, without the language model (a critic with a LoRA reads the texts
    again, with gradients). Roll-outs are written to `<output_dir>/rollouts` as they come.

    The log has, at the start of each iteration, how well the critic knows the *new* roll-outs, before it is fitted on
    them: `explained_variance`, `calibration_error`, both also at single positions (`explained_variance_at_4`), and
    `reward_mean`.

    Args:
        model: The critic, as `Critic.for_model(language_model)` makes it.
        args: See [`CriticConfig`].
        language_model: The frozen language model; it isn't changed (it is moved to the training device).
        reward_func: From texts to numbers in [0, 1], in TRL's shape, see `generation_ext.critic.rewards`.
        train_dataset: Prompts: texts, or mappings with a `prompt`, perhaps a `control_code`, and columns for the reward
            function. Or roll-outs, as `read_rollouts(folder)` gives them, to train on those again: iteration i takes the
            i-th part of them, and begins at the start when they are used up.
        eval_dataset: Prompts or roll-outs to evaluate on, by `evaluate()` or an `eval_strategy`.
        processing_class: The language model's tokenizer; not needed with roll-outs.
        callbacks, optimizers: As Trainer's.

    Raises:
        ValueError, TypeError: If arguments don't fit to each other, or the critic isn't this language model's.
    """

    def __init__(
        self,
        model: Critic,
        args: CriticConfig,
        language_model: nn.Module,
        reward_func: Optional[RewardFunc] = None,
        train_dataset: Optional[Iterable[Any]] = None,
        eval_dataset: Optional[Iterable[Any]] = None,
        processing_class: Optional[PreTrainedTokenizerBase] = None,
        callbacks: Optional[list[TrainerCallback]] = None,
        optimizers: tuple[Optional[torch.optim.Optimizer], Optional[Any]] = (None, None),
    ) -> None:
        if not isinstance(model, Critic):
            raise TypeError(f"model is a {type(model).__name__}; pass Critic.for_model(language_model).")
        model.check_model(language_model)
        self._critic = model
        self._train_source = _source(train_dataset, "train_dataset")
        self._eval_source = _source(eval_dataset, "eval_dataset") if eval_dataset is not None else None
        if _are_prompts(self._train_source) or _are_prompts(self._eval_source):
            if processing_class is None:
                raise ValueError("processing_class is missing: pass the language model's tokenizer.")
            check_callable(reward_func)
        if args.action_value_candidates and has_lora(model):
            raise ValueError(
                f"action_value_candidates={args.action_value_candidates}: a critic with a LoRA reads states of its own, "
                "which change as it learns; leave it at 0, or make the critic with lora_rank=0."
            )
        self.language_model = language_model
        self._sampler = _sampler(args, language_model, processing_class, reward_func, model)
        self._data = RolloutData(1)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=self._data,
            eval_dataset=self._eval_source,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._data.length = math.ceil(args.rollouts_per_iteration / args.world_size)
        if args.place_model_on_device is not False and getattr(language_model, "hf_device_map", None) is None:
            language_model.to(args.device)
        model.attach(language_model)
        self._order = EpochOrder(self._data, args.data_seed if args.data_seed is not None else args.seed)
        self._files = RunFiles(Path(str(args.output_dir)), args.process_index, args.save_rollouts)
        self._iteration: Optional[int] = None
        self._resuming = False
        self._evaluated: Optional[list[Rollout]] = None
        self._beginning = Beginning(model, language_model, args, self._files)
        self._sums: dict[str, list[float]] = {}
        self.add_callback(_BeginsEpoch(self))

    control: Any  # mypy doesn't read Trainer

    # ---- what Trainer calls

    def train(self, resume_from_checkpoint: Optional[Union[str, bool]] = None, **kwargs: Any) -> Any:
        """Train; see Trainer.

        Args:
            resume_from_checkpoint: A checkpoint's folder; or True: go on from the last one in `output_dir`, or, if
                the run was stopped before the first one, with the roll-outs that it had collected. The critic
                becomes the one that the run would have given without the stop (up to rounding, since the hidden states of
                saved roll-outs are computed in other batches).
            **kwargs: As Trainer's.

        Raises:
            ValueError: If the run that is there had other settings.
        """
        self._resuming = resume_from_checkpoint not in (None, False)
        self._iteration = None
        self._beginning.forget()
        with trainer_checkpoints.going_on(self, resume_from_checkpoint) as checkpoint:
            if self._resuming:
                self._files.check(self._settings())
                if checkpoint is not None:
                    self._take_layers(checkpoint)
                if checkpoint is None and not self._files.started:
                    raise ValueError(
                        f"resume_from_checkpoint={resume_from_checkpoint!r}: {str(self.args.output_dir)!r} has neither a "
                        "complete checkpoint nor roll-outs; leave it out to start a run."
                    )
            else:
                with self.args.main_process_first(desc="clearing old roll-outs"):
                    if self.is_world_process_zero():
                        self._files.start(self._settings())
            try:
                return super().train(resume_from_checkpoint=checkpoint, **kwargs)
            finally:
                self._data.items = []
                self._resuming = False

    def _take_layers(self, checkpoint: Any) -> None:
        """The layers that a run has chosen before it was stopped."""
        own, stored = self._critic.config, CriticModelConfig.from_pretrained(checkpoint)
        if (stored.state_size or stored.hidden_size) != self._critic.state_size:
            raise ValueError(
                f"the run in {str(self.args.output_dir)!r} has a critic that reads states of size "
                f"{stored.state_size or stored.hidden_size}, not {self._critic.state_size}: make it with "
                f"layer={stored.layers or -1}, running_mean={stored.running_mean}."
            )
        own.layers = stored.layers

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process's own roll-outs; accelerate has nothing to distribute."""
        return DataLoader(
            self._data,
            batch_size=self._train_batch_size,
            sampler=self._order,
            collate_fn=self._collate,
            drop_last=self.args.dataloader_drop_last,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Optional[torch.Tensor] = None,
    ) -> Any:
        """The value's loss, and the action-value head's if there is one."""
        args: CriticConfig = self.args
        hidden = inputs.get("hidden")
        if hidden is None:
            with torch.set_grad_enabled(model.training):
                hidden = encode(self.language_model, inputs["rollouts"], self._critic)
        logits = model(hidden)
        mask = inputs["mask"]
        loss = value_loss(logits, inputs["targets"], mask, args.value_loss, inputs["old_values"], args.cliprange_value)
        if self._critic.config.action_values:
            values = torch.sigmoid(logits.detach())
            action_loss = action_value_loss(self._critic, hidden.detach(), values, inputs, args.value_loss)
            self._sums.setdefault("action_value_loss", []).append(float(action_loss.detach()))
            loss = loss + args.action_value_coef * action_loss
        if self._beginning.l2:
            loss = loss + self._beginning.l2 * self._critic.head.weight.square().sum()
        return (loss, {"logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: Optional[float] = None) -> None:
        """Log, with the means of what was gathered since the last loss."""
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._sums.items()}}
            self._sums = {}
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Optional[Iterable[Any]] = None,
        ignore_keys: Optional[list[str]] = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss, explained variance and calibration on held-out roll-outs.

        They are sampled once, from the same seed, since the language model is frozen.

        Args:
            eval_dataset: Prompts or roll-outs; None: those that the trainer was made with.
            ignore_keys: For Trainer's signature; there is nothing to ignore.
            metric_key_prefix: Comes before the names of the figures.
        """
        values, mask, rewards = self._values(self._held_out(eval_dataset))
        outcomes = discounted_outcomes(rewards, mask, self.args.gamma)
        loss = (values - outcomes).square()[mask].mean()
        figures = {"loss": float(loss), **summary(values, outcomes, mask)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: Optional[str] = None, state_dict: Optional[dict[str, Any]] = None) -> None:
        """The critic's safetensors and JSON. Trainer adds a pickle of its arguments, which nothing reads."""
        if self.args.should_save:
            self._critic.save_pretrained(output_dir or str(self.args.output_dir), state_dict=state_dict)

    # ---- further

    @property
    def layers_explained(self) -> dict[int, float]:
        """Share of the outcome's variance that each layer explains, where the critic's was chosen."""
        return self._beginning.layers_explained

    def evaluate_positions(self, eval_dataset: Optional[Iterable[Any]] = None) -> list[dict[str, Any]]:
        """Explained variance and calibration of each position, see `diagnostics.by_position`; roll-outs as in
        `evaluate`."""
        values, mask, rewards = self._values(self._held_out(eval_dataset))
        return by_position(values, discounted_outcomes(rewards, mask, self.args.gamma), mask)

    def _begin_epoch(self, step: int) -> None:
        """Set the order of the epoch that begins after `step` steps, and begin its iteration if it is the first."""
        steps_per_epoch = math.ceil(self._batches_per_epoch() / self.args.gradient_accumulation_steps)
        epoch = step // steps_per_epoch
        self._order.epoch = epoch
        iteration = epoch // self.args.epochs_per_iteration
        if iteration != self._iteration:
            begins = step == iteration * self.args.epochs_per_iteration * steps_per_epoch
            self._begin_iteration(iteration, begins)
            self._iteration = iteration

    def _batches_per_epoch(self) -> int:
        batches = len(self._data) / self._train_batch_size
        return max(1, math.floor(batches) if self.args.dataloader_drop_last else math.ceil(batches))

    def _begin_iteration(self, iteration: int, begins: bool) -> None:
        """Collect an iteration's roll-outs and what they are regressed on; `begins` is False in the middle of a resumed
        one."""
        start = time.perf_counter()
        rollouts = self._rollouts(iteration)
        seconds = time.perf_counter() - start
        if begins:
            self._beginning.prepare(rollouts)
            estimates = self._values(rollouts)
            self._files.keep_values(iteration, estimates.values)
        else:
            if not has_lora(self._critic):
                self._beginning.fill_hidden(rollouts)
            estimates = self._kept_values(iteration, rollouts)
            self._beginning.go_on(rollouts)
        rewards = terminal_rewards(estimates.outcomes, estimates.mask)
        advantages = generalized_advantages(rewards, estimates.values, estimates.mask, self.args.gamma, self.args.lam)
        targets = advantages + estimates.values
        self._data.items = [
            {
                "rollout": rollout,
                "targets": targets[row, : rollout.states],
                "values": estimates.values[row, : rollout.states],
            }
            for row, rollout in enumerate(rollouts)
        ]
        for item, tried in zip(self._data.items, self._tried(rollouts, iteration)):
            item["tried"] = tried
        if begins:
            self._beginning.fit_head(rollouts, targets)
            self._log_iteration(estimates, seconds)

    def _rollouts(self, iteration: int) -> list[Rollout]:
        """This process's roll-outs of an iteration, those with a reward."""
        if _are_prompts(self._train_source):
            rollouts = self._collect(iteration)
        else:
            count, process = len(self._data), self.args.process_index
            first = (iteration * self.args.world_size + process) * count
            rollouts = [self._train_source[index % len(self._train_source)] for index in range(first, first + count)]
        scored = [rollout for rollout in rollouts if rollout.reward is not None]
        if not scored:
            raise ValueError(
                f"none of the {len(rollouts)} roll-outs of iteration {iteration} has a reward; the reward function "
                "returned None for all of them."
            )
        return scored

    def _collect(self, iteration: int) -> list[Rollout]:
        """Sample roll-outs, or as many as are not in the file yet. Each batch has a seed of its own, so that a run
        that goes on gives the texts that it would have given anyway."""
        args: CriticConfig = self.args
        codes = self._critic.config.control_codes
        seed = seed_of(args.seed, iteration, args.process_index)
        rows = schedule(self._train_source, codes, len(self._data), seed)
        size = args.rollout_batch_size
        rollouts = self._files.rollouts(iteration, len(rows), size) if self._resuming else []
        if len(rollouts) == len(rows):
            return rollouts
        write = self._files.writer(iteration, keep=len(rollouts))
        for batch in self._sampled(rows, seed, len(rollouts), f"roll-outs {iteration + 1}", steered=iteration > 0):
            write(batch)
            rollouts += batch
        return rollouts

    def _sampled(
        self, rows: list[dict[str, Any]], seed: int, done: int, title: str, steered: bool = False
    ) -> Iterator[list[Rollout]]:
        """Batches of roll-outs; `steered`: every second one under the critic, if the settings say so."""
        size, strength = self.args.rollout_batch_size, self.args.steered_strength
        bar = logging.tqdm(
            total=len(rows),
            initial=done,
            desc=title,
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        )
        for start in range(done, len(rows), size):
            batch = rows[start : start + size]
            # before a layer is chosen, states of another would be kept
            with_hidden = not has_lora(self._critic) and not self._beginning.layer_is_open
            if steered and strength and start // size % 2:
                yield self._steered(batch, seed_of(seed, start))
            else:
                yield self._sampler.sample(batch, seed_of(seed, start), with_hidden)
            bar.update(len(batch))
        bar.close()

    def _steered(self, rows: list[dict[str, Any]], seed: int) -> list[Rollout]:
        strength = self.args.steered_strength
        with CriticLogitsProcessor(
            self.language_model, self._critic, strength=strength, mask_others=True
        ) as processor:
            return self._sampler.sample(rows, seed, False, logits_processor=LogitsProcessorList([processor]))

    def _held_out(self, eval_dataset: Optional[Iterable[Any]]) -> list[Rollout]:
        source = self._eval_source if eval_dataset is None else _source(eval_dataset, "eval_dataset")
        if source is None:
            raise ValueError("eval_dataset is missing: pass prompts or roll-outs to evaluate on.")
        if eval_dataset is None and self._evaluated is not None:
            return self._evaluated
        rollouts = source
        if _are_prompts(source):
            if self._sampler is None or self._sampler.reward is None:
                raise ValueError(
                    "prompts can only be evaluated on with a tokenizer and a reward function; pass processing_class and "
                    "reward_func to the trainer, or roll-outs instead of prompts."
                )
            seed = seed_of(self.args.seed, _EVALUATION)
            rows = schedule(source, self._critic.config.control_codes, self.args.eval_rollouts, seed)
            rollouts = [rollout for batch in self._sampled(rows, seed, 0, "evaluation") for rollout in batch]
        rollouts = [rollout for rollout in rollouts if rollout.reward is not None]
        if not rollouts:
            raise ValueError("none of the roll-outs to evaluate on has a reward.")
        if eval_dataset is None:
            self._evaluated = rollouts
        return rollouts

    def _values(self, rollouts: list[Rollout]) -> Values:
        return values_of(self._critic, self.language_model, rollouts, self.args.rollout_batch_size)

    def _tried(self, rollouts: list[Rollout], iteration: int) -> list[Tried]:
        """Candidates at one state of each roll-out; none if the action-value head learns from sampled tokens alone."""
        args: CriticConfig = self.args
        if not (args.action_value_candidates and self._critic.config.action_values):
            return []
        count = min(args.action_value_candidates, self._critic.config.vocab_size or args.action_value_candidates)
        seed = seed_of(args.seed, _TRIED, iteration, args.process_index)
        return try_candidates(self.language_model, self._critic, rollouts, count, seed, args.rollout_batch_size)

    def _collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        rollouts = [item["rollout"] for item in items]
        mask = states_mask(rollouts)
        return {
            **({"rollouts": rollouts} if has_lora(self._critic) else {"hidden": padded_hidden(rollouts)}),
            "mask": mask,
            "targets": nn.utils.rnn.pad_sequence([item["targets"] for item in items], batch_first=True),
            "old_values": nn.utils.rnn.pad_sequence([item["values"] for item in items], batch_first=True),
            "actions": padded_actions(rollouts, mask.shape[1]),
            **({"tried": stacked([item["tried"] for item in items])} if "tried" in items[0] else {}),
        }

    def _log_iteration(self, estimates: Values, seconds: float) -> None:
        """Over all processes: their roll-outs have one width, whatever they ended after."""
        if self.args.world_size > 1:
            prompts = _are_prompts(self._train_source)
            estimates = self._gathered(estimates, self.args.max_new_tokens + 1 if prompts else estimates.mask.shape[1])
        values, mask, outcomes = estimates
        figures = summary(values, discounted_outcomes(outcomes, mask, self.args.gamma), mask)
        rewards = {"reward_mean": float(outcomes.mean()), "reward_std": float(outcomes.std(correction=0))}
        layers = {f"explained_variance_layer_{index}": each for index, each in self._beginning.unlogged.items()}
        self._beginning.unlogged = {}
        self.log({**rewards, **figures, **layers, "rollout_seconds": round(seconds, 2)})

    def _gathered(self, estimates: Values, width: int) -> Values:
        rows = len(self._data)
        values, mask = torch.zeros(rows, width), torch.zeros(rows, width, dtype=torch.bool)
        outcomes = torch.zeros(rows)
        own = tuple(slice(size) for size in estimates.mask.shape)
        values[own], mask[own], outcomes[own[0]] = estimates
        gathered = [self.accelerator.gather(part.to(self.args.device)).cpu() for part in (values, mask, outcomes)]
        there = gathered[1].any(dim=1)
        return Values(*(part[there] for part in gathered))

    # ---- what a resumed run needs

    def _settings(self) -> dict[str, Any]:
        """What roll-outs and their targets depend on."""
        args: CriticConfig = self.args
        names = (
            "seed", "rollouts_per_iteration", "epochs_per_iteration", "rollout_batch_size", *_SAMPLING, "gamma", "lam",
            "action_value_candidates", "closed_form", "l2", "steered_strength",
            "per_device_train_batch_size", "gradient_accumulation_steps",
        )  # fmt: skip
        config = self._critic.config
        source = repr([_content(entry) for entry in self._train_source])
        return {
            **{name: getattr(args, name) for name in names},
            "world_size": args.world_size,
            "model": config.base_model_fingerprint,
            "adapters": adapters_fingerprint(self.language_model),
            "control_codes": config.control_codes,
            "prompt_template": config.prompt_template,
            "layers": AUTO if config.choose_layer else config.layers,
            "running_mean": config.running_mean,
            "train_dataset": hashlib.sha256(source.encode()).hexdigest()[:16],
        }

    def _kept_values(self, iteration: int, rollouts: list[Rollout]) -> Values:
        args: CriticConfig = self.args
        mask = states_mask(rollouts)
        values = self._files.kept_values(iteration, mask.shape)
        if values is None and (args.lam != 1.0 or args.cliprange_value is not None):
            raise ValueError(
                f"the values of iteration {iteration} are missing: with lam={args.lam} and cliprange_value="
                f"{args.cliprange_value} a run can only be resumed within an iteration if it had save_rollouts=True."
            )
        # without them, the targets don't depend on the values
        return Values(torch.zeros(mask.shape) if values is None else values, mask, outcomes_of(rollouts))


class _BeginsEpoch(TrainerCallback):
    def __init__(self, trainer: CriticTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_epoch(state.global_step)


def _source(dataset: Optional[Iterable[Any]], name: str) -> list[Any]:
    """Roll-outs as they are, or prompts as rows."""
    if dataset is None or isinstance(dataset, (str, Path)):
        raise ValueError(
            f"{name}={dataset!r}: pass a list of prompts, a data set, or roll-outs from read_rollouts(path)."
        )
    entries = list(dataset)
    if entries and all(isinstance(entry, Rollout) for entry in entries):
        return entries
    return prompt_rows(entries)


def _are_prompts(source: Optional[list[Any]]) -> bool:
    return source is not None and not isinstance(source[0], Rollout)


def _sampler(
    args: CriticConfig,
    language_model: nn.Module,
    tokenizer: Optional[PreTrainedTokenizerBase],
    reward_func: Optional[RewardFunc],
    critic: Critic,
) -> Any:
    if tokenizer is None:
        return None
    options: dict[str, Any] = {name: getattr(args, name) for name in _SAMPLING}
    return RolloutSampler(language_model, tokenizer, reward_func, critic, **options)


def _content(entry: Any) -> Any:
    if isinstance(entry, Rollout):
        return (entry.prompt_ids, entry.completion_ids, entry.reward)
    return sorted((name, str(value)) for name, value in entry.items())
