# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a classifier reads off its model: which layers' states, chosen on the training texts, and these of any text."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Protocol, Union

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from generation_ext.probing import choice
from generation_ext.probing.features import ALL, POOLING, FeatureExtractor, digest_of_texts
from generation_ext.probing.heads import AUTO
from peft_ext.language_model import identity


# In the place of a layer: the best one.
BEST = "best"
Blocks = Mapping[choice.Block, slice]


class Extractor(Protocol):
    """What turns texts into features; [`FeatureExtractor`] is one.

    It may have `blocks() -> {(layer, pooling): slice}`, which says what stands where in its features: these are then what
    `layer` and `pooling` name, or are chosen from. It may have `label_scores(states, words)` as well, see
    [`FeatureExtractor.label_scores`].
    """

    def extract(self, texts: Sequence[str], prefix: str = "") -> np.ndarray:
        """`[texts, size]`."""


@dataclass
class StateReader:
    """Reads states off a model or an extractor.

    Args:
        model: A model of transformers, or an [`Extractor`].
        tokenizer: The model's.
        layer: An index, `"auto"` or `"best"`.
        pooling: `"last"`, `"mean"` or `"auto"`.
        options: Of [`FeatureExtractor`].
        memory: A folder to keep features in.
        blocks: What is read; [`choose`] fills it. Empty for an extractor that doesn't say what it gives.

    Attributes:
        scores: What [`choose`] compared: `{(layer, pooling): log-probability}`.
    """

    model: Any
    tokenizer: Optional[PreTrainedTokenizerBase]
    layer: Union[int, str]
    pooling: str
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: Optional[Union[str, os.PathLike]] = None
    blocks: Sequence[choice.Block] = ()
    scores: dict[choice.Block, float] = field(default_factory=dict)

    # ---- which

    def choose(
        self,
        texts: Sequence[str],
        codes: np.ndarray,
        asks_for_the_label: bool,
        join: bool,
        forms: int = 1,
        prefix: str = "",
        left_out: Collection[int] = (),
    ) -> np.ndarray:
        """Set `blocks`, and read them of training texts.

        Args:
            texts: Whole texts.
            codes: Their classes as integers from 0.
            asks_for_the_label: Whether the last token is where a causal model would write the label.
            join: Read several blocks together, if layer or pooling is open and the rows are few enough.
            forms: Rows that each text will have.
            prefix: Before each.
            left_out: Indices of texts that say nothing: the prefix has them, with their class.

        Returns:
            Features `[texts, size]`.
        """
        self.blocks, self.scores = [], {}
        every = self.candidates()
        if every is None:
            return self.read(texts, prefix)
        together = choice.joined(every, asks_for_the_label)
        if len(every) == 1 or (join and choice.fits(every, together, forms * len(texts))):
            self.blocks = list(every) if len(every) == 1 else together
            return self.read(texts, prefix)
        return self._best(every, texts, codes, asks_for_the_label, prefix, left_out)

    def _best(
        self,
        every: Blocks,
        texts: Sequence[str],
        codes: np.ndarray,
        asks_for_the_label: bool,
        prefix: str,
        left_out: Collection[int],
    ) -> np.ndarray:
        classes = int(codes.max()) + 1
        rows = choice.sample(codes, max(block.stop for block in every.values()))
        states = self._extract([texts[row] for row in rows], prefix, self._extractor(list(every)))
        judged = [place for place, row in enumerate(rows.tolist()) if row not in left_out]
        if len(set(codes[rows[judged]].tolist())) < classes:
            judged = list(range(len(rows)))
        self.scores = choice.scores_of(states[judged], every, codes[rows[judged]], classes)
        expected = choice.expected_blocks(every, asks_for_the_label)
        self.blocks = [choice.best(self.scores, len(judged), expected)]
        features = states[:, every[self.blocks[0]]]
        if len(rows) < len(texts):
            own, others = features, np.setdiff1d(np.arange(len(texts)), rows)
            features = np.empty((len(texts), own.shape[1]), np.float32)
            features[rows] = own
            features[others] = self.read([texts[row] for row in others], prefix)
        if self.memory is not None and isinstance(self.model, nn.Module):
            # the texts' own predictions ask for them
            extractor = self._extractor(self.blocks)
            extractor.keep(features, texts, prefix, self._file(extractor, texts, prefix))
        return features

    def candidates(self) -> Optional[Blocks]:
        """What may be read, and where it stands in the features of the extractor that has all of it; None if the extractor
        doesn't say.

        Raises:
            ValueError: If layer or pooling is one that the extractor hasn't.
        """
        if isinstance(self.model, nn.Module):
            return self._extractor(None).blocks()
        if not hasattr(self.model, "blocks"):
            return None
        blocks = self.model.blocks()
        depth = max(layer for layer, _ in blocks)
        open_layer = isinstance(self.layer, str)
        layer = self.layer if isinstance(self.layer, str) or self.layer >= 0 else self.layer + depth + 1
        found = {
            each: place
            for each, place in blocks.items()
            if (open_layer or layer == each[0]) and self.pooling in (AUTO, each[1])
        }
        if not found:
            raise ValueError(f"layer={self.layer!r}, pooling={self.pooling!r}: the extractor has only {list(blocks)}.")
        return found

    # ---- what

    def read(self, texts: Sequence[str], prefix: str = "") -> np.ndarray:
        """Features `[texts, size]` of what is read, block beside block.

        Raises:
            ValueError: If there are no texts, or features aren't finite.
        """
        extractor = self._extractor(self.blocks)
        features = self._extract(texts, prefix, extractor)
        if not self.blocks:
            return features
        places = extractor.blocks()
        if list(places) == list(self.blocks):
            return features
        return np.concatenate([features[:, places[block]] for block in self.blocks], 1)

    def label_scores(self, features: np.ndarray, words: Sequence[str]) -> Optional[np.ndarray]:
        """The model's own log-probabilities of label words, among these, out of features that were read, `[texts, words]`;
        None if what is read hasn't the last layer's last token, or the model writes no text.

        Args:
            features: Of [`read`].
            words: See [`FeatureExtractor.label_scores`].
        """
        extractor: Any = self._extractor(self.blocks)
        if not self.blocks or not getattr(extractor, "writes", hasattr(extractor, "label_scores")):
            return None
        places = self._places(extractor)
        last = (self.depth, "last")
        if last not in places:
            return None
        scores = np.asarray(extractor.label_scores(features[:, places[last]], words), np.float64)
        scores -= scores.max(1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(1, keepdims=True))

    @property
    def depth(self) -> int:
        """The number of the last layer."""
        if isinstance(self.model, nn.Module):
            return self._extractor(None).layers
        return max(layer for layer, _ in self.model.blocks())

    def _places(self, extractor: Any) -> dict[choice.Block, slice]:
        """Where each block stands in the features of `read`."""
        places, found, start = extractor.blocks(), {}, 0
        for block in self.blocks:
            size = places[block].stop - places[block].start
            found[block] = slice(start, start + size)
            start += size
        return found

    def extractor(self) -> Extractor:
        """What gives the states that are read."""
        return self._extractor(self.blocks)

    def _extractor(self, blocks: Optional[Sequence[choice.Block]]) -> Any:
        """What gives the states of some blocks, or, with None, of all that may be read."""
        if not isinstance(self.model, nn.Module):
            return self.model
        if blocks:
            layers = sorted({layer for layer, _ in blocks})
            poolings = [each for each in POOLING if each in {pooling for _, pooling in blocks}]
            layer: Any = layers[0] if len(layers) == 1 else layers
            pooling: Any = poolings[0] if len(poolings) == 1 else poolings
        else:
            layer = ALL if isinstance(self.layer, str) else int(self.layer)
            pooling = list(POOLING) if self.pooling == AUTO else self.pooling
        return FeatureExtractor(self.model, self.tokenizer, layer=layer, pooling=pooling, **self.options)

    def _extract(self, texts: Sequence[str], prefix: str, extractor: Any) -> np.ndarray:
        if not texts:
            raise ValueError("X has no texts: found 0 samples, at least 1 is required.")
        if self.memory is None or not isinstance(extractor, FeatureExtractor) or extractor is self.model:
            features = np.asarray(extractor.extract(texts, prefix))
        else:
            features = extractor.extract(texts, prefix, self._file(extractor, texts, prefix))
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
            raise ValueError(f"the features of text {row} have NaN or infinity.")
        return features

    def _file(self, extractor: FeatureExtractor, texts: Sequence[str], prefix: str) -> Path:
        """Where the memory keeps these features."""
        assert self.memory is not None
        folder = Path(self.memory)
        folder.mkdir(parents=True, exist_ok=True)
        poolings = extractor.poolings
        settings: list[Any] = [
            identity(extractor.model),
            prefix,
            str(extractor.layer),
            poolings[0] if len(poolings) == 1 else str(poolings),
            self.options["overflow"],
            str(self.options["max_length"]),
        ]
        return folder / f"{digest_of_texts([*settings, *texts])[:32]}.npy"
