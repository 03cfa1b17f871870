# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Texts and label words to token ids, so that pieces that are run apart are the tokens of the whole string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

from transformers import PreTrainedTokenizerBase

from generation_ext.prompts import Task
from generation_ext.shared_prefix.token_tree import ROOT, TokenTree
from peft_ext.language_model import CAUSAL, ENCODER_DECODER, LanguageModel


_PROBE = "x"


class TextEncoder:
    """Whole strings to token ids, with the special tokens that the model wants.

    A causal model gets those that come first (a start token) and not those that come last: a text goes on. A text
    without any token becomes the start token (or the end token, where there is no start token).

    Args:
        tokenizer: The model's tokenizer; needs no padding token.
        kind: The kind of model, see `LanguageModel.kind`.

    Raises:
        ValueError: If the tokenizer makes nothing of a letter.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
        self.tokenizer = tokenizer
        bare = self.pieces([_PROBE])[0]
        whole = tokenizer(_PROBE, verbose=False)["input_ids"]
        starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        if not bare or not starts:
            raise ValueError(f"tokenizer makes {whole} of {_PROBE!r}; that is no tokenizer for text.")
        self.lead = whole[: starts[0]]
        self.tail = [] if kind == CAUSAL else whole[starts[0] + len(bare) :]
        start = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        self._start = next((token for token in start if token is not None), None)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts.

        Raises:
            ValueError: If a text gives no token and there is no start or end token to stand for it.
        """
        encoded = [[*self.lead, *piece, *self.tail] for piece in self.pieces(texts)]
        for index, tokens in enumerate(encoded):
            if not tokens:
                if self._start is None:
                    raise ValueError(
                        f"text {index} ({texts[index][:80]!r}) has no tokens, and the tokenizer no start token to stand "
                        "for it; set tokenizer.bos_token, or leave the text out."
                    )
                tokens.append(self._start)
        return encoded

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


class LabelTokens(NamedTuple):
    """Label words as tokens, and as a tree of what has to be run.

    A label's tokens are each read off the state of the one before it; the last one is never run. Labels that begin
    alike share those states, and a label of one token needs none beside the end of the input.

    Attributes:
        ids: Tokens of each label.
        nodes: Tree of all tokens that are run after an input, parents before children.
        steps: For each label the pairs (state, token): 0 is the end of the input, n + 1 is node n.
        moved: Characters of white space at the template's end that belong to the labels' first token instead.
    """

    ids: list[list[int]]
    nodes: TokenTree
    steps: list[list[tuple[int, int]]]
    moved: int = 0

    @property
    def states(self) -> int:
        """States that are read for each input."""
        return 1 + len(self.nodes)

    @property
    def longest(self) -> int:
        """Most tokens of a label."""
        return max(map(len, self.ids))

    def grow(self, tree: TokenTree, after: int) -> None:
        """Let the labels follow the token `after` of a tree, to be read."""
        start = len(tree)
        for token, parent in zip(self.nodes.tokens, self.nodes.parents):
            tree.append([token], after if parent == ROOT else start + parent)
        tree.reads += [after, *range(start, len(tree))]


def label_tokens(task: Task, encoder: TextEncoder, model: LanguageModel) -> LabelTokens:
    """A task's label words as tokens that go on after its template.

    Raises:
        ValueError: If a label has no tokens, the same ones as another, or is tokenised together with the template's end.
    """
    moved = 0
    if model.kind == ENCODER_DECODER:
        ids: Optional[list[list[int]]] = encoder.pieces([word.strip() for word in task.words])
    else:
        stem = task.text(dict.fromkeys(task.fields, _PROBE))
        ids = _continuations(encoder, stem, task.words)
        kept = stem.rstrip()
        if ids is None and len(kept) < len(stem):
            moved = len(stem) - len(kept)
            ids = _continuations(encoder, kept, [stem[len(kept) :] + word for word in task.words])
    if ids is None:
        raise ValueError(
            f"labels={task.words}: the tokenizer makes one token of the end of the template {task.template[-20:]!r} and "
            "the beginning of a label; begin the labels with a space."
        )
    _check_distinct(task, ids)
    nodes, steps = _tree_of(ids)
    return LabelTokens(ids, nodes, steps, moved)


def _continuations(encoder: TextEncoder, stem: str, words: Sequence[str]) -> Optional[list[list[int]]]:
    """Tokens of each word after the stem; None if a word changes the stem's own tokens."""
    start, *wholes = encoder.pieces([stem, *(stem + word for word in words)])
    if any(whole[: len(start)] != start for whole in wholes):
        return None
    return [whole[len(start) :] for whole in wholes]


def _check_distinct(task: Task, ids: Sequence[Sequence[int]]) -> None:
    labels: dict[tuple[int, ...], str] = {}
    for (label, word), tokens in zip(task.labels.items(), ids):
        if not tokens:
            raise ValueError(
                f"labels: the tokenizer makes no token of {word!r}, the word of {label!r}; choose another."
            )
        if tuple(tokens) in labels:
            raise ValueError(
                f"labels: {labels[tuple(tokens)]!r} and {label!r} are the same tokens {list(tokens)} to this tokenizer; "
                "choose other words."
            )
        labels[tuple(tokens)] = label


def _tree_of(ids: Sequence[Sequence[int]]) -> tuple[TokenTree, list[list[tuple[int, int]]]]:
    tree = TokenTree()
    nodes: dict[tuple[int, ...], int] = {(): ROOT}
    steps = []
    for label in ids:
        step = []
        for length, token in enumerate(label):
            before = tuple(label[:length])
            if before not in nodes:
                nodes[before] = tree.append(label[length - 1 : length], nodes[before[:-1]])
            step.append((nodes[before] + 1, token))
        steps.append(step)
    return tree, steps
