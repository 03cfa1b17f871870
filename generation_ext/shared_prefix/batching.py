# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How much goes into one forward pass: texts sorted by length into rows and batches that a memory limit has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Optional, TypeVar

import torch

from peft_ext.language_model import LanguageModel


_Result = TypeVar("_Result")

# Tokens of a row that several trees share. Longer rows copy the prefix less often, but see more of what the mask hides.
ROW_TOKENS = 256
# More tokens than this don't make a pass more efficient.
_CPU_TOKENS, _ACCELERATOR_TOKENS = 2048, 65536
_UNKNOWN_FREE = 2**32  # where the system doesn't say


class BatchPlanner:
    """Splits trees into batches.

    Args:
        model: The model.
        memory_limit: Bytes that a forward pass may take beside weights and prefix; None: a quarter of what is free.
        prefix_length: Tokens of the shared prefix.
        branches: Most rows that a tree takes where trees are unfolded; 1 otherwise.
        kept_states: Hidden states of every token that are kept until the end, such as those of all layers.

    Raises:
        ValueError: If `memory_limit` is not positive.
    """

    def __init__(
        self,
        model: LanguageModel,
        memory_limit: Optional[int],
        prefix_length: int = 0,
        branches: int = 1,
        kept_states: int = 0,
    ) -> None:
        check_memory_limit(memory_limit)
        self.model, self.prefix_length, self.branches = model, prefix_length, branches
        self.kept_states = kept_states
        self.memory_limit = free_bytes(model.device) // 4 if memory_limit is None else memory_limit
        self.row_tokens = ROW_TOKENS if model.trees and prefix_length else 1
        self.most_tokens = _CPU_TOKENS if model.device.type == "cpu" else _ACCELERATOR_TOKENS

    def batches(self, lengths: Sequence[int], reads: Sequence[int], wanted: Sequence[int]) -> list[list[list[int]]]:
        """Batches of rows of indices of trees, the longest first, so that a lack of memory shows at once.

        Args:
            lengths: Tokens of each tree.
            reads: Of each tree, the tokens that go through the output head.
            wanted: Indices of the trees to plan for.
        """
        order = sorted(wanted, key=lambda index: -lengths[index])
        batches: list[list[list[int]]] = []
        batch: list[list[int]] = []
        read = 0
        for row in self._rows(lengths, order):
            longest = max(sum(lengths[index] for index in each) for each in (*batch, row))
            more = read + sum(reads[index] for index in row)
            if batch and not self._fits(len(batch) + 1, longest, more):
                batches.append(batch)
                batch, more = [], more - read
            batch.append(row)
            read = more
        return batches + [batch] if batch else batches

    def bytes(self, rows: int, length: int, reads: int) -> int:
        """An estimate of what a forward pass allocates at its peak.

        Args:
            rows, length: Of the batch; rows before trees are unfolded.
            reads: Tokens that go through the output head.
        """
        widths, rows = self.model.widths, rows * self.branches
        size = torch.finfo(self.model.dtype).bits // 8
        tokens, seen = rows * length, self.prefix_length + length
        products = tokens * ((6 + self.kept_states) * widths.hidden + 3 * widths.widest) * size
        attention = rows * seen * 2 * (widths.keys + widths.queries) * size
        masks = rows * length * seen * (4 * widths.heads * 2 if self.model.eager else 6)
        return products + attention + masks + reads * widths.vocabulary * (size + 8)

    def _rows(self, lengths: Sequence[int], order: Sequence[int]) -> Iterator[list[int]]:
        """Rows of trees that are next to each other in length."""
        row: list[int] = []
        filled = 0
        capacity = max(self._row_tokens(), lengths[order[0]]) if self.row_tokens > 1 else 0
        for index in order:
            if row and filled + lengths[index] > capacity:
                yield row
                row, filled = [], 0
            row.append(index)
            filled += lengths[index]
        if row:
            yield row

    def _row_tokens(self) -> int:
        """The most tokens of a shared row that alone doesn't take more than the limit."""
        tokens = self.row_tokens
        while tokens > 1 and self.bytes(1, tokens, tokens // 4) > self.memory_limit:
            tokens //= 2
        return tokens

    def shrink(self, bytes_taken: int) -> None:
        """Plan for half of what was too much."""
        self.memory_limit = min(self.memory_limit, bytes_taken) // 2
        self.row_tokens = max(1, self.row_tokens // 2)

    def _fits(self, rows: int, length: int, reads: int) -> bool:
        tokens = rows * length * self.branches
        return tokens <= self.most_tokens and self.bytes(rows, length, reads) <= self.memory_limit


def run_in_batches(
    planner: BatchPlanner,
    lengths: Sequence[int],
    reads: Sequence[int],
    run: Callable[[list[int], list[list[int]]], _Result],
    wanted: Optional[Sequence[int]] = None,
) -> Iterator[tuple[list[int], _Result]]:
    """Run all trees, in smaller batches after the device ran out of memory.

    Args:
        planner: Says how many at a time.
        lengths: Tokens of each tree.
        reads: Of each tree, the tokens that go through the output head.
        run: Runs the trees with these indices, in rows that name them by their place in the batch.
        wanted: Indices of the trees to run; None: all.

    Yields:
        The indices of the trees of a batch, row by row, and what `run` gave for it.
    """
    pending = list(range(len(lengths)) if wanted is None else wanted)
    while pending:
        for batch in planner.batches(lengths, reads, pending):
            indices = [index for row in batch for index in row]
            number = iter(range(len(indices)))
            try:
                result = run(indices, [[next(number) for _ in row] for row in batch])
            except torch.OutOfMemoryError:
                if len(indices) == 1:
                    raise
                longest = max(sum(lengths[index] for index in row) for row in batch)
                planner.shrink(planner.bytes(len(batch), longest, sum(reads[index] for index in indices)))
                break
            done = set(indices)
            pending = [index for index in pending if index not in done]
            yield indices, result


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return _UNKNOWN_FREE


def check_memory_limit(memory_limit: Optional[int]) -> None:
    """Raises ValueError or TypeError if it is no number of bytes."""
    if memory_limit is None:
        return
    if not isinstance(memory_limit, (int, float)) or isinstance(memory_limit, bool):
        raise TypeError(
            f"memory_limit={memory_limit!r} must be a number of bytes, or None for a quarter of what is free."
        )
    if not memory_limit > 0 or math.isinf(memory_limit):
        raise ValueError(f"memory_limit={memory_limit!r} must be a positive number of bytes.")
