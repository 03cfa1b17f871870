# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""SG-ICL: the model writes its own demonstrations for every input, then classifies the input behind them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Optional, Union

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from generation_ext.in_context.overflow import BOTH, DROP, TRUNCATE, Demonstration, largest_that_fits
from generation_ext.in_context.pools import Pool, PoolFile, draw
from generation_ext.in_context.sampler import Decoding, Sampler
from generation_ext.in_context.scoring import LabelScorer, LabelScores
from generation_ext.prompts import Example, Task
from peft_ext.language_model import ENCODER_DECODER, identity


class SelfGeneratedICL:
    """Self-generated in-context learning (Kim et al. 2022).

    For every input and class, texts are sampled from the model, which is shown the input and asked for another one of
    the class; of these, `shots` are drawn at random and stand before the input as demonstrations. Defaults are those
    of the paper's code.

    Args:
        model: A causal or encoder-decoder language model, or a `PeftModel` of one; packed models too. Not changed.
        tokenizer: Its tokenizer.
        task: Templates and labels; needs a `generation_template`.
        shots: Demonstrations of an input (the paper's k).
        samples: Texts that are generated for each input and class.
        conditioned: Whether the model is shown the input when it generates; False is the paper's ablation.
        balanced: Draw as many demonstrations of each class as possible instead of uniformly.
        self_consistent: Only draw demonstrations that the model itself, without demonstrations and with contextual
            calibration, labels as intended. Not in the paper. Fewer than `shots` may be left, or none.
        chat: Classify by the tokenizer's chat template, see [`LabelScorer`]; demonstrations are written by plain prompts.
        calibrate: Calibrate the classification too, see [`LabelScorer.score`]. Not in the paper.
        decoding: How to sample.
        normalization, overflow, max_length, memory_limit: As for [`LabelScorer`]. The paper's code drops from the left
            what is too long, which is `overflow="drop_demonstrations"`.
        seed: Of generation, and of drawing if no other is given.
        progressbar: Show one.

    Raises:
        TypeError, ValueError: As [`LabelScorer`]; if the task can't generate, or a number is out of its range.

    Example:

    ```py
    >>> sg_icl = SelfGeneratedICL(model, tokenizer, SST2, self_consistent=True)
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
        balanced: bool = False,
        self_consistent: bool = False,
        calibrate: bool = False,
        decoding: Optional[Decoding] = None,
        chat: bool = False,
        normalization: str = "mean",
        overflow: str = DROP,
        max_length: Optional[int] = None,
        memory_limit: Optional[int] = None,
        seed: int = 13,
        progressbar: bool = False,
    ) -> None:
        for name, value in (("shots", shots), ("samples", samples)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer.")
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
        self.balanced, self.self_consistent, self.calibrate = balanced, self_consistent, calibrate
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
        prompts = self._prompts([values[index] for index in missing])
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
        demonstrations = [each for pool in pools for each in pool.demonstrations(self.task)]
        predictions = iter(self.scorer.score([example for example, _ in demonstrations], calibrate=True).predictions())
        kept = []
        for pool in pools:
            samples = {
                label: [text for text in texts if text and next(predictions) == label]
                for label, texts in pool.samples.items()
            }
            kept.append(Pool(pool.example, samples))
        return kept

    def draw(self, pools: Sequence[Pool], seed: Optional[int] = None) -> list[list[Demonstration]]:
        """Draw `shots` demonstrations for every input from its pool, fewer where it has fewer; warns if so.

        Args:
            pools: One for each input.
            seed: Of the draw; None: the seed of generation.
        """
        drawn = []
        for index, pool in enumerate(pools):
            generator = np.random.default_rng([self.seed if seed is None else seed, index])
            drawn.append(draw(pool.demonstrations(self.task), self.shots, generator, self.balanced))
        few = sum(len(each) < self.shots for each in drawn)
        if few:
            none = sum(not each for each in drawn)
            warnings.warn(
                f"{few} of {len(drawn)} inputs have fewer than {self.shots} demonstrations to draw from"
                f"{f', {none} of them none (zero-shot)' if none else ''}.",
                stacklevel=2,
            )
        return drawn

    def score(
        self,
        examples: Sequence[Example],
        pool_file: Optional[Union[str, os.PathLike]] = None,
        seed: Optional[int] = None,
    ) -> LabelScores:
        """Generate demonstrations for every input, draw, and score the labels behind them.

        Args:
            examples: Inputs.
            pool_file: See [`generate`].
            seed: Of the draw, see [`draw`].
        """
        return self.score_pools(self.generate(examples, pool_file), seed)

    def score_pools(self, pools: Sequence[Pool], seed: Optional[int] = None) -> LabelScores:
        """As [`score`], from pools that are there."""
        usable = self.consistent(pools) if self.self_consistent else pools
        drawn = self.draw(usable, seed)
        return self.scorer.score_each([pool.example for pool in pools], drawn, self.calibrate)

    def _prompts(self, examples: Sequence[dict[str, str]]) -> list[list[list[int]]]:
        """For each input the token ids of one prompt for each label."""
        limit = self.scorer.max_length
        if limit is not None and self.scorer.language_model.kind != ENCODER_DECODER:
            limit -= self.task.max_new_tokens
        return [
            [self._prompt(index, example, label, limit) for label in self.task.labels]
            for index, example in enumerate(examples)
        ]

    def _prompt(self, index: int, example: dict[str, str], label: str, limit: Optional[int]) -> list[int]:
        def encode(characters: Optional[int]) -> list[int]:
            shorter = {name: value[:characters] for name, value in example.items()}
            return self.scorer.encoder([self.task.generation_prompt(shorter, label, self.conditioned)])[0]

        def attempt(characters: int) -> Optional[tuple[int, list[int]]]:
            tokens = encode(characters)
            return (characters, tokens) if limit is None or len(tokens) <= limit else None

        tokens = encode(None)
        if limit is None or len(tokens) <= limit:
            return tokens
        truncates = self.scorer.overflow in (TRUNCATE, BOTH)
        fitting = largest_that_fits(attempt, max(map(len, example.values()))) if truncates else None
        if fitting is None:
            raise ValueError(
                f"input {index}: the prompt that asks for a {label!r} one takes {len(tokens)} tokens, but {limit} fit "
                f"before {self.task.max_new_tokens} new ones; shorten it, or use overflow={BOTH!r}."
            )
        warnings.warn(f"input {index} is cut to {fitting[0]} characters for its generation prompt.", stacklevel=4)
        return fitting[1]
