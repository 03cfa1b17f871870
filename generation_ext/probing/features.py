# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Hidden states of texts as features: of any layer, of the last token or the mean, behind a prefix that runs once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
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
from generation_ext.shared_prefix.inner_states import inner_state, layers_of
from generation_ext.shared_prefix.token_tree import PackedRows, TokenTree
from peft_ext.language_model import CAUSAL, ENCODER_DECODER, identity, inference, language_model


POOLING = ("last", "mean")
OVERFLOW = ("error", "truncate_start", "truncate_end")


class FeatureExtractor:
    """Reads features off a frozen model.

    Texts that begin alike (a prefix of demonstrations above all) share the keys and values of their beginning, which
    runs once; the numbers are those of encoding `prefix + text` by itself.

    Args:
        model: A causal model, an encoder, or an encoder-decoder model (its encoder is used, which shares nothing); with
            or without output head, or a `PeftModel` of one; packed models too. Not changed.
        tokenizer: Its tokenizer; needs no padding token.
        layer: Index among the hidden states: 0 the embeddings, n those after layer n, -1 the last ones (which come
            after the model's final normalisation). Layers after it aren't run.
        pooling: `"last"`: of the last token (PALP); `"mean"`: over the text's tokens, those of the prefix left out.
        overflow: What to do with a text that is too long behind its prefix: `"error"`, `"truncate_start"` (of the text,
            so that the end of a template stays), or `"truncate_end"`. A warning says how often it was done.
        max_length: Most tokens of prefix and text; None: what the model's config says.
        memory_limit: Bytes that a pass may take beside the weights; None: a quarter of what is free.
        progressbar: Show one.

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
        layer: int = -1,
        pooling: str = "last",
        overflow: str = "error",
        max_length: Optional[int] = None,
        memory_limit: Optional[int] = None,
        progressbar: bool = False,
    ) -> None:
        if pooling not in POOLING:
            raise ValueError(f"pooling={pooling!r} is unknown; choose one of {POOLING}.")
        if overflow not in OVERFLOW:
            raise ValueError(f"overflow={overflow!r} is unknown; choose one of {OVERFLOW}.")
        check_memory_limit(memory_limit)
        self.language_model = language_model(model)
        layers = self.language_model.base.config.get_text_config().num_hidden_layers
        if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
            raise ValueError(
                f"layer={layer!r} must be an integer from {-layers - 1} to {layers}: the model has {layers}."
            )
        self.layer = layer if layer < 0 else layer - layers - 1
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
            float32 `[texts, hidden size]` in the texts' order; with `output` mapped from the file, read-only.

        Raises:
            TypeError: If `texts` is a single string or holds something else.
            ValueError: If a text is too long and `overflow` is `"error"`; if the file belongs to other settings or
                texts; if the model gives NaN.
        """
        texts = _checked(texts, prefix)
        size = self._size()
        if output is None:
            features = np.zeros((len(texts), size), np.float32)
            self._fill(features, texts, prefix, np.zeros(len(texts), dtype=bool), None)
            return features
        file = FeatureFile(Path(output), (len(texts), size), self._settings(texts, prefix))
        if not file.finished:
            self._fill(file.features, texts, prefix, file.done, file)
            file.finish()
        return file.read()

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
            kept = 0 if self.layer == -1 or self._layers else self.layers
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
        return shared[: min(starts)] if self.pooling == "mean" else shared

    def _tree(self, tokens: list[int], start: int, shared: int) -> TokenTree:
        tree = TokenTree.chain(tokens[shared:])
        tree.reads = tree.reads[-1:] if self.pooling == "last" else tree.reads[start - shared :]
        return tree

    def _run(self, trees: list[TokenTree], rows: list[list[int]], prefix: SharedPrefix) -> np.ndarray:
        """Features `[trees, hidden]`."""
        packed = layout(self.language_model, trees, rows)
        hidden = self._hidden(packed, prefix)
        places = packed.places.to(hidden.device)
        states = hidden[places[:, 0], places[:, 1]].float()
        counts = torch.tensor([len(tree.reads) for tree in trees], device=hidden.device)
        owner = torch.arange(len(trees), device=hidden.device).repeat_interleave(counts)
        sums = states.new_zeros(len(trees), states.shape[1]).index_add_(0, owner, states)
        return (sums / counts[:, None]).cpu().numpy()

    def _hidden(self, rows: PackedRows, prefix: SharedPrefix) -> torch.Tensor:
        def run(**kwargs: Any) -> Any:
            if self.language_model.kind == CAUSAL:
                return run_backbone(self.language_model, rows, prefix, **kwargs)
            return encode_whole(self.language_model, rows, **kwargs)[0]

        if self.layer == -1:
            return run().last_hidden_state
        state = inner_state(self._layers, self.layer + self.layers + 1, run) if self._layers else None
        return run(output_hidden_states=True).hidden_states[self.layer] if state is None else state

    def _size(self) -> int:
        """Width of the features, from a pass over one token: a model may project its last hidden states."""
        with inference(self.model):
            return self._hidden(layout(self.language_model, [TokenTree.chain([0])]), EMPTY).shape[-1]

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
