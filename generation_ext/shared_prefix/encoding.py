# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Texts and label words to token ids, so that pieces that are run apart are the tokens of the whole string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

from torch import nn
from transformers import PreTrainedTokenizerBase

from generation_ext.prompts import Example, Task
from generation_ext.shared_prefix.token_tree import ROOT, TokenTree
from peft_ext.chat_format import chat_prompt
from peft_ext.language_model import CAUSAL, ENCODER_DECODER, check_tokens


_PROBE = "x"


class TextEncoder:
    """Whole strings to token ids, with the special tokens that the model wants.

    A causal model gets those that come first (a start token) and not those that come last: a text goes on. A text that
    has its start token written out, as a chat template's has, gets no second one. A text without any token becomes the
    start token (or the end token, where there is no start token).

    Args:
        tokenizer: The model's tokenizer; needs no padding token.
        kind: The kind of model, see `LanguageModel.kind`.
        model: The model, to refuse tokens that it lacks.

    Raises:
        ValueError: If the tokenizer makes nothing of a letter.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kind: str, model: Optional[nn.Module] = None) -> None:
        self.tokenizer, self._model = tokenizer, model
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
        return [[*self.begun(piece, text), *self.tail] for piece, text in zip(self.pieces(texts), texts)]

    def begun(self, piece: Sequence[int], text: str) -> list[int]:
        """The tokens of a text, or of its beginning, behind those that come first.

        Raises:
            ValueError: If there are none, and there is no start or end token to stand for them.
        """
        lead = [] if list(piece[: len(self.lead)]) == self.lead else self.lead
        tokens = [*lead, *piece]
        if not tokens and not self.tail:
            if self._start is None:
                raise ValueError(
                    f"the text {text[:80]!r} has no tokens, and the tokenizer no start token to stand for it; set "
                    "tokenizer.bos_token, or leave the text out."
                )
            tokens.append(self._start)
        return tokens

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens.

        Raises:
            ValueError: If the model lacks one; names text and token.
        """
        if not texts:
            return []
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        if self._model is not None:
            check_tokens(self._model, rows, self.tokenizer)
        return rows


class LabelTokens(NamedTuple):
    """Label words as tokens, and as a tree of what has to be run.

    A label's tokens are each read off the state of the one before it; the last one is never run. Labels that begin
    alike share those states, and a label of one token needs none beside the end of the input.

    Attributes:
        ids: Tokens of each label.
        nodes: Tree of all tokens that are run after an input, parents before children.
        steps: For each label the pairs (state, token): 0 is the end of the input, n + 1 is node n.
    """

    ids: list[list[int]]
    nodes: TokenTree
    steps: list[list[tuple[int, int]]]

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


class LabelEncoder:
    """Inputs with a task's labels, as the tokens of the whole strings.

    A tokenizer may make one token of an input's last characters and a label's first ones (`"?\\n"`), and it depends on
    the input whether it does. The labels of an input therefore begin where the tokens of all its whole strings part:
    what they have in common is the input's.

    Args:
        task: Its labels.
        encoder: How texts become tokens.
        kind: The kind of model, see `LanguageModel.kind`; of an encoder-decoder model, labels don't follow the input.
        chat: Whether inputs are what a user says, and labels what the assistant answers, by the tokenizer's chat template;
            demonstrations are earlier turns.

    Raises:
        ValueError: If a label has no tokens, or the same ones as another; if there is no chat template.
    """

    def __init__(self, task: Task, encoder: TextEncoder, kind: str, chat: bool = False) -> None:
        self.task, self.encoder, self.kind, self.chat = task, encoder, kind, chat
        # an answer begins its turn, where no space stands before it
        self.words = [word.strip() for word in task.words] if chat or kind == ENCODER_DECODER else task.words
        self._known: dict[tuple[tuple[int, ...], ...], LabelTokens] = {}
        context = self.context(dict.fromkeys(task.fields, _PROBE))
        self.usual = self._labels(encoder.pieces(self.words)) if kind == ENCODER_DECODER else self._split(context)[1]

    def context(self, example: Example, demonstrations: Sequence[tuple[Example, str]] = ()) -> str:
        """An input behind its demonstrations, up to where the label goes."""
        if not self.chat:
            return self.task.context(example, demonstrations)
        messages = []
        for shown, label in demonstrations:
            messages.append({"role": "user", "content": self.task.text(shown)})
            messages.append({"role": "assistant", "content": self.task.word(label).strip()})
        messages.append({"role": "user", "content": self.task.text(example)})
        return chat_prompt(self.encoder.tokenizer, messages)

    def __call__(self, contexts: Sequence[str]) -> list[tuple[list[int], LabelTokens]]:
        """Each input's own tokens, special ones included, and what follows them.

        Args:
            contexts: See [`context`].
        """
        if self.kind == ENCODER_DECODER:
            return [(tokens, self.usual) for tokens in self.encoder(contexts)]
        return [self._split(context) for context in contexts]

    def behind(self, labels: LabelTokens) -> int:
        """Most tokens of these labels that lie behind an input."""
        return 0 if self.kind == ENCODER_DECODER else labels.longest

    def _split(self, context: str) -> tuple[list[int], LabelTokens]:
        own, *wholes = self.encoder.pieces([context, *(context + word for word in self.words)])
        shared = len(own)
        for whole in wholes:
            same = next((i for i, (a, b) in enumerate(zip(own, whole)) if a != b), min(len(own), len(whole)))
            shared = min(shared, same)
        return self.encoder.begun(own[:shared], context), self._labels([whole[shared:] for whole in wholes])

    def _labels(self, ids: list[list[int]]) -> LabelTokens:
        key = tuple(map(tuple, ids))
        if key not in self._known:
            _check_distinct(self.task, ids)
            self._known[key] = LabelTokens(ids, *_tree_of(ids))
        return self._known[key]


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
