# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Paraphrases of `benchmarks.paraphrase`: the likeliest of the beams, and the one chosen against nearness to the source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from generation_ext.granularity.metrics import sentence_bleu


class Candidate(NamedTuple):
    """A beam: its text, its log-likelihood by token, and its BLEU-4 against the source (0 to 1)."""

    text: str
    score: float
    near: float


@torch.inference_mode()
def candidates(
    model: Any, tokenizer: Any, texts: Sequence[str], num_beams: int, batch_size: int = 64
) -> list[list[Candidate]]:
    """All beams of each text, likeliest first; the first are what `generation_ext.paraphrase` gives."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    found: list[list[Candidate]] = [[] for _ in texts]
    limit = tokenizer.model_max_length
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer([texts[row] for row in rows], padding=True, truncation=True, return_tensors="pt")
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        output = model.generate(
            **inputs,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_length=limit,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        said = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        scores = output.sequences_scores.tolist() if num_beams > 1 else [0.0] * len(said)
        for number, (text, score) in enumerate(zip(said, scores)):
            row, text = rows[number // num_beams], text.strip()
            near = sentence_bleu(text.lower().split(), texts[row].lower().split(), 4)
            found[row].append(Candidate(text, score, near))
    return found


def chosen(beams: Sequence[Sequence[Candidate]], penalty: float) -> list[str]:
    """Of each text's beams the one of most log-likelihood by token less `penalty` times its nearness to the source."""
    return [max(each, key=lambda one: one.score - penalty * one.near).text for each in beams]
