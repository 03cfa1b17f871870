# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Self-play: a model plays a person and an assistant, and a reward model chooses the best of N answers at each turn (the
paper's step 2)."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import numpy as np
from tqdm.auto import tqdm

from peft_ext.rows import Row, RowFile
from trl_ext.almost.config import SelfPlayConfig
from trl_ext.almost.data.comparisons import heuristic_filter
from trl_ext.almost.data.queries import read_queries
from trl_ext.almost.data.row_formats import DEMONSTRATION
from trl_ext.almost.prompts.roles import (
    ASSISTANT_STOPS,
    OWN,
    OWN_STOPS,
    USER_STOPS,
    assistant_prompt,
    chosen_prompt,
    clean_turn,
    load_style,
    user_prompt,
    whole_sentences,
)
from trl_ext.almost.repetition import repeated_share
from trl_ext.almost.rewards import AnswerScorer, RewardModel
from trl_ext.almost.writing.backends import Backend, Request
from trl_ext.almost.writing.loading import backend_of


# A person's message is longer than this only if the model has fallen out of its role.
_LONGEST_USER_TURN = 500


def run(
    config: SelfPlayConfig,
    queries: Union[str, os.PathLike],
    path: Union[str, os.PathLike],
    reward_model: Optional[Union[str, os.PathLike]] = None,
) -> dict[str, Any]:
    """The stage: load who plays and, for several samples, who chooses, and play on a file of queries; see [`self_play`]."""
    rows, backend, reward = read_queries(queries), backend_of(config), None
    if config.samples > 1 and reward_model is not None:
        reward = RewardModel.from_pretrained(
            str(reward_model),
            dtype=config.reward_dtype,
            device=config.device,
            policy_tokenizer=backend.tokenizer,
            batch_size=config.reward_batch_size,
        ).score
    return self_play(backend, config, rows, path, reward)


def self_play(
    backend: Backend,
    config: SelfPlayConfig,
    queries: Sequence[Row],
    path: Union[str, os.PathLike],
    reward: Optional[AnswerScorer] = None,
) -> dict[str, Any]:
    """Demonstrations in TRL's chat format, as rows `{"id", "messages", "rewards"}`; `rewards` has N numbers for each answer:
    what it was chosen by, so less the penalty of its repetitions.

    Args:
        backend: Who plays both roles.
        config: See [`SelfPlayConfig`].
        queries: Rows with `id` and `query`, which the conversations begin with.
        path: The file, appended a batch of conversations at a time.
        reward: Chooses among the answers; not needed for `samples=1`.

    Returns:
        The assistant's prompt, counts, the share of repeated word 3-grams of the chosen answers, and the reward of the best of
        1 ... N, see [`reward_statistics`].

    Raises:
        ValueError: If there is no reward for several samples, a reward is NaN, or all conversations end without an answer.
    """
    if config.samples > 1 and reward is None:
        raise ValueError(f"samples={config.samples} needs a reward model to choose; pass one, or samples=1.")
    prompt, shots = chosen_prompt(backend.tokenizer, config.prompt, config.shots, config.chat_format)
    config = dataclasses.replace(config, prompt=prompt, shots=shots)
    queries = queries[: config.count]
    done, dropped = (
        RowFile(path, DEMONSTRATION),
        RowFile(f"{os.fspath(path)}.dropped"),
    )  # what came to nothing isn't tried again
    # of about equal length, so that a batch's prompts are; the same batches after a kill
    order = sorted(range(len(queries)), key=lambda index: (-len(queries[index]["query"]), index))
    with tqdm(total=len(queries), initial=len(done) + len(dropped), desc="self-play") as bar:
        for start in range(0, len(order), config.batch_size):
            batch = [queries[index] for index in order[start : start + config.batch_size]]
            if all(query["id"] in done or query["id"] in dropped for query in batch):
                continue
            talks = [_Conversation(query["id"], [_message("user", query["query"])]) for query in batch]
            _converse(backend, config, talks, reward)
            added = done.append([talk.row() for talk in talks if talk.rewards])
            added += dropped.append([{"id": talk.id} for talk in talks if not talk.rewards])
            bar.update(added)
    if queries and not len(done):
        raise ValueError(
            f"none of {len(queries)} conversations has an answer: the model wrote empty text; use another model or prompt."
        )
    done.sort(key=lambda row: row["id"])
    rows = list(done.rows.values())
    answers = sum(len(row["rewards"]) for row in rows)
    said = [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "assistant"]
    return {
        "prompt": prompt,
        "conversations": len(rows),
        "without an answer": len(dropped),
        "answers": answers,
        "repeated 3-grams": float(np.mean([repeated_share(text) for text in said])) if said else 0.0,
        "best of": reward_statistics(rows),
    }


