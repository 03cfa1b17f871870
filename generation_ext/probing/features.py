# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Hidden states of texts as features: of any layers, of the last token or the mean, behind a prefix that runs once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from generation_ext.probing.feature_file import FeatureFile, digest_of_texts
from generation_ext.shared_prefix.batching import BatchPlanner, check_memory_limit, run_in_batches
from generation_ext.shared_prefix.cache import (
    EMPTY,
    SharedPrefix,
    common_prefix,
    encode_prefix,
    encode_whole,
    layout,
    run_backbone,
)
from generation_ext.shared_prefix.encoding import TextEncoder
from generation_ext.shared_prefix.inner_states import inner_states, layers_of
from generation_ext.shared_prefix.token_tree import PackedRows, TokenTree
from peft_ext.language_model import CAUSAL, ENCODER_DECODER, identity, inference, language_model


POOLING = ("last", "mean")
ALL = "all"  # layers
OVERFLOW = ("error", "truncate_start", "truncate_end")
# Texts whose logits over the whole vocabulary are in memory at once.
_HEAD_ROWS = 64


class FeatureExtractor:
    """Reads features off a frozen model.

    Texts that begin alike (a prefix of demonstrations above all) share the keys and values of their beginning, which
    runs once; the numbers are those of encoding `prefix + text` by itself.

    Args:
        model: A causal model, an encoder, or an encoder-decoder model (its encoder is used, which shares nothing); with
            or without output head, or a `PeftModel` of one; packed models too. Not changed.
        tokenizer: Its tokenizer; needs no padding token.
        layer: Index among the hidden states: 0 the embeddings, n those after layer n, -1 the last ones (which come
            after the model's final normalisation). Layers after it aren't run. Or several of them in a list, or `"all"`.
        pooling: `"last"`: of the last token (PALP); `"mean"`: over the text's tokens, those of the prefix left out. Or
            both, in a list.
        overflow: What to do with a text that is too long behind its prefix: `"error"`, `"truncate_start"` (of the text,
            so that the end of a template stays), or `"truncate_end"`. A warning says how often it was done.
        max_length: Most tokens of prefix and text; None: what the model's config says.
        memory_limit: Bytes that a pass may take beside the weights; None: a quarter of what is free.
        progressbar: Show one.

    Several layers and poolings are read in one forward pass, and stand beside each other in the features, as
    [`blocks`][generation_ext.probing.features.FeatureExtractor.blocks] says.

    Raises:
        TypeError, ValueError: If an argument is out of its range, or the model is of a kind that a prefix can't be
            shared in (see [`language_model`]).

    Example:

    ```py
    >>> extractor = FeatureExtractor(model, tokenizer)
    >>> extractor.extract(["Sentence 1: good\\nLabel:"], prefix="Sentence 1: bad\\nLabel: negative\\n").shape
    (1, 576)
    ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layer: Union[int, str, Sequence[int]] = -1,
        pooling: Union[str, Sequence[str]] = "last",
        overflow: str = "error",
        max_length: Optional[int] = None,
        memory_limit: Optional[int] = None,
        progressbar: bool = False,
    ) -> None:
        poolings = [pooling] if isinstance(pooling, str) else list(pooling)
        if not poolings or any(each not in POOLING for each in poolings) or len(set(poolings)) < len(poolings):
            raise ValueError(f"pooling={pooling!r} is unknown; choose one of {POOLING}, or a list of both.")
        if overflow not in OVERFLOW:
            raise ValueError(f"overflow={overflow!r} is unknown; choose one of {OVERFLOW}.")
        check_memory_limit(memory_limit)
        self.language_model = language_model(model)
        layers = self.language_model.base.config.get_text_config().num_hidden_layers
        wanted: list[Any] = list(layer) if isinstance(layer, (list, tuple, range)) else [layer]
        if layer == ALL:
            wanted = list(range(layers + 1))
        if not wanted or not all(isinstance(each, int) and -layers - 1 <= each <= layers for each in wanted):
            raise ValueError(
                f"layer={layer!r} must be an integer from {-layers - 1} to {layers}, a list of them or {ALL!r}: "
                f"the model has {layers}."
            )
        self.depths: list[int] = [each if each < 0 else each - layers - 1 for each in wanted]
        if len(set(self.depths)) < len(self.depths):
            raise ValueError(f"layer={layer!r} names a layer twice.")
        self.layer: Union[int, list[int]] = self.depths[0] if wanted == [layer] else self.depths
        self.poolings = poolings
        self.layers = layers
        self.model, self.pooling, self.overflow = model, pooling, overflow
        self.memory_limit, self.progressbar = memory_limit, progressbar
        self.encoder = TextEncoder(tokenizer, self.language_model.kind, model)
        self.max_length = self.language_model.length_limit(max_length)
        base = self.language_model
        stack = base.base.get_encoder() if base.kind == ENCODER_DECODER else base.backbone
        self._layers = layers_of(stack, layers)

    def extract(
        self, texts: Sequence[str], prefix: str = "", output: Optional[Union[str, os.PathLike]] = None
    ) -> np.ndarray:
        """Features of texts.

        Args:
            texts: Whole texts, template included. An empty one behind an empty prefix counts as the start token.
            prefix: What stands before each of them, its own end included (`"\\n"` after the last demonstration).
            output: A `.npy` file to write features to as they are computed; None: memory. A run that was killed goes on
                where it was, and a finished file is not computed again; its settings lie in a `.json` file beside it.

        Returns:
            float32 `[texts, hidden size]` in the texts' order, for several layers and poolings `[texts, sum of the blocks'
            sizes]`; with `output` mapped from the file, read-only.

        Raises:
            TypeError: If `texts` is a single string or holds something else.
            ValueError: If a text is too long and `overflow` is `"error"`; if the file belongs to other settings or
                texts; if the model gives NaN.
        """
        texts = _checked(texts, prefix)
        size = sum(self._sizes()) * len(self.poolings)
        if output is None:
            features = np.zeros((len(texts), size), np.float32)
            self._fill(features, texts, prefix, np.zeros(len(texts), dtype=bool), None)
            return features
        file = FeatureFile(Path(output), (len(texts), size), self._settings(texts, prefix))
        if not file.finished:
            self._fill(file.features, texts, prefix, file.done, file)
            file.finish()
        return file.read()

    def keep(self, features: np.ndarray, texts: Sequence[str], prefix: str, output: Union[str, os.PathLike]) -> None:
        """Write features that are known already into the file that `extract` makes of these arguments.

        Args:
            features: What `extract` would give.
            texts, prefix, output: Of `extract`.
        """
        file = FeatureFile(Path(output), features.shape, self._settings(list(texts), prefix))
        if not file.finished:
            file.features[:] = features
            file.mark(list(range(len(features))))
            file.finish()

    def blocks(self) -> dict[tuple[int, str], slice]:
        """Where the features of each layer (counted from 0, the embeddings) and pooling stand: layer by layer, and of each
        its poolings."""
        found: dict[tuple[int, str], slice] = {}
        start = 0
        for depth, size in zip(self.depths, self._sizes()):
            for pooling in self.poolings:
                found[depth + self.layers + 1, pooling] = slice(start, start + size)
                start += size
        return found

    @property
    def writes(self) -> bool:
        """Whether the model could write a label where a text ends: whether it is a causal one with an output head."""
        return self.language_model.kind == CAUSAL and self.language_model.base.get_output_embeddings() is not None

    def label_scores(self, states: np.ndarray, words: Sequence[str]) -> np.ndarray:
        """How likely the model would go on with each of some words, from states that were read.

        Args:
            states: Of texts' last tokens in the last layer, `[texts, hidden size]`.
            words: With the space before them, if they have one in the text.

        Returns:
            float32 `[texts, words]`: what the output head gives the word's tokens, mean over these. Of a word of one token it
            is the logit (before what some models scale or cap it by); of several tokens the later ones are scored at the same
            place, which takes no forward pass.

        Raises:
            TypeError: If the model has no output head (see `writes`).
            ValueError: If a word has no tokens.
        """
        if not self.writes:
            raise TypeError(f"model ({type(self.model).__name__}) writes no text, so it has no scores of words.")
        tokens = self.encoder.pieces(words)
        for word, pieces in zip(words, tokens):
            if not pieces:
                raise ValueError(f"the word {word!r} has no tokens.")
        head: Any = self.language_model.base.get_output_embeddings()
        found = np.empty((len(states), len(words)), np.float32)
        with inference(self.model):
            for start in range(0, len(states), _HEAD_ROWS):
                part = torch.tensor(np.asarray(states[start : start + _HEAD_ROWS]))
                logits = head(part.to(self.language_model.device, self.language_model.dtype)).float()
                scores = [logits[:, pieces].mean(1) for pieces in tokens]
                found[start : start + _HEAD_ROWS] = torch.stack(scores, 1).cpu().numpy()
        return found

    def _fill(
        self, features: np.ndarray, texts: list[str], prefix: str, done: np.ndarray, file: Optional[FeatureFile]
    ) -> None:
        wanted = np.flatnonzero(~done).tolist()
        if not wanted:
            return
        tokens, starts = self._encode(texts, prefix)
        with inference(self.model), tqdm(total=len(texts), desc="Features", disable=not self.progressbar) as bar:
            bar.update(len(texts) - len(wanted))
            shared = self._shared([tokens[index] for index in wanted], [starts[index] for index in wanted])
            encoded = encode_prefix(self.language_model, shared)
            trees = [self._tree(text, start, len(shared)) for text, start in zip(tokens, starts)]
            kept = 0 if self.depths == [-1] or self._layers else self.layers
            planner = BatchPlanner(self.language_model, self.memory_limit, len(shared), kept_states=kept)

            def run(indices: list[int], rows: list[list[int]]) -> np.ndarray:
                return self._run([trees[index] for index in indices], rows, encoded)

            lengths = [len(tree) for tree in trees]
            for indices, states in run_in_batches(planner, lengths, [0] * len(trees), run, wanted):
                if not np.isfinite(states).all():
                    raise ValueError(
                        "the model gives NaN or infinite hidden states; its weights are damaged, or its dtype overflows "
                        "(load it with dtype=torch.float32 or bfloat16)."
                    )
                features[indices] = states
                if file is not None:
                    file.mark(indices)
                bar.update(len(indices))

    def _encode(self, texts: list[str], prefix: str) -> tuple[list[list[int]], list[int]]:
        """Token ids of prefix and text together, and for each where the text's own begin."""
        before = self.encoder([prefix])[0] if prefix else []
        wholes = self.encoder([prefix + text for text in texts])
        starts = [min(_common(before, whole), len(whole) - 1) for whole in wholes]
        limit, cut = self.max_length, 0
        if limit is None:
            return wholes, starts
        for index, (whole, start) in enumerate(zip(wholes, starts)):
            excess = len(whole) - limit
            if excess <= 0:
                continue
            if self.overflow == "error" or excess >= len(whole) - start - len(self.encoder.tail):
                raise ValueError(
                    f"text {index} takes {len(whole)} tokens ({start} of them the prefix), but the model takes {limit}; "
                    "shorten it or the prefix"
                    + (", or use overflow='truncate_start' or 'truncate_end'." if self.overflow == "error" else ".")
                )
            cut += 1
            wholes[index] = self._cut(whole, max(start, 0 if prefix else len(self.encoder.lead)), excess)
        if cut:
            warnings.warn(f"{cut} of {len(texts)} texts are cut to {limit} tokens ({self.overflow}).", stacklevel=4)
        return wholes, starts

    def _cut(self, tokens: list[int], start: int, excess: int) -> list[int]:
        if self.overflow == "truncate_start":
            return tokens[:start] + tokens[start + excess :]
        end = len(tokens) - len(self.encoder.tail)
        return tokens[: end - excess] + tokens[end:]

    def _shared(self, texts: list[list[int]], starts: list[int]) -> list[int]:
        """The beginning that runs once."""
        if self.language_model.kind != CAUSAL or len(texts) < 2 or self.language_model.unshareable:
            return []
        shared = common_prefix(texts)
        # a mean needs the hidden states of all tokens of the text
        return shared[: min(starts)] if "mean" in self.poolings else shared

    def _tree(self, tokens: list[int], start: int, shared: int) -> TokenTree:
        tree = TokenTree.chain(tokens[shared:])
        tree.reads = tree.reads[start - shared :] if "mean" in self.poolings else tree.reads[-1:]
        return tree

    def _run(self, trees: list[TokenTree], rows: list[list[int]], prefix: SharedPrefix) -> np.ndarray:
        """Features `[trees, size]`."""
        packed = layout(self.language_model, trees, rows)
        counts = torch.tensor([len(tree.reads) for tree in trees])
        ends, owner = counts.cumsum(0) - 1, torch.arange(len(trees)).repeat_interleave(counts)

        def pooled(hidden: torch.Tensor) -> torch.Tensor:
            device = hidden.device
            places = packed.places.to(device)
            states = hidden[places[:, 0], places[:, 1]].float()
            found = []
            for pooling in self.poolings:
                if pooling == "last":
                    found.append(states[ends.to(device)])
                else:
                    sums = states.new_zeros(len(trees), states.shape[1]).index_add_(0, owner.to(device), states)
                    found.append(sums / counts.to(device)[:, None])
            return torch.cat(found, 1).cpu()

        return torch.cat(self._of_layers(packed, prefix, pooled), 1).numpy()

    def _of_layers(
        self, rows: PackedRows, prefix: SharedPrefix, take: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """What `take` makes of the hidden states of each layer that is wanted, in one forward pass."""

        def run(**kwargs: Any) -> Any:
            if self.language_model.kind == CAUSAL:
                return run_backbone(self.language_model, rows, prefix, **kwargs)
            return encode_whole(self.language_model, rows, **kwargs)[0]

        found: dict[int, torch.Tensor] = {}

        def run_to_the_end() -> None:
            found[-1] = take(run().last_hidden_state)

        inner = [depth for depth in self.depths if depth != -1]
        last = -1 in self.depths
        if not inner:
            run_to_the_end()
        elif self._layers:
            indices = [depth + self.layers + 1 for depth in inner]
            states = inner_states(self._layers, indices, run_to_the_end if last else run, take, to_the_end=last)
            found.update({index - self.layers - 1: state for index, state in states.items()})
        if not set(self.depths) <= set(found):
            # layers that aren't a list, or are handed their states in a way that a hook doesn't see
            output = run(output_hidden_states=True)
            states = {depth: output.hidden_states[depth] for depth in inner} | {-1: output.last_hidden_state}
            found = {depth: take(states[depth]) for depth in self.depths}
        return [found[depth] for depth in self.depths]

    def _sizes(self) -> list[int]:
        """Widths of the layers' states, from a pass over one token: a model may project its last hidden states."""
        with inference(self.model):
            one = layout(self.language_model, [TokenTree.chain([0])])
            return [len(width) for width in self._of_layers(one, EMPTY, lambda state: state[0, 0])]

    def _settings(self, texts: list[str], prefix: str) -> dict[str, Any]:
        return {
            "model": identity(self.model),
            "layer": self.layer,
            "pooling": self.pooling,
            "overflow": self.overflow,
            "max_length": self.max_length,
            "texts": digest_of_texts(texts),
            "prefix": digest_of_texts([prefix]),
        }


def _checked(texts: Sequence[str], prefix: str) -> list[str]:
    if isinstance(texts, (str, bytes)):
        raise TypeError("texts must be a sequence of strings, got a single one; pass [text].")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {index} must be a string, got {type(text).__name__}.")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {type(prefix).__name__}.")
    return texts


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
