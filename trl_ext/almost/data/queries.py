# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Mines queries: a model continues a list of ten, and filters keep what is well formed and new (the paper's step 0)."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Optional, Union

import numpy as np
from tqdm.auto import tqdm

from peft_ext.rows import Row, RowFile, read_rows, write_rows
from trl_ext.almost.config import QueriesConfig
from trl_ext.almost.data.rouge import RougeIndex
from trl_ext.almost.data.row_formats import QUERY as QUERY_ROW
from trl_ext.almost.data.row_formats import ROUND
from trl_ext.almost.prompts.roles import MINING_STOPS, QUERY, mining_prompt, seed_queries
from trl_ext.almost.writing.backends import Backend, Request
from trl_ext.almost.writing.loading import backend_of


EMPTY, FORMAT, SHORT, LONG, SIMILAR = "empty", "format", "short", "long", "similar"
FILTERS = (EMPTY, FORMAT, SHORT, LONG, SIMILAR)
_ENDS = (".", "?", "!", '"', "'", ")")
_ROLES = ("Human:", "Assistant:", QUERY, "User:", "<|")


def run(
    config: QueriesConfig, path: Union[str, os.PathLike], avoid: Iterable[Union[str, os.PathLike]] = ()
) -> dict[str, int]:
    """The stage: load who continues the lists, and mine; see [`mine_queries`].

    Args:
        config: See [`QueriesConfig`].
        path: The file to write.
        avoid: Files of queries that new ones must not be close to either.
    """
    others = [row["query"] for file in avoid for row in read_queries(file)]
    return mine_queries(backend_of(config), config, path, others)


def read_queries(path: Union[str, os.PathLike]) -> list[Row]:
    """The rows of a file of queries.

    Raises:
        FileNotFoundError: If it isn't there.
        ValueError: If a row lacks its `id` or `query`, or an id occurs twice; names the file and the row.
    """
    rows, ids = read_rows(path, fields=QUERY_ROW), set()
    for number, row in enumerate(rows, start=1):
        if row["id"] in ids:
            raise ValueError(f"{path}, row {number}: id {row['id']!r} occurs twice.")
        ids.add(row["id"])
    return rows


def mine_queries(
    backend: Backend, config: QueriesConfig, path: Union[str, os.PathLike], avoid: Iterable[str] = ()
) -> dict[str, int]:
    """Mine queries into a file of rows `{"id", "query"}`.

    What was generated is kept batch by batch beside it (`<name>.rounds.jsonl`), and filtered again after a kill; so the
    queries depend on the config alone.

    Args:
        backend: Who continues the lists.
        config: See [`QueriesConfig`].
        path: The file to write, whole, at the end.
        avoid: Queries that new ones must not be close to either, such as another run's.

    Returns:
        How many texts were generated and accepted, and what each filter dropped.

    Raises:
        ValueError: If batch after batch brings no new query; tells which filter dropped them.
    """
    path = Path(path)
    rounds = RowFile(path.with_suffix(".rounds.jsonl"), ROUND)
    miner = Miner(config, avoid)
    with tqdm(total=config.count, desc="queries") as bar:
        for number in itertools.count():
            if len(miner.queries) == config.count:
                break
            if number not in rounds:
                texts = backend.generate(
                    miner.requests(number), config.sampling(stop=MINING_STOPS, samples=config.samples)
                )
                rounds.append([{"id": number, "texts": [text for samples in texts for text in samples]}])
            miner.take(rounds.rows[number]["texts"])
            bar.update(len(miner.queries) - bar.n)
    write_rows(path, [{"id": number, "query": query} for number, query in enumerate(miner.queries)])
    return dict(miner.counts)


class Miner:
    """The queries so far, and the next lists to continue.

    Args:
        config: See [`QueriesConfig`].
        avoid: Queries that new ones must not be close to.
    """

    def __init__(self, config: QueriesConfig, avoid: Iterable[str] = ()) -> None:
        self.config = config
        self.seeds = seed_queries(config.seeds)
        self.queries: list[str] = []
        self.counts: Counter[str] = Counter({"generated": 0, "accepted": 0, **dict.fromkeys(FILTERS, 0)})
        self._index = RougeIndex(config.rouge_threshold, [*self.seeds, *avoid])
        self._fruitless = 0

    def requests(self, number: int) -> list[Request]:
        """The lists of a batch, each with shots of its own from the seeds and the queries so far."""
        pool = [*self.seeds, *self.queries]
        requests = []
        for list_number in range(max(1, self.config.batch_size // self.config.samples)):
            generator = np.random.default_rng([self.config.seed, number, list_number])
            chosen = generator.choice(len(pool), size=min(self.config.shots, len(pool)), replace=False)
            prompt = mining_prompt([pool[index] for index in chosen])
            requests.append(Request(f"queries/{number}/{list_number}", prompt))
        return requests

    def take(self, texts: Sequence[str]) -> None:
        """Filter what a batch brought."""
        before = len(self.queries)
        for text in texts:
            if len(self.queries) == self.config.count:
                return
            self.counts["generated"] += 1
            query = first_query(text)
            reason = form_filter(query, self.config) or (SIMILAR if self._index.has_similar(query) else None)
            if reason is not None:
                self.counts[reason] += 1
                continue
            self.counts["accepted"] += 1
            self.queries.append(query)
            self._index.add(query)
        self._fruitless = 0 if len(self.queries) > before else self._fruitless + 1
        if self._fruitless >= self.config.patience:
            raise ValueError(self._stuck())

    def _stuck(self) -> str:
        dropped = {name: self.counts[name] for name in FILTERS}
        most = max(dropped, key=lambda name: dropped[name])
        return (
            f"{self._fruitless} batches in a row brought no new query ({self.counts['accepted']} of {self.config.count} were "
            f"found in {self.counts['generated']} texts). Dropped: "
            + ", ".join(f"{name} {count}" for name, count in dropped.items())
            + f". Most fell to the filter {most!r}; use a stronger model, a higher temperature, other seeds"
            + (", or a higher rouge_threshold." if most == SIMILAR else ".")
        )


def first_query(text: str) -> str:
    """The first query of a continuation, on one line."""
    line = text.strip().split("\n", 1)[0].split(QUERY, 1)[0]
    return " ".join(line.split()).strip('"').strip()


def form_filter(query: str, config: QueriesConfig) -> Optional[str]:
    """Why a query is dropped for its form; None if it isn't."""
    if not query:
        return EMPTY
    if any(mark in query for mark in _ROLES) or not any(character.isalpha() for character in query):
        return FORMAT
    if len(query) < config.min_chars and not query.endswith(_ENDS):
        return SHORT
    return LONG if len(query) > config.max_chars else None
