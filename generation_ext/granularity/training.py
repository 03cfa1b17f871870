# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Training paraphrase models from pairs of texts with transformers' Seq2SeqTrainer, and writing paraphrases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from peft_ext.language_model import check_tokens, start_token
from peft_ext.token_mean import TokenMeanLoss


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Mapping[str, str]],
    max_length: Optional[int] = None,
    start: Optional[int] = None,
) -> Dataset:
    """Token ids of sources and targets, cut to `max_length` (None: the tokenizer's).

    A target's labels begin with what the decoder writes first: its first word, where it reads [CLS] before that. (The
    paper's released code never learns the first word, and generates from a [CLS] that it hasn't seen in training.)

    Args:
        tokenizer: Gives [CLS] text [SEP], as C-DNPG's does, or what the model's family has.
        pairs: With `source` and `target`.
        max_length: Most tokens of each, the special ones included.
        start: What the decoder begins with, see [`peft_ext.language_model.start_token`]; None: the tokenizer's [CLS]. A
            target that the tokenizer begins with that very token loses it.

    Raises:
        ValueError: If there are none, or one lacks a text; names it.
    """
    if not pairs:
        raise ValueError("there are no pairs of texts.")
    for number, pair in enumerate(pairs):
        for name in ("source", "target"):
            if not str(pair.get(name) or "").strip():
                raise ValueError(f"pair {number} has an empty {name}: {dict(pair)!r}.")
    options: dict[str, Any] = {"truncation": True, "max_length": max_length or tokenizer.model_max_length}
    sources, targets = (
        tokenizer([pair[name] for pair in pairs], **options)["input_ids"] for name in ("source", "target")
    )
    start = tokenizer.cls_token_id if start is None else start
    return Dataset.from_dict({"input_ids": sources, "labels": [ids[ids[:1] == [start] :] for ids in targets]})


class PairsTrainer(TokenMeanLoss, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer whose loss is the same however a batch is divided among processes and accumulated steps
    (stock BART's comes out multiplied by both)."""


def paraphrase_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: Seq2SeqTrainingArguments,
    train_pairs: Sequence[Mapping[str, str]],
    eval_pairs: Optional[Sequence[Mapping[str, str]]] = None,
) -> Seq2SeqTrainer:
    """A trainer of an encoder-decoder model on pairs; its evaluation loss is that of `eval_pairs`."""
    start = start_token(model)
    train_dataset = encode_pairs(tokenizer, train_pairs, start=start)
    check_tokens(model, (row["input_ids"] + row["labels"] for row in train_dataset), tokenizer, "pair")
    return PairsTrainer(
        model,
        args,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=train_dataset,
        eval_dataset=encode_pairs(tokenizer, eval_pairs, start=start) if eval_pairs else None,
        processing_class=tokenizer,
    )


@torch.inference_mode()
def paraphrase(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 32,
    num_beams: int = 8,
    **generate_kwargs: Any,
) -> list[str]:
    """Paraphrases of texts, in their order.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        texts: What to say otherwise; they, and the paraphrases, have at most the tokenizer's `model_max_length` tokens.
        batch_size: Texts at a time; sorted by length.
        num_beams: The paper's 8.
        generate_kwargs: For `generate`.

    Raises:
        ValueError: If a text is empty; names it.
    """
    empty = next((number for number, text in enumerate(texts) if not text.strip()), None)
    if empty is not None:
        raise ValueError(f"text {empty} is empty: there is nothing to paraphrase.")
    limit = tokenizer.model_max_length
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    paraphrases = [""] * len(texts)
    generate: Any = model.generate
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch: Any = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        ids = generate(**batch, num_beams=num_beams, max_length=limit, **{"do_sample": False, **generate_kwargs})
        for row, text in zip(rows, tokenizer.batch_decode(ids, skip_special_tokens=True)):
            paraphrases[row] = text.strip()
    return paraphrases
