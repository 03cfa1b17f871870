# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""In-context classification: log-probabilities of all labels after demonstrations and an input."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from generation_ext.in_context.overflow import OVERFLOW, Fitted, fit
from generation_ext.in_context.seq2seq import read_label_logits
from generation_ext.prompts import Example, Task
from generation_ext.shared_prefix.batching import Batch, Planner, check_memory_limit, run_in_batches
from generation_ext.shared_prefix.cache import EMPTY, common_prefix, encode_prefix, layout, read_logits
from generation_ext.shared_prefix.encoding import TextEncoder, label_tokens
from generation_ext.shared_prefix.token_tree import TokenTree
from peft_ext.language_model import ENCODER, ENCODER_DECODER, inference, language_model


Demonstration = tuple[Example, str]
NORMALIZATIONS = ("sum", "mean")
# What stands for "no input" (Zhao et al. 2021, section 5).
CONTENT_FREE = ("N/A", "", "[MASK]")
# Fewer inputs than this on the same demonstrations run in one pass with them.
_OWN_PREFIX = 8


class LabelScores(NamedTuple):
    """Scores of n inputs for C labels.

    Attributes:
        labels: The task's labels, the order of columns.
        log_probs: float32 `[n, C]`: natural logarithms of the probability of the label's tokens after the input, summed
            over tokens (or their mean, as the scorer was told).
        prior: float32 `[n, C]`: with calibration the logarithms of the labels' probabilities without an input, relative
            to each other; None without.
        dropped: int `[n]`: demonstrations that were left out to make an input fit.
        truncated: int `[n]`: characters that were cut off an input to make it fit.
    """

    labels: tuple[str, ...]
    log_probs: np.ndarray
    prior: Optional[np.ndarray]
    dropped: np.ndarray
    truncated: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """float32 `[n, C]`: what is compared; with calibration relative to the prior."""
        return self.log_probs if self.prior is None else self.log_probs - self.prior

    def probabilities(self) -> np.ndarray:
        """float32 `[n, C]`: the labels' probabilities among each other."""
        return np.exp(_normalized(self.scores))

    def predictions(self) -> list[str]:
        """The best label of each input."""
        return [self.labels[index] for index in self.scores.argmax(axis=1)]


