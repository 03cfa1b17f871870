# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Who writes in tests: a backend that looks texts up, and tiny models with room for demonstrations of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from tests.tiny_tokenizer import byte_tokenizer


WORDS = "river stone lamp paper green seven music window bread cloud north garden silver table voice winter".split()


class Writer:
    """A backend whose texts are a function of request and sample; `batches` says what it was asked for."""

    def __init__(self, write: Callable[[str, int], str], batch_size: int = 4) -> None:
        self.write, self.batch_size, self.batches = write, batch_size, []
        self.tokenizer = byte_tokenizer()
        self.prompts = {}

    def stream(self, requests, sampling, done=lambda index: False):
        for start in range(0, len(requests), self.batch_size):
            places = range(start, min(start + self.batch_size, len(requests)))
            if all(map(done, places)):
                continue
            self.batches.append([requests[place].key for place in places])
            self.prompts.update({requests[place].key: requests[place].prompt for place in places})
            yield [(place, [self.write(requests[place].key, n) for n in range(sampling.samples)]) for place in places]

    def generate(self, requests, sampling):
        found = dict(pair for batch in self.stream(requests, sampling) for pair in batch)
        return [found[index] for index in range(len(requests))]


def sentence(key: str, number: int = 0, words: int = 12) -> str:
    """A sentence that depends on its key; two of different keys share few words in order."""
    digest = hashlib.sha256(f"{key}/{number}".encode()).digest()
    chosen = [WORDS[byte % len(WORDS)] for byte in digest[:words]]
    return " ".join(chosen).capitalize() + "."


def save_long_model(folder: Path, seed: int = 0, scores: bool = False) -> Path:
    """A tiny Llama on bytes with room for 4,096 of them, and its tokenizer; with `scores`, one that gives a score."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=4096,
            initializer_range=0.2,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            num_labels=1,
        )
        model = AutoModelForSequenceClassification.from_config(config) if scores else LlamaForCausalLM(config)
        model.save_pretrained(folder)
    return folder
