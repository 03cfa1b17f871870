# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""In-context classification: log-probabilities of all labels after demonstrations and an input."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from generation_ext.in_context.calibration import (
    BY_BATCH,
    BY_CONTENT_FREE,
    CONTENT_FREE,
    calibration_named,
    check_inputs,
    check_strength,
    mean_prior,
    normalized,
)
from generation_ext.in_context.overflow import OVERFLOW, Demonstration, FittedText, fit
from generation_ext.in_context.seq2seq import read_label_logits
from generation_ext.prompts import Example, Task
from generation_ext.shared_prefix.batching import BatchPlanner, check_memory_limit, run_in_batches
from generation_ext.shared_prefix.cache import common_prefix, encode_prefix, layout, read_logits
from generation_ext.shared_prefix.encoding import LabelEncoder, LabelTokens, TextEncoder
from generation_ext.shared_prefix.token_tree import TokenTree
from peft_ext.language_model import ENCODER, ENCODER_DECODER, inference, language_model


NORMALIZATIONS = ("sum", "mean")
# Fewer inputs than this on the same demonstrations run in one pass with them.
_OWN_PREFIX = 8


class LabelScores(NamedTuple):
    """Scores of n inputs for C labels.

    Attributes:
        labels: The task's labels, the order of columns.
        log_probs: float32 `[n, C]`: natural logarithms of the probability of the label's tokens after the input, summed
            over tokens (or their mean, as the scorer was told).
        prior: float32 `[n, C]`: with calibration the logarithms of the labels' probabilities without an input (or their
            mean over inputs), relative to each other, times the calibration's strength; None without.
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
        return np.exp(normalized(self.scores))

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
        chat: The task as a conversation, for instruction-tuned models: an example is what the user says, its label what the
            assistant answers, demonstrations are earlier turns. By the tokenizer's chat template.
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
        chat: bool = False,
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
        check_memory_limit(memory_limit)
        self.language_model = language_model(model)
        if self.language_model.kind == ENCODER:
            raise ValueError(
                f"model ({type(self.language_model.base).__name__}) is an encoder, which gives no text a probability; use "
                "a causal or an encoder-decoder language model."
            )
        self.model, self.task = model, task
        self.normalization, self.overflow, self.memory_limit = normalization, overflow, memory_limit
        self.progressbar = progressbar
        self.encoder = TextEncoder(tokenizer, self.language_model.kind, model)
        self.labels = LabelEncoder(task, self.encoder, self.language_model.kind, chat)
        self.max_length = self.language_model.length_limit(max_length)
        behind = self.labels.behind(self.labels.usual)
        self.max_tokens = None if self.max_length is None else self.max_length - behind

    def score(
        self,
        examples: Sequence[Example],
        demonstrations: Sequence[Demonstration] = (),
        calibrate: Union[bool, str] = False,
        unlabelled: Optional[Sequence[Example]] = None,
        strength: float = 1.0,
    ) -> LabelScores:
        """Score the labels of examples that share their demonstrations.

        Args:
            examples: Inputs; strings, or mappings of fields.
            demonstrations: Pairs of an example and its label, in the order in which they are shown; empty: zero-shot.
            calibrate: Compare the labels' probabilities with a prior, so that no label wins by its words alone.
                `"content_free"` (or True): with those after inputs without content (contextual calibration, Zhao et al.
                2021). `"batch"`: with their mean over `unlabelled`, or over the examples themselves, so that a prediction
                depends on the inputs beside it (batch calibration, Zhou et al. 2024); supposes that no label is rare
                among them, and warns if they are few.
            unlabelled: Inputs of which nothing is known, for `calibrate="batch"`; None: the examples.
            strength: Of the calibration, above 0: the prior's logarithm is taken times it. Below 1 a label may be rarer
                than others: with 1 and `"batch"`, all are chosen about equally often.

        Raises:
            TypeError, ValueError: If an example or a demonstration doesn't fit the task, or a text doesn't fit the
                model and `overflow` says so; if `calibrate` is unknown, there are no two inputs for the mean, or
                `strength` is not above 0.
        """
        return self.score_each(examples, [list(demonstrations)] * len(examples), calibrate, unlabelled, strength)

    def score_each(
        self,
        examples: Sequence[Example],
        demonstrations: Sequence[Sequence[Demonstration]],
        calibrate: Union[bool, str] = False,
        unlabelled: Optional[Sequence[Example]] = None,
        strength: float = 1.0,
    ) -> LabelScores:
        """As [`score`], with demonstrations of its own for every example; examples that are given the very same
        sequence share it. `unlabelled` needs demonstrations that all share."""
        if isinstance(examples, (str, bytes)):
            raise TypeError("examples must be a sequence of examples, got a single string; pass [text].")
        if len(examples) != len(demonstrations):
            raise ValueError(f"{len(examples)} examples, but demonstrations for {len(demonstrations)} of them.")
        calibration = calibration_named(calibrate)
        shared = all(shown is demonstrations[0] for shown in demonstrations)
        check_inputs(calibration, examples, shared, unlabelled)
        check_strength(strength)
        if not len(examples):
            return self._result([], np.zeros((0, len(self.task.labels)), np.float32), None)
        texts = self._fit(examples, demonstrations)
        groups: dict[Any, list[int]] = {}
        for index, text in enumerate(texts):
            groups.setdefault((id(demonstrations[index]), text.dropped), []).append(index)
        if calibration == BY_CONTENT_FREE:
            return self._content_free_scores(texts, groups, strength)
        others: list[FittedText] = []
        if unlabelled is not None:
            others = self._fit(unlabelled, [demonstrations[0]] * len(unlabelled))
            for index, text in enumerate(others, start=len(texts)):
                groups.setdefault((id(demonstrations[0]), text.dropped), []).append(index)
        log_probs = self._run(texts + others, list(groups.values()))
        prior = None
        if calibration == BY_BATCH:
            mean = mean_prior(log_probs[len(texts) :] if others else log_probs)
            prior = np.tile(np.float32(strength) * mean, (len(texts), 1))
        return self._result(texts, log_probs[: len(texts)], prior)

    def _content_free_scores(
        self, texts: list[FittedText], groups: dict[Any, list[int]], strength: float
    ) -> LabelScores:
        """With the prior that the inputs without content have behind each group's demonstrations."""
        content_free: list[FittedText] = []
        for group in groups.values():
            first = len(texts) + len(content_free)
            content_free += self._content_free(texts[group[0]].demonstrations)
            group += range(first, first + len(CONTENT_FREE))
        log_probs = self._run(texts + content_free, list(groups.values()))
        prior = np.zeros((len(texts), log_probs.shape[1]), np.float32)
        for group in groups.values():
            inputs, without = group[: -len(CONTENT_FREE)], group[-len(CONTENT_FREE) :]
            prior[inputs] = strength * mean_prior(log_probs[without])
        return self._result(texts, log_probs[: len(texts)], prior)

    def _fit(self, examples: Sequence[Example], demonstrations: Sequence[Sequence[Demonstration]]) -> list[FittedText]:
        texts = fit(self.labels, examples, demonstrations, self.max_length, self.overflow)
        dropped, truncated = sum(text.dropped for text in texts), sum(text.truncated > 0 for text in texts)
        if dropped or truncated:
            done = [f"{dropped} demonstrations were dropped"] * (dropped > 0)
            done += [f"{truncated} were truncated"] * (truncated > 0)
            count = sum(text.dropped > 0 or text.truncated > 0 for text in texts)
            warnings.warn(
                f"{count} of {len(texts)} inputs are too long for {self.max_tokens} tokens; {' and '.join(done)}. The "
                "result's `dropped` and `truncated` say where.",
                stacklevel=4,
            )
        return texts

    def _content_free(self, demonstrations: Sequence[Demonstration]) -> list[FittedText]:
        examples = [dict.fromkeys(self.task.fields, content) for content in CONTENT_FREE]
        shown = [demonstrations] * len(examples)
        return fit(self.labels, examples, shown, self.max_length, "error")

    def _run(self, texts: list[FittedText], groups: list[list[int]]) -> np.ndarray:
        """Scores `[texts, labels]` of texts, of which those of a group share their demonstrations."""
        result = np.zeros((len(texts), len(self.task.labels)), np.float32)
        with inference(self.model), tqdm(total=len(texts), desc="Scoring", disable=not self.progressbar) as bar:
            for indices, scores in self._passes(texts, groups):
                result[indices] = scores
                bar.update(len(indices))
        if not np.isfinite(result).all():
            raise ValueError(
                "the model gives NaN or infinite log-probabilities; its weights are damaged, or its dtype overflows "
                "(load it with dtype=torch.float32 or bfloat16)."
            )
        return result

    def _passes(self, texts: list[FittedText], groups: list[list[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Indices of some texts and their scores, forward pass by forward pass."""
        if self.language_model.kind == ENCODER_DECODER:
            yield from self._seq2seq_passes([text.tokens for text in texts])
            return
        small = [group for group in groups if len(group) < _OWN_PREFIX]
        for group in groups:
            if len(group) >= _OWN_PREFIX:
                shares = self.language_model.unshareable is None
                prefix = common_prefix([texts[index].tokens for index in group]) if shares else []
                yield from self._tree_passes(texts, [[index] for index in group], prefix)
        if small:
            yield from self._tree_passes(texts, small, [])

    def _tree_passes(
        self, texts: list[FittedText], groups: list[list[int]], prefix: list[int]
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Each group of texts as a tree, on a shared prefix."""
        model = self.language_model
        encoded = encode_prefix(model, prefix)
        trees = [_tree([texts[index] for index in group], len(prefix)) for group in groups]
        branches = 1 if model.trees else max(len(tree.paths()) for tree in trees)
        planner = BatchPlanner(model, self.memory_limit, len(prefix), branches)

        def run(indices: list[int], rows: list[list[int]]) -> np.ndarray:
            packed = layout(model, [trees[index] for index in indices], rows)
            labels = [texts[text].labels for index in indices for text in groups[index]]
            return self._label_scores(read_logits(model, packed, encoded), labels)

        lengths, reads = [len(tree) for tree in trees], [len(tree.reads) for tree in trees]
        for indices, scores in run_in_batches(planner, lengths, reads, run):
            yield [text for index in indices for text in groups[index]], scores

    def _seq2seq_passes(self, texts: list[list[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
        labels = self.labels.usual
        branches = max(1, len(labels.nodes.paths()))
        planner = BatchPlanner(self.language_model, self.memory_limit, branches=branches)

        def run(indices: list[int], rows: list[list[int]]) -> np.ndarray:
            logits = read_label_logits(self.language_model, [texts[index] for index in indices], labels)
            return self._label_scores(logits, [labels] * len(indices))

        return run_in_batches(planner, [len(text) for text in texts], [labels.states] * len(texts), run)

    def _label_scores(self, logits: torch.Tensor, labels: Sequence[LabelTokens]) -> np.ndarray:
        """`[texts, labels]` out of the logits of all states of all texts, and the labels of each text."""
        starts = np.cumsum([0, *(each.states for each in labels)])
        alike: dict[int, list[int]] = {}
        for text, each in enumerate(labels):
            alike.setdefault(id(each), []).append(text)
        result = np.zeros((len(labels), len(self.task.labels)), np.float32)
        for texts in alike.values():
            tokens = labels[texts[0]]
            places = torch.from_numpy(starts[texts][:, None] + np.arange(tokens.states)).to(logits.device)
            by_text = logits[places].float()
            normalizer = by_text.logsumexp(dim=-1)
            columns = []
            for steps in tokens.steps:
                states, ids = zip(*steps)
                parts = by_text[:, list(states), list(ids)] - normalizer[:, list(states)]
                columns.append(parts.sum(dim=1) if self.normalization == "sum" else parts.mean(dim=1))
            result[texts] = torch.stack(columns, dim=1).cpu().numpy()
        return result

    def _result(self, texts: Sequence[FittedText], log_probs: np.ndarray, prior: Optional[np.ndarray]) -> LabelScores:
        dropped = np.array([text.dropped for text in texts], dtype=np.int64)
        truncated = np.array([text.truncated for text in texts], dtype=np.int64)
        return LabelScores(tuple(self.task.labels), log_probs, prior, dropped, truncated)


def _tree(texts: Sequence[FittedText], skipped: int) -> TokenTree:
    """Texts without their first tokens, which are the shared prefix's, each with its labels."""
    tree = TokenTree()
    tokens = [text.tokens[skipped:] for text in texts]
    root = common_prefix(tokens) if len(texts) > 1 else []
    trunk = tree.append(root)
    for own, text in zip(tokens, texts):
        text.labels.grow(tree, tree.append(own[len(root) :], trunk))
    return tree


def mean_of(scores: Sequence[LabelScores]) -> LabelScores:
    """The mean of several scorings of the same inputs, of log-probabilities and priors; demonstrations that were dropped are
    counted together."""
    first = scores[0]
    if len(scores) == 1:
        return first
    priors = [each.prior for each in scores if each.prior is not None]

    def mean(parts: list[np.ndarray]) -> np.ndarray:
        return np.asarray(np.mean(parts, axis=0, dtype=np.float64), np.float32)

    return LabelScores(
        first.labels,
        mean([each.log_probs for each in scores]),
        mean(priors) if priors else None,
        np.sum([each.dropped for each in scores], axis=0),
        np.max([each.truncated for each in scores], axis=0),
    )
