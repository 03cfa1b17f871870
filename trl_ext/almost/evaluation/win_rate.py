# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Pairwise win rate of one model's answers against another's: both orders, ties, intervals, length taken out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from generation_ext.shared_prefix.sampling import Sampling
from peft_ext.rows import RowFile
from trl_ext.almost.evaluation.judges import AnswerPair, Judge, Judgement
from trl_ext.almost.evaluation.statistics import win_rate, with_interval
from trl_ext.almost.prompts.chat import request_text
from trl_ext.almost.repetition import repeated_share
from trl_ext.almost.rewards import PairScores
from trl_ext.almost.writing.backends import Request, TransformersBackend


# Of the answer and of the baseline.
Scores = tuple[float, float]
# Ids, and the answers to each question.
Answers = Mapping[Any, Sequence[str]]


def write_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[Any, str],
    path: Path,
    sampling: Sampling,
    batch_size: int = 16,
) -> dict[Any, list[str]]:
    """A model's answers to questions, written to a file of rows as they come; those that are there aren't made again.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        questions: Ids and questions.
        path: A .jsonl file of `id`, `query` and `responses`.
        sampling: How to draw, and how many to each.
        batch_size: Answers that are written side by side.

    Returns:
        The ids, each with its answers.
    """
    rows = RowFile(path)
    keys = list(questions)
    backend = TransformersBackend(model, tokenizer, batch_size)
    requests = [Request(str(key), request_text(tokenizer, questions[key])) for key in keys]
    with tqdm(total=len(keys), desc="Answers", initial=len(rows)) as bar:
        for batch in backend.stream(requests, sampling, done=lambda index: keys[index] in rows):
            made = [
                {"id": keys[i], "query": questions[keys[i]], "responses": [text.strip() for text in texts]}
                for i, texts in batch
            ]
            bar.update(rows.append(made))
    return {key: rows.rows[key]["responses"] for key in keys}


