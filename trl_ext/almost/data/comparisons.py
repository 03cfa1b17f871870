# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Comparisons: of two answers, that of the generator of the better rank is preferred, where length and looks agree (the second
half of the paper's step 1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from peft_ext.rows import Row, read_rows, write_rows
from trl_ext.almost.config import ComparisonsConfig
from trl_ext.almost.data import row_formats
from trl_ext.almost.rewards import AnswerScorer, RewardModel
from trl_ext.almost.writing.generators import parse_generators


FEW_CHARS = 50
TRAINING, HELDOUT = "comparisons.jsonl", "comparisons.heldout.jsonl"
# Reasons of the heuristic filter.
BAD = ("short", "ends open", "begins with well", "no full stop", "does not know", "another turn", "image")


class Pair(NamedTuple):
    """Places of a better and a worse answer."""

    better: int
    worse: int


def heuristic_filter(response: str) -> Optional[str]:
    """Why an answer is bad by its looks, one of [`BAD`]; None if it isn't (the rules of the authors' code)."""
    text, lower = response.strip(), response.strip().lower()
    if "Human:" in text:
        return "another turn"
    if "<Image>" in text:
        return "image"
    if len(text) < FEW_CHARS:
        return "short"
    if text.endswith(("?", ":")):
        return "ends open"
    if lower.startswith("well"):
        return "begins with well"
    if "don't know" in lower or "do not know" in lower:
        return "does not know"
    return None if text.endswith((".", "!")) else "no full stop"


def pair_up(
    ranks: Sequence[int],
    lengths: Sequence[int],
    everything: Sequence[int],
    length_aware: bool = True,
    max_length_ratio: Optional[float] = None,
) -> list[Pair]:
    """Pairs of one query's answers.

    Each answer, from the best rank on, is preferred to the first of a lower rank that no better one has taken, if it isn't
    shorter, or not much shorter than usual (the mean less half a standard deviation).

    Args:
        ranks: 0 best.
        lengths: In characters.
        everything: Lengths of all answers to the query, dropped ones too.
        length_aware: Without it, length doesn't matter.
        max_length_ratio: Answers of which one is more than so many times as long as the other aren't compared; None: they are.

    Returns:
        At most one pair less than there are answers.
    """
    order = sorted(range(len(ranks)), key=lambda index: ranks[index])
    usual = float(np.mean(everything) - np.std(everything) / 2) if len(everything) else 0.0
    taken: set[int] = set()
    pairs = []
    for better in order:
        for worse in order:
            if ranks[worse] <= ranks[better] or worse in taken:
                continue
            if max_length_ratio is not None and _ratio(lengths[better], lengths[worse]) > max_length_ratio:
                continue
            if not length_aware or lengths[better] >= lengths[worse] or lengths[better] >= usual:
                pairs.append(Pair(better, worse))
                taken.add(worse)
                break
    return pairs


def _ratio(one: int, other: int) -> float:
    return max(one, other) / max(min(one, other), 1)


def run(config: ComparisonsConfig, generators: Sequence[Any], responses: Path, folder: Path) -> dict[str, int]:
    """The stage: a file of answers becomes the files of comparisons in a folder; see [`build_comparisons`]."""
    reward = None
    if config.as_is_reward_model:
        reward = RewardModel.from_pretrained(
            config.as_is_reward_model, device=config.device, batch_size=config.reward_batch_size
        ).score
    rows = read_rows(responses, fields=row_formats.response(len(generators)))
    rows, counts = build_comparisons(rows, generators, config, reward)
    return {**counts, **write_comparisons(rows, folder, config)}


