# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks of in-context methods share: labelled examples of a task, and a tiny model that reads bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.core.run import data_folder
from generation_ext.in_context import TASKS, Task
from peft_ext.rows import read_rows


AG_NEWS = Task(
    name="ag_news",
    template="Article : {text}\nTopic :",
    labels={"World": " World", "Sports": " Sports", "Business": " Business", "Sci/Tech": " Science and technology"},
)
# What the fields of the built-in pair tasks are called in the data.
_COLUMNS = {"premise": "text_a", "hypothesis": "text_b"}


# Data sets as pages call them.
TITLES = {"sst2": "SST-2", "sst5": "SST-5", "ag_news": "AG News", "snips": "SNIPS", "rte": "RTE", "cb": "CB"}
TITLES |= {"banking77": "Banking77", "clinc150": "CLINC150"}


class Example(NamedTuple):
    """A labelled input."""

    fields: dict[str, str]
    label: str


def task_named(name: str) -> Task:
    """A task by its data set's name."""
    return {**TASKS, AG_NEWS.name: AG_NEWS}[name]


def read_examples(task: Task, split: str, seed: int = 0) -> list[Example]:
    """All labelled examples of a split, in random order.

    Raises:
        NotHere: If the data set isn't there.
    """
    rows = read_rows(data_folder(task.name) / f"{split}.jsonl")
    fields = {field: _COLUMNS.get(field, field) for field in task.fields}
    examples = [Example({field: row[column] for field, column in fields.items()}, row["label"]) for row in rows]
    random.Random(seed).shuffle(examples)
    return examples


def smoke_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A tiny random Llama and its tokenizer, whose tokens are bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<eos>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def smoke_task(name: str) -> Task:
    """The task, with shorter texts to generate."""
    return replace(task_named(name), max_new_tokens=4, min_new_tokens=2)


def smoke_examples(task: Task, count: int, seed: int = 0) -> list[Example]:
    """Short texts with labels."""
    chosen, labels = random.Random(seed), list(task.labels)
    return [
        Example({field: f"text {chosen.randrange(100)}" for field in task.fields}, labels[i % len(labels)])
        for i in range(count)
    ]


def accuracy(predictions: Sequence[str], examples: Sequence[Example]) -> float:
    """Percent."""
    return 100 * sum(found == example.label for found, example in zip(predictions, examples)) / len(examples)


def demonstrations(examples: Sequence[Example]) -> list[tuple[Any, str]]:
    """Examples as the scorer takes them."""
    return [(example.fields, example.label) for example in examples]
