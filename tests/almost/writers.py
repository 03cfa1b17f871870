# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Who writes in tests: a backend that looks texts up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from tests.tiny.tokenizers import byte_tokenizer


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
