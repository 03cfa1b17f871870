# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A teacher's distributions on disk: for every supervised token the `top_k` likeliest tokens, and the rest's probability.

The folder holds `cache.json` (what it was made from), shards `logits-00000.safetensors`, and `complete.json` once all are there.
A shard is written whole, with its digest; a killed process goes on behind the last one.

A text is found by its tokens and by which of them are supervised, not by its place in the data: order, batches, packing and
the number of processes are of no matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from tqdm.auto import tqdm

from peft_ext.distillation.loss import Outcomes
from peft_ext.distillation.teacher import LiveTeacher, LiveTeaching, supervised
from peft_ext.examples import IGNORED, Example
from peft_ext.perplexity import padded
from peft_ext.runs import RunFolder, read_settings
from peft_ext.tensor_files import check_digest, open_tensors, write_tensors


DEFAULT_TOP_K = 64
_FORMAT = 1
_SETTINGS, _COMPLETE, _ARGUMENT = "cache.json", "complete.json", "teacher_logits"
_KEY_BYTES = 16
_STORED = ("log_probs", "rest", "indices")
# Numbers of a shard: 6 bytes each.
_SHARD_NUMBERS = 2**24
# Tokens that a teacher reads at once.
_BATCH_TOKENS = 4096


class _Place(NamedTuple):
    """Where a text's tokens are."""

    shard: Path
    start: int
    stop: int


def texts_of(inputs: Mapping[str, Any]) -> list[Example]:
    """The texts of a batch as a collator makes it: padding is left out, and rows of several texts (padding-free, packed) are cut
    where `position_ids` begin anew. Of each, the labels say which tokens are supervised; texts without one are left out.

    Raises:
        ValueError: If the first token of a packed text is supervised: what stands before it is another text.
    """
    ids, labels = inputs["input_ids"].cpu(), inputs["labels"].cpu()
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.dim() != 2 else mask.cpu().bool()
    if positions is None or positions.dim() != 2:
        begins = torch.zeros_like(kept)
    else:
        begins = positions.cpu().expand_as(ids) == 0
    found = []
    for row in range(len(ids)):
        tokens, targets, cuts = (each[row][kept[row]] for each in (ids, labels, begins))
        if not len(tokens):
            continue
        starts = sorted({0, *cuts.nonzero().flatten().tolist()})
        if any(targets[start] != IGNORED for start in starts[1:]):
            raise ValueError(
                "teacher_logits: a packed text's first token is supervised, but it follows another text; let the collator "
                "set its label to -100, as TRL's does."
            )
        for start, stop in zip(starts, [*starts[1:], len(tokens)]):
            example = Example(tokens[start:stop].tolist(), targets[start:stop].tolist())
            if example.trained:
                found.append(example)
    return found


def key_of(example: Example) -> bytes:
    """What a text is found by."""
    trained = [label != IGNORED for label in example.labels[1:]]
    content = np.asarray(example.input_ids, np.int64).tobytes() + np.packbits(trained).tobytes()
    return hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()


def data_digest(examples: Iterable[Example]) -> str:
    """Of all texts together, in whatever order."""
    found = hashlib.sha256()
    for key in sorted({key_of(example) for example in examples}):
        found.update(key)
    return found.hexdigest()[:32]


