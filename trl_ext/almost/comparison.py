# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Pairwise win rate of one model's answers against another's: both orders, ties, intervals, length taken out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from trl_ext.almost.chat import HUMAN, request_text
from trl_ext.almost.generation import Request, TransformersBackend
from trl_ext.almost.judges import Judge, Judgement
from trl_ext.almost.statistics import win_rate, with_interval
from trl_ext.almost.store import RowFile
from trl_ext.almost.token_sampling import Sampling


# Of the answer and of the baseline.
Scores = tuple[float, float]


def write_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[Any, str],
    path: Path,
    sampling: Optional[Sampling] = None,
    batch_size: int = 16,
) -> dict[Any, str]:
    """A model's answers to questions, written to a file of rows as they come; those that are there aren't made again.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        questions: Ids and questions.
        path: A .jsonl file of `id`, `query` and `response`.
        sampling: How to draw; None: the paper's temperature 0.7 and at most 1,024 tokens.
        batch_size: Answers that are written side by side.

    Returns:
        The ids and answers.
    """
    sampling = sampling or Sampling(temperature=0.7, top_p=1.0, max_new_tokens=1024, stop=(HUMAN,))
    rows = RowFile(path)
    keys = list(questions)
    backend = TransformersBackend(model, tokenizer, batch_size)
    requests = [Request(str(key), request_text(tokenizer, questions[key])) for key in keys]
    with tqdm(total=len(keys), desc="Answers", initial=len(rows)) as bar:
        for batch in backend.stream(requests, sampling, done=lambda index: keys[index] in rows):
            made = [{"id": keys[i], "query": questions[keys[i]], "response": texts[0].strip()} for i, texts in batch]
            bar.update(rows.append(made))
    return {key: rows.rows[key]["response"] for key in keys}


def compare(
    questions: Mapping[Any, str],
    answers: Mapping[Any, str],
    baseline: Mapping[Any, str],
    judge: Judge,
    path: Optional[Path] = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge answers against a baseline's.

    Each question is judged in both orders (once, if the judge says that the order can't matter). A question's win is the
    share of its judgements that prefer the answer, a tie counting half; questions without a readable judgement in each
    order are left out and counted.

    Args:
        questions: Ids and questions.
        answers: Ids and answers.
        baseline: Ids and the baseline's answers.
        judge: Who judges.
        path: A .jsonl file to keep judgements in; those that are there aren't asked for again.
        seed: Of the bootstrap.

    Returns:
        `win_rate` and `length_controlled` (see `statistics.win_rate`), counts of judgements (`wins`, `ties`, `losses`),
        `consistent` (share of questions on which both orders agree), `scores` (sums), `length` (means, in characters)
        and `unreadable` (questions left out); of a reward model also the mean `reward` and the mean `reward_difference`
        to the baseline, with their intervals.

    Raises:
        ValueError: If an answer is missing, or no judgement can be read.
    """
    for name, given in (("answers", answers), ("baseline", baseline)):
        missing = [key for key in questions if key not in given]
        if missing:
            raise ValueError(f"{name} lacks question {missing[0]!r} ({len(missing)} of {len(questions)} are missing).")
    store = RowFile(path) if path is not None else None
    judged: dict[Any, list[Scores]] = {}
    for key in tqdm(questions, desc="Judging"):
        texts = (questions[key], answers[key], baseline[key])
        orders = range(1 if judge.symmetric else 2)
        both = [_judgement(store, key, judge, texts, order) for order in orders]
        readable = [(own, other) for own, other in both if own is not None and other is not None]
        if len(readable) == len(both):
            judged[key] = readable
    if not judged:
        raise ValueError(f"none of the judge's {len(questions)} judgements can be read.")
    result = {**_summary(judged, answers, baseline, seed), "unreadable": len(questions) - len(judged)}
    if judge.symmetric:  # its scores are numbers of their own, not marks for one answer beside the other
        rewards = np.array([both[0] for both in judged.values()])
        result["reward"] = with_interval(rewards[:, 0], seed=seed)
        result["reward_difference"] = with_interval(rewards[:, 0] - rewards[:, 1], seed=seed)
    return result


def _judgement(store: Optional[RowFile], key: Any, judge: Judge, texts: tuple[str, str, str], order: int) -> Judgement:
    """Scores of the answer and of the baseline, in this order, whichever was shown first."""
    digest = hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()[:16]
    name = f"{key}/{order}/{digest}"  # other answers get other judgements
    if store is not None and name in store:
        return Judgement(*store.rows[name]["scores"])
    question, answer, baseline = texts
    shown = (baseline, answer) if order else (answer, baseline)
    scores = judge.compare(question, *shown)
    if order:
        scores = Judgement(scores.second, scores.first)
    if store is not None:
        store.append([{"id": name, "scores": list(scores)}])
    return scores


def _summary(
    judged: Mapping[Any, Sequence[Scores]], answers: Mapping[Any, str], baseline: Mapping[Any, str], seed: int
) -> dict[str, Any]:
    outcomes = {key: [_outcome(scores) for scores in both] for key, both in judged.items()}
    every = [outcome for both in outcomes.values() for outcome in both]
    lengths = np.array([[len(answers[key]), len(baseline[key])] for key in judged], dtype=np.float64)
    return {
        **win_rate(
            [float(np.mean(both)) for both in outcomes.values()], (lengths[:, 0] - lengths[:, 1]).tolist(), seed
        ),
        "wins": every.count(1.0),
        "ties": every.count(0.5),
        "losses": every.count(0.0),
        "consistent": float(np.mean([len(set(both)) == 1 for both in outcomes.values()])),
        "scores": [float(sum(scores[side] for both in judged.values() for scores in both)) for side in (0, 1)],
        "length": lengths.mean(axis=0).tolist(),
    }


def _outcome(scores: Scores) -> float:
    return float((scores[0] > scores[1]) + 0.5 * (scores[0] == scores[1]))
