# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Every generator answers every query (the first half of the paper's step 1)."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Union

from tqdm.auto import tqdm

from peft_ext.rows import Row, RowFile
from trl_ext.almost.config import ResponsesConfig
from trl_ext.almost.data import row_formats
from trl_ext.almost.data.queries import read_queries
from trl_ext.almost.prompts.roles import ASSISTANT_STOPS, assistant_prompt, clean_turn, load_style
from trl_ext.almost.writing.backends import Backend, Request
from trl_ext.almost.writing.generators import Generator, parse_generators
from trl_ext.almost.writing.loading import backend_of


def run(config: ResponsesConfig, queries: Union[str, os.PathLike], path: Union[str, os.PathLike]) -> dict[str, int]:
    """The stage: load the generators one after the other, and have them answer a file of queries; see
    [`write_responses`]."""
    return write_responses(lambda generator: backend_of(config, generator), config, read_queries(queries), path)


def write_responses(
    load: Callable[[Generator], Backend],
    config: ResponsesConfig,
    queries: Sequence[Row],
    path: Union[str, os.PathLike],
) -> dict[str, int]:
    """Answers of every generator to every query, as rows `{"id", "query_id", "rung", "query", "response"}`; `rung` is the
    generator's place in the config.

    Args:
        load: Loads what writes for a generator; called once for those beside each other of one model and width.
        config: See [`ResponsesConfig`].
        queries: Rows with `id` and `query`.
        path: The file, appended batch by batch, and brought into order at the end.

    Returns:
        How many answers there are, and how many of them empty.
    """
    generators = parse_generators(config.generators)
    file = RowFile(path, row_formats.response(len(generators)))
    with tqdm(total=len(generators) * len(queries), initial=len(file), desc="responses") as bar:
        for _, group in groupby(
            enumerate(generators), key=lambda pair: (pair[1].model, pair[1].bits, pair[1].group_size)
        ):
            alike = list(group)
            missing = [f"{query['id']}/{number}" not in file for number, _ in alike for query in queries]
            if not any(missing):
                continue
            backend = load(alike[0][1])
            for number, generator in alike:
                _answer(backend, config, generator, number, queries, file, bar)
            del backend
            gc.collect()
    file.sort(key=lambda row: (row["query_id"], row["rung"]))
    return {"responses": len(file), "empty": sum(not row["response"] for row in file.rows.values())}


def _answer(
    backend: Backend,
    config: ResponsesConfig,
    generator: Generator,
    number: int,
    queries: Sequence[Row],
    file: RowFile,
    bar: Any,
) -> None:
    style, tokenizer = load_style(generator.prompt), backend.tokenizer
    requests = [
        Request(
            f"responses/{number}/{query['id']}",
            assistant_prompt(tokenizer, query["query"], style, generator.shots, config.chat_format),
        )
        for query in queries
    ]
    sampling = config.sampling(
        max_new_tokens=generator.max_new_tokens or config.max_new_tokens,
        stop=ASSISTANT_STOPS,
    )
    ids = [f"{query['id']}/{number}" for query in queries]
    for batch in backend.stream(requests, sampling, done=lambda index: ids[index] in file):
        rows = [
            {
                "id": ids[index],
                "query_id": queries[index]["id"],
                "rung": number,
                "query": queries[index]["query"],
                "response": clean_turn(texts[0]),
            }
            for index, texts in batch
        ]
        bar.update(file.append(rows))