def tokenizer_digest(tokenizer: Any) -> Optional[str]:
    """Of a tokenizer's vocabulary; None without one."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not hasattr(tokenizer, "get_vocab"):
        return None
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:32]


class CachedLogits:
    """The folder of a cache.

    Args:
        folder: `--teacher_logits`.
        teacher: Its digest, see `teacher.teacher_digest`; None: what the folder says.
        tokenizer: Its digest.
        data: The digest of the texts, see [`data_digest`].
        vocabulary: Size of the student's.
        temperature: Of the objective; the rest's probability depends on it.
        top_k: Tokens that are kept for each; the whole vocabulary at most.

    Raises:
        FileExistsError: If the folder holds something else, or a cache of other things; names what differs.
        ValueError: If `top_k` is below 1; or no teacher is given, and the cache isn't complete.
    """

    def __init__(
        self,
        folder: Union[str, Path],
        *,
        teacher: Optional[str],
        tokenizer: Optional[str],
        data: str,
        vocabulary: int,
        temperature: float = 1.0,
        top_k: int = DEFAULT_TOP_K,
    ) -> None:
        if top_k < 1:
            raise ValueError(f"teacher_top_k={top_k} must be at least 1.")
        self._run = RunFolder(folder, _SETTINGS, _COMPLETE, _ARGUMENT)
        self.top_k, self.temperature, self.vocabulary = min(top_k, vocabulary), temperature, vocabulary
        stored = read_settings(self._run.path(_SETTINGS)) or {}
        self.settings = {
            "format": _FORMAT,
            "teacher": stored.get("teacher") if teacher is None else teacher,
            "tokenizer": tokenizer,
            "data": data,
            "vocabulary": vocabulary,
            "temperature": temperature,
            "top_k": self.top_k,
        }
        self.complete = self._run.check(self.settings) is not None
        if teacher is None and not self.complete:
            raise ValueError(
                f"teacher_logits={str(folder)!r} is not complete, so a teacher is needed; name it (teacher_model, --teacher)."
            )
        self._places: dict[bytes, _Place] = {}
        self._shards_read: set[Path] = set()

    def fill(self, teacher: LiveTeacher, examples: Sequence[Example], progressbar: bool = True) -> None:
        """Add the distributions of texts that aren't there yet, and mark the cache complete.

        Raises:
            ValueError: If the teacher has another vocabulary than the student.
            BlockingIOError: If another process fills it.
        """
        if teacher.vocabulary != self.vocabulary:
            raise ValueError(
                f"teacher_model has a vocabulary of {teacher.vocabulary:,} tokens, the student of {self.vocabulary:,}; a teacher "
                "needs the student's own."
            )
        self._run.start(self.settings)
        self._read()
        missing = {key_of(example): example for example in examples}
        missing = {key: example for key, example in missing.items() if key not in self._places}
        ordered = sorted(missing.items(), key=lambda item: len(item[1].input_ids))
        pending: list[tuple[bytes, dict[str, torch.Tensor]]] = []
        number = sum(1 for _ in self._shards())
        for batch in tqdm(_batches(ordered), desc="Teacher's logits", disable=not progressbar, leave=False):
            pending += self._of_batch(teacher, batch)
            if sum(kept["indices"].numel() for _, kept in pending) >= _SHARD_NUMBERS:
                self._write(number, pending)
                number, pending = number + 1, []
        if pending:
            self._write(number, pending)
        self._run.finish({"texts": len(self._places)})
        self.complete = True
        self._read()

    def of(self, inputs: Mapping[str, Any]) -> CachedTeaching:
        """The distributions of a batch.

        Raises:
            ValueError: If a text of it isn't in the cache.
        """
        if not self._places:
            self._read()
        places = [self._place(example) for example in texts_of(inputs)]
        with ExitStack() as opened:
            files = {shard: opened.enter_context(open_tensors(shard)) for shard in {place.shard for place in places}}
            parts = [
                [files[place.shard].get_slice(name)[place.start : place.stop] for name in _STORED] for place in places
            ]
        device = inputs["labels"].device
        if not parts:
            empty = torch.zeros(0, self.top_k, device=device)
            return CachedTeaching(empty, torch.zeros_like(empty, dtype=torch.long))
        log_probs, rest, indices = (torch.cat(each).to(device) for each in zip(*parts))
        log_probs = log_probs.float()
        if self.top_k < self.vocabulary:
            log_probs = torch.cat([log_probs, rest[:, None]], 1)
        # rounded numbers sum to nearly 1
        return CachedTeaching(log_probs.log_softmax(-1), indices.long())

    def _place(self, example: Example) -> _Place:
        place = self._places.get(key_of(example))
        if place is None:
            raise ValueError(
                f"teacher_logits={str(self._run.folder)!r} lacks a text of the batch (it begins with the tokens "
                f"{example.input_ids[:8]}): it was made of other data, or of other labels. Make a new one."
            )
        return place

    def _of_batch(
        self, teacher: LiveTeacher, batch: Sequence[tuple[bytes, Example]]
    ) -> list[tuple[bytes, dict[str, torch.Tensor]]]:
        inputs = padded([example for _, example in batch])
        counts = supervised(inputs["labels"]).sum(1).tolist()
        kept = _likeliest(teacher.of(inputs), self.top_k)
        split = {name: tensor.split(counts) for name, tensor in kept.items()}
        return [(key, {name: parts[row] for name, parts in split.items()}) for row, (key, _) in enumerate(batch)]

    def _shards(self) -> list[Path]:
        return sorted(self._run.folder.glob("logits-*.safetensors"))

    def _write(self, number: int, pending: list[tuple[bytes, dict[str, torch.Tensor]]]) -> None:
        names = pending[0][1]
        tensors = {name: torch.cat([kept[name] for _, kept in pending]) for name in names}
        tensors["lengths"] = torch.tensor([len(kept["rest"]) for _, kept in pending])
        tensors["keys"] = torch.tensor([list(key) for key, _ in pending], dtype=torch.uint8)
        path = self._run.path(f"logits-{number:05}.safetensors")
        write_tensors(path, tensors)
        self._add(path)

    def _read(self) -> None:
        for path in self._shards():
            if path not in self._shards_read:
                check_digest(path)
                self._add(path)

    def _add(self, path: Path) -> None:
        with open_tensors(path) as file:
            keys, lengths = file.get_tensor("keys"), file.get_tensor("lengths")
        self._shards_read.add(path)
        stop = 0
        for key, length in zip(keys.tolist(), lengths.tolist()):
            self._places[bytes(key)] = _Place(path, stop, stop + length)
            stop += length


class CachedTeaching:
    """Distributions that were read, of the supervised tokens of a batch.

    Args:
        log_probs: `[tokens, k]`, or `[tokens, k + 1]` with the rest.
        indices: `[tokens, k]`.
    """

    def __init__(self, log_probs: torch.Tensor, indices: torch.Tensor) -> None:
        self.log_probs, self.indices = log_probs, indices

    def __len__(self) -> int:
        return len(self.log_probs)

    def __getitem__(self, tokens: slice) -> Outcomes:
        return Outcomes(self.log_probs[tokens], self.indices[tokens])


def _batches(items: Sequence[tuple[bytes, Example]]) -> list[Sequence[tuple[bytes, Example]]]:
    """Of texts that grow longer: at most so many tokens, or one text."""
    found, start = [], 0
    for stop in range(1, len(items) + 1):
        longest = len(items[min(stop, len(items) - 1)][1].input_ids)
        if stop == len(items) or (stop + 1 - start) * longest > _BATCH_TOKENS:
            found.append(items[start:stop])
            start = stop
    return found


def _likeliest(teaching: LiveTeaching, top_k: int, at_once: int = 256) -> dict[str, torch.Tensor]:
    """The likeliest tokens of every distribution, and the logarithm of the rest's probability; on the CPU, as it is stored."""
    parts: dict[str, list[torch.Tensor]] = {"log_probs": [], "indices": [], "rest": []}
    for start in range(0, len(teaching), at_once):
        log_probs = teaching[slice(start, start + at_once)].log_probs
        values, indices = log_probs.topk(top_k)
        rest = log_probs.scatter_(1, indices, -torch.inf).logsumexp(-1)
        parts["log_probs"].append(values.to(torch.float16).cpu())
        parts["indices"].append(indices.to(torch.int32).cpu())
        parts["rest"].append(rest.clamp_min_(-80.0).cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}
