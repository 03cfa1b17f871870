# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Token trees: texts that share their beginnings, laid out in rows so that every token sees its ancestors alone.

An input with its labels is a tree whose branches are the labels. Several trees fit into one row of a batch, and all of
them stand on one shared prefix, whose keys and values then exist once per row instead of once per input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch


ROOT = -1  # the parent of a tree's first token: the end of the shared prefix


class TokenTree:
    """Tokens, the token that each one follows, and the tokens whose output is read.

    Attributes:
        tokens: Token ids.
        parents: For each token the index of the one before it in its text; `ROOT` for the first.
        reads: Indices of tokens whose hidden state or logits are asked for.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, tokens: Sequence[int], after: int = ROOT) -> int:
        """Let tokens follow the token with index `after`; returns the index of the last of them (`after` if none)."""
        for token in tokens:
            self.tokens.append(token)
            self.parents.append(after)
            after = len(self.tokens) - 1
        return after

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> TokenTree:
        """A single text, of which all tokens are read."""
        tree = cls()
        tree.append(tokens)
        tree.reads = list(range(len(tokens)))
        return tree

    def paths(self) -> list[list[int]]:
        """The indices on the way to every leaf."""
        inner = set(self.parents)
        paths = []
        for leaf in range(len(self)):
            if leaf not in inner:
                path = [leaf]
                while self.parents[path[-1]] != ROOT:
                    path.append(self.parents[path[-1]])
                paths.append(path[::-1])
        return paths


class PackedRows(NamedTuple):
    """Trees in rows; R rows of up to L tokens.

    Attributes:
        tokens: int64 `[R, L]`, padded on the right with 0, which no text sees.
        depths: int64 `[R, L]`: places after the shared prefix.
        visible: bool `[R, L, L]`: whether a token (row of the matrix) sees another one; None: those before it, as far
            as `lengths` reach.
        lengths: int64 `[R]`: tokens of each row.
        places: int64 `[N, 2]`: row and column of everything that is read, tree by tree in the given order.
    """

    tokens: torch.Tensor
    depths: torch.Tensor
    visible: Optional[torch.Tensor]
    lengths: torch.Tensor
    places: torch.Tensor


def pack(trees: Sequence[TokenTree], rows: Sequence[Sequence[int]]) -> PackedRows:
    """Lay trees out in rows with a mask.

    Args:
        trees: The trees.
        rows: For each row the indices of its trees; every tree in one row.
    """
    longest = max(sum(len(trees[index]) for index in row) for row in rows)
    tokens = np.zeros((len(rows), longest), dtype=np.int64)
    depths = np.zeros_like(tokens)
    visible = np.zeros((len(rows), longest, longest), dtype=bool)
    starts: dict[int, tuple[int, int]] = {}
    for number, row in enumerate(rows):
        end = 0
        for index in row:
            tree, start = trees[index], end
            end += len(tree)
            starts[index] = (number, start)
            tokens[number, start:end] = tree.tokens
            _see_ancestors(tree, visible[number, start:end, start:end], depths[number, start:end])
        np.fill_diagonal(visible[number], True)  # padding sees itself: a softmax over nothing is NaN
    places = [(starts[i][0], starts[i][1] + read) for i in range(len(trees)) for read in trees[i].reads]
    lengths = [sum(len(trees[index]) for index in row) for row in rows]
    return PackedRows(
        torch.from_numpy(tokens),
        torch.from_numpy(depths),
        torch.from_numpy(visible),
        torch.tensor(lengths),
        torch.tensor(places, dtype=torch.int64).reshape(-1, 2),
    )


def padded(texts: Sequence[Sequence[int]], pad: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of texts and their mask, int64 `[texts, longest]`, padded on the `"left"` or the `"right"`."""
    longest = max(map(len, texts))
    tokens = torch.full((len(texts), longest), pad)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        own = slice(longest - len(text), None) if side == "left" else slice(0, len(text))
        tokens[row, own] = torch.tensor(list(text), dtype=torch.int64)
        mask[row, own] = 1
    return tokens, mask


def unfold(trees: Sequence[TokenTree]) -> PackedRows:
    """Lay trees out with a row for each leaf, for models that can't be given positions and masks."""
    paths = [(index, path) for index, tree in enumerate(trees) for path in tree.paths()]
    lengths = [len(path) for _, path in paths]
    tokens = np.zeros((len(paths), max(lengths)), dtype=np.int64)
    positions: dict[tuple[int, int], tuple[int, int]] = {}
    for row, (index, path) in enumerate(paths):
        tokens[row, : len(path)] = [trees[index].tokens[node] for node in path]
        for column, node in enumerate(path):
            positions.setdefault((index, node), (row, column))
    places = [positions[index, read] for index, tree in enumerate(trees) for read in tree.reads]
    depths = torch.arange(max(lengths)).expand(len(paths), -1)
    return PackedRows(
        torch.from_numpy(tokens),
        depths,
        None,
        torch.tensor(lengths),
        torch.tensor(places, dtype=torch.int64).reshape(-1, 2),
    )


def _see_ancestors(tree: TokenTree, visible: np.ndarray, depths: np.ndarray) -> None:
    """Fill a tree's mask `[n, n]` and depths `[n]`."""
    trunk = next((i for i, parent in enumerate(tree.parents) if parent != i - 1), len(tree))
    visible[:trunk, :trunk] = np.tri(trunk, dtype=bool)
    depths[:trunk] = np.arange(trunk)
    for node in range(trunk, len(tree)):
        parent = tree.parents[node]
        if parent != ROOT:
            visible[node] = visible[parent]
            depths[node] = depths[parent] + 1
        visible[node, node] = True