class LabelScorer:
    """Scores the labels of a task with a frozen language model.

    Demonstrations that several inputs share are encoded once; an input and all labels run in one pass, several inputs
    to a row, and only the tokens that are read go through the output head. The numbers are those of encoding every
    string of demonstrations, input and label by itself.

    Args:
        model: A causal or encoder-decoder language model, or a `PeftModel` of one; packed models too. Not changed.
        tokenizer: Its tokenizer; needs no padding token.
        task: Templates and labels.
        normalization: `"sum"` of the log-probabilities of a label's tokens, or their `"mean"` (as SG-ICL's code).
        overflow: What to do with an input that is too long for the model with its demonstrations: `"error"`,
            `"drop_demonstrations"` (the first ones go first), `"truncate_input"` (the ends of its longest fields), or
            `"drop_then_truncate"`. A warning says how often it was done, and the result where.
        max_length: Most tokens of a text with its label; None: what the model's config says.
        memory_limit: Bytes that a pass may take beside the weights; None: a quarter of what is free. A device that runs
            out of memory makes batches smaller.
        progressbar: Show one.

    Raises:
        TypeError, ValueError: If an argument is out of its range, the model is of a kind that can't be scored (see
            [`language_model`]), or labels are no or the same tokens to the tokenizer.

    Example:

    ```py
    >>> scorer = LabelScorer(model, tokenizer, SST2)
    >>> scores = scorer.score(["a masterpiece", "two lost hours"], demonstrations=[("what a bore", "negative")])
    >>> scores.predictions()
    ['positive', 'negative']
    ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        normalization: str = "sum",
        overflow: str = "error",
        max_length: Optional[int] = None,
        memory_limit: Optional[int] = None,
        progressbar: bool = False,
    ) -> None:
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization={normalization!r} is unknown; choose one of {NORMALIZATIONS}.")
        if overflow not in OVERFLOW:
            raise ValueError(f"overflow={overflow!r} is unknown; choose one of {OVERFLOW}.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} must be positive, or None for what the model's config says.")
        check_memory_limit(memory_limit)
        self.traits = language_model(model)
        if self.traits.kind == ENCODER:
            raise ValueError(
                f"model ({type(self.traits.model).__name__}) is an encoder, which gives no text a probability; use a "
                "causal or an encoder-decoder language model."
            )
        self.model, self.task = model, task
        self.normalization, self.overflow, self.memory_limit = normalization, overflow, memory_limit
        self.progressbar = progressbar
        self.encoder = TextEncoder(tokenizer, self.traits.kind)
        self.labels = label_tokens(task, self.encoder, self.traits)
        limits = [limit for limit in (max_length, self.traits.max_length) if limit is not None]
        # of an encoder-decoder model, the labels don't lie behind the text
        room = 0 if self.traits.kind == ENCODER_DECODER else self.labels.longest
        self.max_length = min(limits) if limits else None
        self.max_tokens = None if self.max_length is None else self.max_length - room

    def score(
        self, examples: Sequence[Example], demonstrations: Sequence[Demonstration] = (), calibrate: bool = False
    ) -> LabelScores:
        """Score the labels of examples that share their demonstrations.

        Args:
            examples: Inputs; strings, or mappings of fields.
            demonstrations: Pairs of an example and its label, in the order in which they are shown; empty: zero-shot.
            calibrate: Also measure the labels' probabilities after inputs without content, and compare with them
                (contextual calibration, Zhao et al. 2021).

        Raises:
            TypeError, ValueError: If an example or a demonstration doesn't fit the task, or a text doesn't fit the
                model and `overflow` says so.
        """
        shared = list(demonstrations)
        return self.score_each(examples, [shared] * len(examples), calibrate)

    def score_each(
        self,
        examples: Sequence[Example],
        demonstrations: Sequence[Sequence[Demonstration]],
        calibrate: bool = False,
    ) -> LabelScores:
        """As [`score`], with demonstrations of its own for every example; examples that are given the very same
        sequence share it."""
        if isinstance(examples, (str, bytes)):
            raise TypeError("examples must be a sequence of examples, got a single string; pass [text].")
        if len(examples) != len(demonstrations):
            raise ValueError(f"{len(examples)} examples, but demonstrations for {len(demonstrations)} of them.")
        if not len(examples):
            return self._result([], np.zeros((0, len(self.task.labels)), np.float32), None)
        fitted = self._fit(examples, demonstrations)
        groups: dict[Any, list[int]] = {}
        for index, text in enumerate(fitted):
            groups.setdefault((id(demonstrations[index]), text.dropped), []).append(index)
        texts = [text.tokens for text in fitted]
        free: list[range] = []  # for each group, where its texts without content are
        for members in groups.values():
            added = self._content_free(fitted[members[0]]) if calibrate else []
            free.append(range(len(texts), len(texts) + len(added)))
            texts += added
        together: list[list[int]] = [[*members, *extra] for members, extra in zip(groups.values(), free)]
        log_probs = self._run(texts, together)
        prior = None
        if calibrate:
            prior = np.zeros((len(fitted), log_probs.shape[1]), np.float32)
            for members, extra in zip(groups.values(), free):
                prior[members] = np.log(np.exp(_normalized(log_probs[list(extra)])).mean(axis=0))
        return self._result(fitted, log_probs[: len(fitted)], prior)

    def _fit(self, examples: Sequence[Example], demonstrations: Sequence[Sequence[Demonstration]]) -> list[Fitted]:
        fitted = fit(
            self.task, self.encoder, examples, demonstrations, self.max_tokens, self.overflow, self.labels.moved
        )
        dropped, truncated = sum(text.dropped for text in fitted), sum(text.truncated > 0 for text in fitted)
        if dropped or truncated:
            done = [f"{dropped} demonstrations were dropped"] * (dropped > 0) + [f"{truncated} were truncated"] * (
                truncated > 0
            )
            what = " and ".join(done)
            count = sum(text.dropped > 0 or text.truncated > 0 for text in fitted)
            warnings.warn(
                f"{count} of {len(fitted)} inputs are too long for {self.max_tokens} tokens; {what}. The result's "
                "`dropped` and `truncated` say where.",
                stacklevel=4,
            )
        return fitted

    def _content_free(self, text: Fitted) -> list[list[int]]:
        empty = [dict.fromkeys(self.task.fields, content) for content in CONTENT_FREE]
        fitted = fit(
            self.task,
            self.encoder,
            empty,
            [text.demonstrations] * len(empty),
            self.max_tokens,
            "error",
            self.labels.moved,
        )
        return [each.tokens for each in fitted]

    def _run(self, texts: list[list[int]], groups: list[list[int]]) -> np.ndarray:
        """Scores `[texts, labels]` of token ids, of which those of a group share their beginning."""
        result = np.zeros((len(texts), len(self.task.labels)), np.float32)
        with inference(self.model), tqdm(total=len(texts), desc="Scoring", disable=not self.progressbar) as bar:
            if self.traits.kind == ENCODER_DECODER:
                self._run_seq2seq(texts, result, bar)
            else:
                small = [group for group in groups if len(group) < _OWN_PREFIX]
                for group in groups:
                    if len(group) >= _OWN_PREFIX:
                        prefix = common_prefix([texts[index] for index in group])
                        self._run_trees(texts, [[index] for index in group], prefix, result, bar)
                if small:
                    self._run_trees(texts, small, [], result, bar)
        if not np.isfinite(result).all():
            raise ValueError(
                "the model gives NaN or infinite log-probabilities; its weights are damaged, or its dtype overflows "
                "(load it with dtype=torch.float32 or bfloat16)."
            )
        return result

    def _run_trees(
        self, texts: list[list[int]], groups: list[list[int]], prefix: list[int], result: np.ndarray, bar: tqdm
    ) -> None:
        """Run groups of texts, each as a tree, on a shared prefix."""
        encoded = encode_prefix(self.traits, prefix) if prefix else EMPTY
        trees = [self._tree([texts[index][len(prefix) :] for index in group]) for group in groups]
        leaves = max(len(tree.paths()) for tree in trees[:1]) if not self.traits.trees else 1
        planner = Planner(self.traits, self.memory_limit, len(prefix), leaves)

        def run(batch: Batch) -> np.ndarray:
            order = [index for row in batch for index in row]
            place = {index: number for number, index in enumerate(order)}
            rows = layout(self.traits, [trees[index] for index in order], [[place[i] for i in row] for row in batch])
            return self._label_scores(read_logits(self.traits, rows, encoded))

        for indices, scores in run_in_batches(
            planner, [len(tree) for tree in trees], [len(tree.reads) for tree in trees], run
        ):
            members = [index for group in indices for index in groups[group]]
            result[members] = scores
            bar.update(len(members))

    def _run_seq2seq(self, texts: list[list[int]], result: np.ndarray, bar: tqdm) -> None:
        branches = max(1, len(self.labels.nodes.paths()))
        planner = Planner(self.traits, self.memory_limit, branches=branches)

        def run(batch: Batch) -> np.ndarray:
            order = [index for row in batch for index in row]
            return self._label_scores(read_label_logits(self.traits, [texts[index] for index in order], self.labels))

        lengths = [len(text) for text in texts]
        for indices, scores in run_in_batches(planner, lengths, [self.labels.states] * len(texts), run):
            result[indices] = scores
            bar.update(len(indices))

    def _tree(self, texts: Sequence[Sequence[int]]) -> TokenTree:
        tree = TokenTree()
        root = common_prefix(texts) if len(texts) > 1 else []
        trunk = tree.append(root)
        for text in texts:
            self.labels.grow(tree, tree.append(text[len(root) :], trunk))
        return tree

    def _label_scores(self, logits: torch.Tensor) -> np.ndarray:
        """`[texts, labels]` out of the logits of all states of all texts."""
        by_text = logits.view(-1, self.labels.states, logits.shape[-1]).float()
        normalizer = by_text.logsumexp(dim=-1)
        columns = []
        for steps in self.labels.steps:
            states, tokens = zip(*steps)
            parts = by_text[:, list(states), list(tokens)] - normalizer[:, list(states)]
            columns.append(parts.sum(dim=1) if self.normalization == "sum" else parts.mean(dim=1))
        return torch.stack(columns, dim=1).cpu().numpy()

    def _result(self, fitted: Sequence[Fitted], log_probs: np.ndarray, prior: Optional[np.ndarray]) -> LabelScores:
        dropped = np.array([text.dropped for text in fitted], dtype=np.int64)
        truncated = np.array([text.truncated for text in fitted], dtype=np.int64)
        return LabelScores(tuple(self.task.labels), log_probs, prior, dropped, truncated)


def _normalized(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities that sum to one over the labels."""
    top = scores.max(axis=1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(axis=1, keepdims=True))