def build_comparisons(
    responses: Sequence[Row],
    generators: Sequence[Any],
    config: ComparisonsConfig,
    reward: Optional[AnswerScorer] = None,
) -> tuple[list[Row], dict[str, int]]:
    """Comparisons in TRL's preference format.

    Args:
        responses: Rows of [`responses.write_responses`].
        generators: Who they come from, see [`parse_generators`].
        config: See [`ComparisonsConfig`].
        reward: The as-is reward model; a pair that it ranks the other way round is dropped.

    Returns:
        Rows `{"id", "query_id", "prompt", "chosen", "rejected", "rungs"}`, and what each filter dropped.

    Raises:
        ValueError: If no pair is left; tells which filter dropped how many.
    """
    ranks = [generator.rank or 0 for generator in parse_generators(generators)]
    counts: Counter[str] = Counter({"responses": len(responses)})
    rows: list[Row] = []
    ordered = sorted(responses, key=lambda row: (row["query_id"], row["rung"]))
    for query, group in groupby(ordered, key=lambda row: row["query_id"]):
        answers = list(group)
        kept = [row for row in answers if not _is_bad(row["response"], config.heuristic_filter, counts)]
        lengths = [len(row["response"]) for row in kept]
        everything = [len(row["response"]) for row in answers]
        pairs = pair_up(
            [ranks[row["rung"]] for row in kept], lengths, everything, config.length_aware, config.max_length_ratio
        )
        possible = max(len({ranks[row["rung"]] for row in kept}) - 1, 0)
        counts["pairs that length dropped"] += max(possible - len(pairs), 0)
        rows += [_comparison(query, kept[pair.better], kept[pair.worse], config.conversational) for pair in pairs]
    counts["pairs"] = len(rows)
    if reward is not None and rows:
        rows = _agreed(rows, reward)
        counts["pairs that the as-is reward model dropped"] = counts["pairs"] - len(rows)
    counts["comparisons"] = len(rows)
    if not rows:
        raise ValueError(_nothing_left(counts))
    return rows, dict(counts)


def write_comparisons(rows: Sequence[Row], folder: Path, config: ComparisonsConfig) -> dict[str, int]:
    """Split comparisons by query into `comparisons.jsonl` and `comparisons.heldout.jsonl`.

    Returns:
        How many rows each has.

    Raises:
        ValueError: If a part that the config asks for would be empty.
    """
    queries = list(dict.fromkeys(row["query_id"] for row in rows))
    order = [queries[index] for index in np.random.default_rng(config.seed).permutation(len(queries))]
    count = round(config.heldout_share * len(order))
    heldout = set(order[:count])
    if count == len(order) or (config.heldout_share and not count):
        raise ValueError(
            f"there are comparisons of {len(order)} queries only, too few to hold out heldout_share="
            f"{config.heldout_share} of them; mine more queries."
        )
    parts = {
        HELDOUT: [row for row in rows if row["query_id"] in heldout],
        TRAINING: [row for row in rows if row["query_id"] not in heldout],
    }
    for name, part in parts.items():
        write_rows(folder / name, part)
    return {name: len(part) for name, part in parts.items()}


def _is_bad(response: str, asked: bool, counts: Counter[str]) -> bool:
    reason = "empty" if not response.strip() else heuristic_filter(response) if asked else None
    if reason is not None:
        counts[f"bad: {reason}"] += 1
    return reason is not None


def _comparison(query: Any, better: Row, worse: Row, conversational: bool) -> Row:
    def turn(role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if conversational else text

    return {
        "id": f"{query}/{better['rung']}>{worse['rung']}",
        "query_id": query,
        "prompt": turn("user", better["query"]),
        "chosen": turn("assistant", better["response"]),
        "rejected": turn("assistant", worse["response"]),
        "rungs": [better["rung"], worse["rung"]],
    }


def text_of(value: Any) -> str:
    """The text of a turn, whether it is one message or plain."""
    return str(value[-1]["content"]) if isinstance(value, list) else str(value)


def _agreed(rows: Sequence[Row], reward: AnswerScorer) -> list[Row]:
    prompts = [row["prompt"] for row in rows]
    scores = reward([*prompts, *prompts], [text_of(row[side]) for side in ("chosen", "rejected") for row in rows])
    return [row for index, row in enumerate(rows) if scores[index] > scores[index + len(rows)]]


def _nothing_left(counts: Mapping[str, int]) -> str:
    dropped = {name: count for name, count in counts.items() if count and ("bad" in name or "dropped" in name)}
    most = max(dropped, key=lambda name: dropped[name], default="the ranks, of which no two have an answer")
    listed = ", ".join(f"{name} {count}" for name, count in dropped.items()) or "nothing"
    return (
        f"no comparison is left of {counts['responses']} answers. Dropped: {listed}. Most fell to {most!r}; use stronger "
        "generators, a larger max_new_tokens, or turn that filter off."
    )
