# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""SG-ICL: the model writes its own demonstrations, then classifies inputs behind them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Optional, Union

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from generation_ext.in_context.calibration import BY_BATCH, FEW_INPUTS, calibration_named
from generation_ext.in_context.overflow import DROP, Demonstration
from generation_ext.in_context.pools import Pool, PoolFile, draw
from generation_ext.in_context.presets import options_of
from generation_ext.in_context.request_prompts import request_prompts
from generation_ext.in_context.sampler import Decoding, Sampler
from generation_ext.in_context.scoring import LabelScorer, LabelScores, mean_of
from generation_ext.in_context.selection import consistent, surest
from generation_ext.prompts import Example, Task
from peft_ext.language_model import identity


# Generated texts that stand beside the inputs where these are too few for batch calibration; as many for all labels.
_STAND_INS = 32


class SelfGeneratedICL:
    """Self-generated in-context learning (Kim et al. 2022).

    For every input and class, texts are sampled from the model, which is shown the input and asked for another one of
    the class; of these, `shots` are drawn at random and stand before the input as demonstrations. Options that aren't
    given are those of `preset`.

    Under `"recommended"` texts are written for a few of the inputs only, all inputs stand behind the same
    demonstrations, which run once, and the labels' prior is their mean over all inputs: better and several times
    cheaper, but a prediction depends on the inputs beside it. Where it mustn't, pass `unlabelled` to [`score`].

    Args:
        model: A causal or encoder-decoder language model, or a `PeftModel` of one; packed models too. Not changed.
        tokenizer: Its tokenizer.
        task: Templates and labels; needs a `generation_template`.
        shots: Demonstrations of an input (the paper's k).
        samples: Texts that are generated for each input and class.
        conditioned: Whether the model is shown the input when it generates; False is the paper's ablation.
        preset: `"paper"` or `"recommended"`: what the eight options below are where they are None.
        balanced: Draw as many demonstrations of each class as possible instead of uniformly.
        self_consistent: Only draw demonstrations that the model itself, without demonstrations and with contextual
            calibration, labels as intended. Not in the paper. Fewer than `shots` may be left, or none.
        keep: Share of each class's texts that are drawn from: those of which the model itself, without demonstrations and
            compared with its mean over all texts, is surest that they are of the class. Not in the paper.
        chat: Classify by the tokenizer's chat template, see [`LabelScorer`]; demonstrations are written by plain prompts.
        calibrate: Calibrate the classification too, see [`LabelScorer.score`]. Not in the paper. With `"batch"` and
            `shared`, generated texts stand beside the inputs where these are fewer than 16.
        strength: Of the calibration, see [`LabelScorer.score`].
        shared: Draw from the texts for all inputs, the same demonstrations for all of them. Not in the paper.
        pool_inputs: Write texts for so many of the inputs only, chosen by `seed`; needs `shared`. 0: for all.
        draws: Score behind so many draws, and take the mean of the log-probabilities. Not in the paper.
        decoding: How to sample.
        normalization, overflow, max_length, memory_limit: As for [`LabelScorer`]. The paper's code drops from the left
            what is too long, which is `overflow="drop_demonstrations"`.
        seed: Of generation, and of drawing if no other is given.
        progressbar: Show one.

    Raises:
        TypeError, ValueError: As [`LabelScorer`]; if the task can't generate, or a number is out of its range.

    Example:

    ```py
    >>> sg_icl = SelfGeneratedICL(model, tokenizer, SST2, preset="recommended")
    >>> sg_icl.score(["two lost hours"], pool_file="pools.jsonl").predictions()
    ['negative']
    ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        shots: int = 8,
        samples: int = 8,
        conditioned: bool = True,
        preset: str = "paper",
        balanced: Optional[bool] = None,
        self_consistent: Optional[bool] = None,
        keep: Optional[float] = None,
        calibrate: Optional[Union[bool, str]] = None,
        strength: Optional[float] = None,
        shared: Optional[bool] = None,
        pool_inputs: Optional[int] = None,
        draws: Optional[int] = None,
        decoding: Optional[Decoding] = None,
        chat: bool = False,
        normalization: str = "mean",
        overflow: str = DROP,
        max_length: Optional[int] = None,
        memory_limit: Optional[int] = None,
        seed: int = 13,
        progressbar: bool = False,
    ) -> None:
        given = {
            "balanced": balanced,
            "self_consistent": self_consistent,
            "keep": keep,
            "calibrate": calibrate,
            "strength": strength,
            "shared": shared,
            "pool_inputs": pool_inputs,
            "draws": draws,
        }
        options = options_of(preset, shots, samples, given)
        probe = dict.fromkeys(task.fields, "x")
        task.generation_prompt(probe, next(iter(task.labels)), conditioned)
        self.scorer = LabelScorer(
            model,
            tokenizer,
            task,
            chat=chat,
            normalization=normalization,
            overflow=overflow,
            max_length=max_length,
            memory_limit=memory_limit,
            progressbar=progressbar,
        )
        self.task, self.shots, self.samples, self.conditioned = task, shots, samples, conditioned
        self.preset, self.calibrate, self.strength = preset, options["calibrate"], options["strength"]
        self.balanced, self.self_consistent, self.keep = (options[n] for n in ("balanced", "self_consistent", "keep"))
        self.shared, self.pool_inputs, self.draws = (options[n] for n in ("shared", "pool_inputs", "draws"))
        self.decoding = replace(decoding or Decoding(), samples=samples, max_new_tokens=task.max_new_tokens, seed=seed)
        if self.decoding.stop:
            raise ValueError(f"decoding.stop={self.decoding.stop} is for chats; a demonstration ends with its line.")
        self.seed, self.progressbar = seed, progressbar
        self.sampler = Sampler(
            self.scorer.language_model,
            self.scorer.encoder,
            tokenizer,
            self.decoding,
            task.min_new_tokens,
            memory_limit,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that generated texts depend on, beside the inputs."""
        task = asdict(self.task)
        return {
            "model": identity(self.scorer.model),
            "task": {name: task[name] for name in ("template", "labels", "generated_field")},
            "prompt": self.task.generation_template if self.conditioned else self.task.class_only_template,
            "min_new_tokens": self.task.min_new_tokens,
            "conditioned": self.conditioned,
            "overflow": self.scorer.overflow,
            "max_length": self.scorer.max_tokens,
            **asdict(self.decoding),
        }

    def sources(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Which inputs [`score`] has texts written for: all, or `pool_inputs` of them, in their order."""
        if not self.pool_inputs or self.pool_inputs >= len(examples):
            return examples
        chosen = np.random.default_rng([self.seed, len(examples)]).permutation(len(examples))[: self.pool_inputs]
        return [examples[index] for index in sorted(chosen)]

    def generate(self, examples: Sequence[Example], pool_file: Optional[Union[str, os.PathLike]] = None) -> list[Pool]:
        """Sample a pool of demonstrations for every input.

        Args:
            examples: Inputs; strings, or mappings of fields.
            pool_file: Keeps pools as they are finished; inputs that it holds are not generated for again. The same
                inputs must come in the same order.

        Raises:
            ValueError: If the file belongs to other settings or inputs, or a prompt is too long for the model and
                `overflow` doesn't truncate.
        """
        values = [self.task.values(example) for example in examples]
        file = PoolFile(pool_file, self.settings)
        missing = [index for index, example in enumerate(values) if file.get(index, example) is None]
        labels = list(self.task.labels)
        prompts = request_prompts(self.scorer, self.task, [values[index] for index in missing], self.conditioned)
        # the prompts of one input have about the same length; they are sampled together, so that a pool is whole
        longest = [max(by_label, key=len) for by_label in prompts]
        with tqdm(total=len(missing), desc="Generating", disable=not self.progressbar) as bar:
            for batch in self.sampler.batches(longest, self.samples * len(labels)):
                keys = [f"{self.seed}/{missing[number]}/{label}" for number in batch for label in labels]
                texts = iter(
                    self.sampler.sample([prompt for number in batch for prompt in prompts[number]], keys, self.samples)
                )
                for number in batch:
                    samples = {label: next(texts) for label in labels}
                    file.add(missing[number], Pool(values[missing[number]], samples))
                bar.update(len(batch))
        return [file.pools[index] for index in range(len(values))]

    def consistent(self, pools: Sequence[Pool]) -> list[Pool]:
        """Pools without the texts that the model labels otherwise than intended.

        A text is classified without demonstrations, with contextual calibration.
        """
        return consistent(self.scorer, self.task, pools)

    def surest(self, pools: Sequence[Pool]) -> list[Pool]:
        """Pools with the share `keep` of each class's texts of which the model is surest; more where `shots` are not there.

        Texts are classified without demonstrations, and compared with the mean over all of them. With `shared`, the
        share is of all pools together, else of each.
        """
        return surest(
            self.scorer, self.task, pools, self.keep, math.ceil(self.shots / len(self.task.labels)), self.shared
        )

    def draw(self, pools: Sequence[Pool], seed: Optional[int] = None, number: int = 0) -> list[list[Demonstration]]:
        """Draw `shots` demonstrations for every input from its pool, fewer where it has fewer; warns if so.

        With `shared`, one draw from all pools, the very same list for every input.

        Args:
            pools: One for each input.
            seed: Of the draw; None: the seed of generation.
            number: Which draw of this seed, of those that [`score_pools`] takes the mean of.
        """
        seed, further = self.seed if seed is None else seed, [number] * (number > 0)
        demonstrations = [pool.demonstrations(self.task) for pool in pools]
        if self.shared:
            demonstrations = [[each for group in demonstrations for each in group]] if pools else []
        drawn = []
        for index, candidates in enumerate(demonstrations):
            generator = np.random.default_rng([seed, index, *further])
            drawn.append(draw(candidates, self.shots, generator, self.balanced))
        few = sum(len(each) < self.shots for each in drawn)
        if few:
            none = sum(not each for each in drawn)
            whose = "all inputs have" if self.shared else f"{few} of {len(drawn)} inputs have"
            warnings.warn(
                f"{whose} fewer than {self.shots} demonstrations to draw from"
                f"{f', {none} of them none (zero-shot)' if none else ''}.",
                stacklevel=2,
            )
        return drawn * len(pools) if self.shared else drawn

    def score(
        self,
        examples: Sequence[Example],
        pool_file: Optional[Union[str, os.PathLike]] = None,
        seed: Optional[int] = None,
        unlabelled: Optional[Sequence[Example]] = None,
    ) -> LabelScores:
        """Generate demonstrations, draw, and score the labels of inputs behind them.

        Args:
            examples: Inputs.
            pool_file: See [`generate`]; with `shared`, of the inputs that texts are written for.
            seed: Of the draw, see [`draw`].
            unlabelled: Other texts of the kind, with `shared`: demonstrations are written like these instead of like the
                inputs, and `calibrate="batch"` takes its mean over them, so that no prediction depends on the inputs
                beside it.

        Raises:
            ValueError: As [`generate`] and [`LabelScorer.score`]; if there are `unlabelled` texts without `shared`.
        """
        if unlabelled is not None and not self.shared:
            raise ValueError("unlabelled texts are for shared=True; without it, every input has texts of its own.")
        if not len(examples):
            return self.scorer.score_each(examples, [])
        pools = self.generate(self.sources(examples if unlabelled is None else unlabelled), pool_file)
        return self.score_pools(pools, seed, examples if self.shared else None, unlabelled)

    def score_pools(
        self,
        pools: Sequence[Pool],
        seed: Optional[int] = None,
        examples: Optional[Sequence[Example]] = None,
        unlabelled: Optional[Sequence[Example]] = None,
    ) -> LabelScores:
        """As [`score`], from pools that are there.

        Args:
            pools: For the inputs that are scored, or with `shared` for any inputs.
            seed: Of the draw.
            examples: With `shared`, what is scored; None: the pools' inputs.
            unlabelled: See [`score`].

        Raises:
            ValueError: If there are `examples` without `shared`; as [`score`].
        """
        if not self.shared and (examples is not None or unlabelled is not None):
            raise ValueError(
                "examples and unlabelled texts beside pools are for shared=True; without it leave them out."
            )
        if self.shared and not pools:
            raise ValueError("pools is empty; generate texts for at least one input.")
        examples = [pool.example for pool in pools] if examples is None else examples
        usable = self.consistent(pools) if self.self_consistent else list(pools)
        usable = self.surest(usable) if self.keep < 1 else usable
        if calibration_named(self.calibrate) != BY_BATCH:
            unlabelled = None  # they were for the pools alone
        elif self.shared and unlabelled is None:
            unlabelled = self._beside(examples, pools)
        scores = []
        for number in range(self.draws):
            drawn = self.draw(usable, seed, number)
            shown = drawn[:1] * len(examples) if self.shared else drawn
            scores.append(self.scorer.score_each(examples, shown, self.calibrate, unlabelled, self.strength))
        return mean_of(scores)

    def _beside(self, examples: Sequence[Example], pools: Sequence[Pool]) -> Optional[list[Example]]:
        """What batch calibration takes its mean over where inputs are few: them, and generated texts of all labels."""
        if len(examples) >= FEW_INPUTS:
            return None
        generated = [each for pool in pools for each in pool.demonstrations(self.task)]
        chosen = draw(generated, _STAND_INS, np.random.default_rng(self.seed), balanced=True)
        return [*examples, *(example for example, _ in chosen)]