def reward_statistics(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """What choosing gains.

    Args:
        rows: Of [`self_play`].

    Returns:
        For n = 1 ... N, the mean over all turns of the best reward of the first n answers, its standard error, and the
        mean's gain over n = 1.
    """
    rewards = np.array(
        [turn for row in rows for turn in row["rewards"] if all(r is not None for r in turn)], dtype=float
    )
    if not rewards.size:
        return {}
    best = np.maximum.accumulate(rewards, axis=1)
    error = best.std(axis=0, ddof=1) / math.sqrt(len(best)) if len(best) > 1 else np.zeros(best.shape[1])
    return {
        str(n + 1): {
            "mean": float(best[:, n].mean()),
            "standard_error": float(error[n]),
            "gain": float((best[:, n] - best[:, 0]).mean()),
        }
        for n in range(best.shape[1])
    }


@dataclass
class _Conversation:
    id: Any
    messages: list[dict[str, str]]
    rewards: list[list[Optional[float]]] = field(default_factory=list)
    over: bool = False

    def row(self) -> Row:
        # what the person said last, and nobody answered, teaches nothing
        last = max(index for index, message in enumerate(self.messages) if message["role"] == "assistant")
        return {"id": self.id, "messages": self.messages[: last + 1], "rewards": self.rewards}


def _converse(
    backend: Backend, config: SelfPlayConfig, talks: Sequence[_Conversation], reward: Optional[AnswerScorer]
) -> None:
    for turn in range(config.max_turns):
        open_talks = [talk for talk in talks if not talk.over]
        if turn:
            _ask(backend, config, open_talks, turn)
            open_talks = [talk for talk in open_talks if not talk.over]
        if not open_talks:
            return
        _answer(backend, config, open_talks, turn, reward)


def _answer(
    backend: Backend,
    config: SelfPlayConfig,
    talks: Sequence[_Conversation],
    turn: int,
    reward: Optional[AnswerScorer],
) -> None:
    style = load_style(config.prompt)
    prompts = [
        assistant_prompt(backend.tokenizer, talk.messages, style, config.shots or 0, config.chat_format)
        for talk in talks
    ]
    requests = [Request(f"assistant/{talk.id}/{turn}", prompt) for talk, prompt in zip(talks, prompts)]
    # a rule of dashes separates the demonstrations of the other prompts; in its own format a model may write one
    stops = OWN_STOPS if config.prompt == OWN else ASSISTANT_STOPS
    answers = backend.generate(requests, config.sampling(samples=config.samples, stop=stops))
    cleaned = [[clean_turn(text, stops) for text in texts] for texts in answers]
    if config.whole_sentences:  # before they are scored: what is chosen is what is learned
        cleaned = [[whole_sentences(text) for text in texts] for texts in cleaned]
    scores = _scores(talks, cleaned, reward, config.repetition_weight)
    for talk, texts, rewards in zip(talks, cleaned, scores):
        best = max(range(len(texts)), key=lambda n: _preference(texts[n], rewards[n], config.heuristic_filter))
        if not texts[best]:
            talk.over = True
            continue
        talk.messages.append(_message("assistant", texts[best]))
        talk.rewards.append(rewards)


def _preference(text: str, reward: Optional[float], filtered: bool) -> tuple[bool, bool, float]:
    """What orders a query's answers: those that aren't empty, then those whose looks are good, then by their reward."""
    return bool(text), not filtered or heuristic_filter(text) is None, -math.inf if reward is None else reward


def _scores(
    talks: Sequence[_Conversation],
    answers: Sequence[Sequence[str]],
    reward: Optional[AnswerScorer],
    repetition_weight: float,
) -> list[list[Optional[float]]]:
    """A number for each answer, less the penalty of its repetitions; None where it is empty, or nobody scores."""
    scores: list[list[Optional[float]]] = [[None] * len(texts) for texts in answers]
    scored = [(i, n) for i, texts in enumerate(answers) for n, text in enumerate(texts) if text]
    if reward is None or not scored:
        return scores
    values = reward([talks[i].messages for i, _ in scored], [answers[i][n] for i, n in scored])
    for (i, n), value in zip(scored, values):
        if math.isnan(value):
            raise ValueError(
                f"the reward model gave NaN for conversation {talks[i].id!r}, answer {answers[i][n][:80]!r}; nothing can be "
                "chosen by it. Train it anew, with a lower learning rate or in float32."
            )
        scores[i][n] = float(value) - repetition_weight * repeated_share(answers[i][n])
    return scores


def _ask(backend: Backend, config: SelfPlayConfig, talks: Sequence[_Conversation], turn: int) -> None:
    prompts = [user_prompt(backend.tokenizer, talk.messages, config.chat_format) for talk in talks]
    requests = [Request(f"user/{talk.id}/{turn}", prompt) for talk, prompt in zip(talks, prompts)]
    sampling = config.sampling(max_new_tokens=config.user_max_new_tokens, stop=USER_STOPS)
    for talk, texts in zip(talks, backend.generate(requests, sampling)):
        said = clean_turn(texts[0], USER_STOPS).split("\n\n")[0].strip()
        repeated = any(message["content"] == said for message in talk.messages)
        talk.over = not said or repeated or len(said) > _LONGEST_USER_TURN
        if not talk.over:
            talk.messages.append(_message("user", said))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
