# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the rows are that stages of texts write, and later stages read."""

from __future__ import annotations

from peft_ext.file_formats import Field, list_of, number, one_of, text, whole


ID = one_of(whole(), text())
QUERY: dict[str, Field] = {"id": ID, "query": text()}
ROUND: dict[str, Field] = {"id": whole(0), "texts": list_of(text())}


def response(generators: int) -> dict[str, Field]:
    """An answer; `rung` is the place of one of so many generators."""
    return {
        "id": ID.or_missing(),
        "query_id": ID,
        "rung": whole(0, generators - 1),
        "query": text(),
        "response": text(),
    }


# `rewards`: for each answer in a conversation those of its candidates, null where one was empty.
DEMONSTRATION: dict[str, Field] = {"id": ID, "rewards": list_of(list_of(number().or_null()))}
# What a reward model as judge thinks of an answer; the id is of the question with it.
SCORE: dict[str, Field] = {"id": text(), "score": number()}