def compare(
    questions: Mapping[Any, str],
    answers: Answers,
    baseline: Answers,
    judge: Judge,
    path: Optional[Path] = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge answers against a baseline's.

    A question's n-th answer is compared with its baseline's n-th, in both orders (once, if the judge says that the order
    can't matter). A question's win is the share of its judgements that prefer the answer, a tie counting half; questions
    without a readable judgement in each order are left out and counted. Intervals are over questions.

    Args:
        questions: Ids and questions.
        answers: Ids, each with its answers.
        baseline: Ids, each with the baseline's answers: as many, or one that all are compared with.
        judge: Who judges.
        path: A .jsonl file to keep judgements in; those that are there aren't asked for again.
        seed: Of the bootstrap.

    Returns:
        `win_rate` and `length_controlled` (see `statistics.win_rate`), counts of judgements (`wins`, `ties`, `losses`),
        `consistent` (share of comparisons whose orders agree), `scores` (sums), `length` (means, in characters),
        `repetition` (mean share of an answer's repeated word 3-grams) and its difference to the baseline's, with their
        intervals, and `unreadable` (questions left out); of a reward model also the mean `reward` and the mean
        `reward_difference` to the baseline, with their intervals; and, where a question has several answers,
        `length_correlation`, of rewards with the logarithm of the characters among one model's answers to a question, and
        `reward_difference_at_equal_length`, less what that dependence makes of the difference in length.

    Raises:
        ValueError: If an answer is missing, a question has another number of answers than its baseline, or no judgement
            can be read.
    """
    _check_complete(questions, answers, baseline)
    pairs = {key: _pairs(key, answers, baseline) for key in questions}
    orders = range(1 if judge.symmetric else 2)
    asked = [
        _Asked(key, number, order, questions[key], *texts)
        for key in questions
        for number, texts in enumerate(pairs[key])
        for order in orders
    ]
    judgements = _judgements(asked, judge, RowFile(path) if path is not None else None)
    judged: dict[Any, list[list[Scores]]] = {}
    for key in questions:
        scores = [_readable(judgements[key, number, order] for order in orders) for number in range(len(pairs[key]))]
        if all(len(both) == len(orders) for both in scores):
            judged[key] = scores
    if not judged:
        raise ValueError(f"none of the judge's {len(questions)} judgements can be read.")
    result = {**_summary(judged, pairs, seed), "unreadable": len(questions) - len(judged)}
    if judge.symmetric:  # its scores are numbers of their own, not marks for one answer beside the other
        rewards = np.array([np.mean([both[0] for both in scores], axis=0) for scores in judged.values()])
        result["reward"] = with_interval(rewards[:, 0], seed=seed)
        result["reward_difference"] = with_interval(rewards[:, 0] - rewards[:, 1], seed=seed)
        result.update(_at_equal_length(judged, pairs, seed))
    return result


class _Asked(NamedTuple):
    """One judgement: of which answer to which question, in which order."""

    key: Any
    number: int
    order: int
    question: str
    answer: str
    baseline: str

    @property
    def name(self) -> str:
        # other answers get other judgements
        texts_hash = hashlib.sha256("\0".join((self.question, self.answer, self.baseline)).encode("utf-8")).hexdigest()
        return f"{self.key}/{self.order}/{texts_hash[:16]}"

    @property
    def shown(self) -> AnswerPair:
        texts = (self.baseline, self.answer) if self.order else (self.answer, self.baseline)
        return AnswerPair(self.question, *texts)


def _check_complete(questions: Mapping[Any, str], answers: Answers, baseline: Answers) -> None:
    for name, given in (("answers", answers), ("baseline", baseline)):
        missing = [key for key in questions if not given.get(key)]
        if missing:
            raise ValueError(f"{name} lacks question {missing[0]!r} ({len(missing)} of {len(questions)} are missing).")


def _pairs(key: Any, answers: Answers, baseline: Answers) -> list[tuple[str, str]]:
    own, other = list(answers[key]), list(baseline[key])
    if len(other) not in (1, len(own)):
        raise ValueError(
            f"question {key!r} has {len(own)} answers and {len(other)} of the baseline; give as many, or one of the baseline."
        )
    return list(zip(own, other * len(own) if len(other) == 1 else other))


def _judgements(
    asked: Sequence[_Asked], judge: Judge, store: Optional[RowFile]
) -> dict[tuple[Any, int, int], Judgement]:
    """Scores of the answer and of the baseline, in this order, whichever was shown first."""
    scores = {} if store is None else {one.name: store.rows[one.name]["scores"] for one in asked if one.name in store}
    missing = list({one.name: one for one in asked if one.name not in scores}.values())
    with tqdm(total=len(asked), initial=len(asked) - len(missing), desc="Judging") as bar:
        for start in range(0, len(missing), judge.batch_size):
            batch = missing[start : start + judge.batch_size]
            judged = judge.compare([one.shown for one in batch])
            made = {one.name: list(pair[::-1] if one.order else pair) for one, pair in zip(batch, judged)}
            scores.update(made)
            if store is not None:
                store.append([{"id": name, "scores": pair} for name, pair in made.items()])
            bar.update(len(batch))
    return {(one.key, one.number, one.order): Judgement(*scores[one.name]) for one in asked}


def _readable(judgements: Iterable[Judgement]) -> list[Scores]:
    return [(own, other) for own, other in judgements if own is not None and other is not None]


def _summary(
    judged: Mapping[Any, Sequence[Sequence[Scores]]], pairs: Mapping[Any, Sequence[tuple[str, str]]], seed: int
) -> dict[str, Any]:
    outcomes = {key: [PairScores(*map(list, zip(*both))).hits for both in scores] for key, scores in judged.items()}
    compared = [both for scores in outcomes.values() for both in scores]
    every = [outcome for both in compared for outcome in both]
    lengths = _means(len, judged, pairs)
    repeated = _means(repeated_share, judged, pairs)
    return {
        **win_rate(
            [float(np.mean(scores)) for scores in outcomes.values()], (lengths[:, 0] - lengths[:, 1]).tolist(), seed
        ),
        "wins": every.count(1.0),
        "ties": every.count(0.5),
        "losses": every.count(0.0),
        "consistent": float(np.mean([len(set(both)) == 1 for both in compared])),
        "scores": [
            float(sum(pair[side] for scores in judged.values() for both in scores for pair in both)) for side in (0, 1)
        ],
        "length": lengths.mean(axis=0).tolist(),
        "repetition": with_interval(repeated[:, 0], seed=seed),
        "repetition_difference": with_interval(repeated[:, 0] - repeated[:, 1], seed=seed),
    }


def _at_equal_length(
    judged: Mapping[Any, Sequence[Sequence[Scores]]], pairs: Mapping[Any, Sequence[tuple[str, str]]], seed: int
) -> dict[str, Any]:
    """How rewards go with length among a model's answers to one question, and differences of rewards without it; nothing
    where each question has one answer, or all are of one length."""
    rewards = [np.array([both[0] for both in scores]) for scores in judged.values()]
    lengths = [np.log([[max(len(text), 1) for text in texts] for texts in pairs[key]]) for key in judged]
    # a baseline's one answer, which all are compared with, varies with nothing
    score, length = (
        np.concatenate([part - part.mean(axis=0) for part in parts]).ravel() for parts in (rewards, lengths)
    )
    if not (score @ score and length @ length):
        return {}
    slope = score @ length / (length @ length)
    differences = [
        np.mean((reward[:, 0] - reward[:, 1]) - slope * (each[:, 0] - each[:, 1]))
        for reward, each in zip(rewards, lengths)
    ]
    return {
        "length_correlation": float(score @ length / np.sqrt((score @ score) * (length @ length))),
        "reward_difference_at_equal_length": with_interval(differences, seed=seed),
    }


def _means(
    measure: Callable[[str], float], keys: Iterable[Any], pairs: Mapping[Any, Sequence[tuple[str, str]]]
) -> np.ndarray:
    """`[questions, 2]`: a measure of texts, as the mean over a question's answers and over its baseline's."""
    return np.array([np.mean([list(map(measure, texts)) for texts in pairs[key]], axis=0) for key in keys])
