# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Texts to a model's pooled states, as a transformer of scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Union

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_ext.models import load_tokenizer
from peft_ext.ood.classifier import POOLINGS, PooledClassifier
from peft_ext.ood.features import extract


class TextFeatures(TransformerMixin, BaseEstimator):
    """Texts to features `[texts, size]`, float32: the pooled last states of a pretrained model, or what the head of a
    trained classifier sees. Nothing is learned from the texts.

    Args:
        model: What names a model, an encoder or a causal one (see `peft_ext.load`; None: the default), loaded when the
            first text comes and not pickled; or a trained classifier, adapted by PEFT or not.
        tokenizer: Its tokenizer; None: loaded by the same name.
        pooling: Of a model that is named, `"last"`, `"mean"` or `"first"`; None: the mean of an encoder's states, the last
            of a causal model's.
        max_length: Tokens of a text at most.
        batch_size: Texts at a time.
    """

    def __init__(
        self,
        model: Optional[Union[str, nn.Module]] = None,
        tokenizer: Optional[PreTrainedTokenizerBase] = None,
        *,
        pooling: Optional[str] = None,
        max_length: int = 128,
        batch_size: int = 64,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.max_length = max_length
        self.batch_size = batch_size

    def fit(self, X: Any = None, y: Any = None) -> TextFeatures:
        """Check the arguments.

        Raises:
            ValueError: Names the argument that is no good.
        """
        named = self.model is None or isinstance(self.model, str)
        if not named and self.tokenizer is None:
            raise ValueError("tokenizer is missing: pass the model's.")
        if self.pooling is not None and (self.pooling not in POOLINGS or not named):
            raise ValueError(
                f"pooling={self.pooling!r}: choose one of {POOLINGS} for a model that is named; a classifier has its own."
            )
        return self

    def transform(self, X: Sequence[str]) -> np.ndarray:
        """Features `[texts, size]`.

        Raises:
            FileNotFoundError, ImportError: If the model that is named isn't there.
            TypeError, ValueError: If an argument or a text is no good.
        """
        self.fit()
        if isinstance(X, (str, bytes)):
            raise TypeError("X must be a sequence of texts, got a single one; pass [text].")
        texts = list(X)
        strange = [text for text in texts if not isinstance(text, str)]
        if strange:
            raise TypeError(f"X holds {strange[0]!r}, a {type(strange[0]).__name__}; pass texts.")
        model, tokenizer = self._parts()
        found = extract(model, tokenizer, texts, max_length=self.max_length, batch_size=self.batch_size)
        return found.features.numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_clone__(self) -> TextFeatures:
        """The model is shared: nothing here changes it."""
        copy = type(self)(**self.get_params(deep=False))
        if hasattr(self, "_loaded"):
            copy._loaded = self._loaded
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """Without a model that was loaded by its name."""
        return {name: value for name, value in super().__getstate__().items() if name != "_loaded"}

    def _parts(self) -> tuple[Any, Any]:
        if isinstance(self.model, nn.Module):
            return self.model, self.tokenizer
        settings = (self.model, self.pooling)
        if getattr(self, "_loaded", (None,))[0] != settings:
            # the head of two classes is never asked
            model = PooledClassifier.from_backbone(self.model, 2, self.pooling).eval()
            self._loaded = (settings, model, load_tokenizer(self.model))
        return self._loaded[1], self.tokenizer or self._loaded[2]
