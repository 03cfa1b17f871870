# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PALP (Cho et al. 2023): a classifier on a frozen language model's hidden states of prompted texts, for scikit-learn."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Protocol, Union

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import PushToHubMixin

from generation_ext.probing import choice, saving
from generation_ext.probing.card import palp_card
from generation_ext.probing.features import ALL, POOLING, FeatureExtractor, digest_of_texts
from generation_ext.probing.heads import AUTO, HEADS, Head
from generation_ext.prompts import Example, Task
from generation_ext.shared_prefix.inner_states import without_capturing_hooks
from peft_ext.hub import fetched
from peft_ext.language_model import CAUSAL, identity, language_model
from peft_ext.model_card import Card


try:
    from sklearn.base import BaseEstimator, ClassifierMixin, clone
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise ImportError("PALPClassifier needs scikit-learn: pip install 'peft-ext[probing]'") from error

# What is this process's or this machine's is not saved.
_NOT_SAVED = ("model", "tokenizer", "memory", "memory_limit", "progressbar", "random_state", "label_words", "verbose")
NONE, PER_CLASS = DEMONSTRATIONS = ("none", "per-class")


class Extractor(Protocol):
    """What turns texts into features; [`FeatureExtractor`] is one.

    It may have `blocks() -> {(layer, pooling): slice}`, which says what stands where in its features: these are then what
    `layer` and `pooling` name, or are chosen from.
    """

    def extract(self, texts: Sequence[str], prefix: str = "") -> np.ndarray:
        """`[texts, size]`."""


class PALPClassifier(ClassifierMixin, PushToHubMixin, BaseEstimator):
    """A light classifier on hidden states of a frozen language model, behind a prompt.

    Plain linear probing is `template="{text}"`, PALP-T a template that ends where the label would stand, PALP-D the same
    with `demonstrations="per-class"`: of each class the training sample nearest to the class's mean (of PALP-T features)
    is shown, with its label, before every text. Training texts are encoded behind these in several orders, texts to be
    predicted behind the first. The demonstrations run once for each order.

    Which layer's states are read, of the last token or as the mean over the text, and how much the head is regularised is
    chosen by cross-validation on the training texts (`layer`, `pooling` and C `"auto"`, see `choice.py`): one forward pass
    has all layers, and the choice takes seconds more. The paper reads the last token of the last layer: `layer=-1,
    pooling="last"`.

    Two things differ from the released code: a demonstration of a task of two texts shows both, and it is always one of
    its own class.

    Args:
        model: A causal model, an encoder or an encoder-decoder model, packed and `PeftModel`s too; or an object with
            `extract(texts, prefix) -> features`. Not changed; `clone` shares it.
        tokenizer: The model's.
        template: A text's surroundings, with a slot in braces for each of its fields, as in
            `"Sentence 1: {text}\\nLabel:"`.
        demonstrations: `"none"` or `"per-class"`.
        label_words: Classes -> the words that stand for them in demonstrations, with the space before them; None: a
            space and the class's name. Inside an ensemble that numbers the classes (`VotingClassifier`,
            `StackingClassifier`), the words of the classes' names are taken in their sorted order, with a warning.
        separator: After each demonstration.
        permutations: Most orders of the demonstrations for training texts (the paper's code: 20); all of them if
            there are fewer.
        head: `"logistic"`, `"svm"`, `"gda"`, `"knn"` or `"mlp"`, see `heads.py`; on standardised features.
        head_params: For the head's class in scikit-learn, beside the defaults there. `{"C": 0.1}` sets the C of
            `"logistic"` and `"svm"`, which is otherwise chosen.
        layer: Of [`FeatureExtractor`], or `"auto"`: chosen.
        pooling: Of [`FeatureExtractor`], or `"auto"`: chosen.
        overflow, max_length, memory_limit, progressbar: Of [`FeatureExtractor`].
        memory: A folder to keep features in, for the next fit on the same texts; a fit that was killed goes on.
        random_state: Of the orders, the folds and the head.
        verbose: Print a line that says what was chosen.

    Attributes:
        classes_: `[classes]`.
        layer_, pooling_: What is read: a layer counted from 0, the embeddings, and a pooling. None for an extractor of
            one's own without `blocks`.
        layer_scores_: What was compared: `{(layer, pooling): score}`, log-probability of the right class by the
            leave-one-out estimate, mean over texts; empty if nothing was chosen.
        C_: The head's; None for heads without one.
        C_scores_: `{C: (share right, log-probability, texts)}` of held-out texts; empty if it wasn't chosen.
        demonstrations_: A text and its class for each class, or empty.
        head_: The fitted [`Head`].

    Example:

    ```py
    >>> palp = PALPClassifier(model, tokenizer, template="Review: {text}\\nSentiment:", demonstrations="per-class")
    >>> palp.fit(["a fine film", "two lost hours"], ["good", "bad"]).predict(["what a joy"])
    array(['good'], dtype='<U4')
    ```
    """

    def __init__(
        self,
        model: Optional[Union[nn.Module, Extractor]] = None,
        tokenizer: Optional[PreTrainedTokenizerBase] = None,
        *,
        template: str = "{text}",
        demonstrations: str = NONE,
        label_words: Optional[Mapping[Any, str]] = None,
        separator: str = "\n",
        permutations: int = 20,
        head: str = "logistic",
        head_params: Optional[Mapping[str, Any]] = None,
        layer: Union[int, str] = AUTO,
        pooling: str = AUTO,
        overflow: str = "error",
        max_length: Optional[int] = None,
        memory_limit: Optional[int] = None,
        memory: Optional[Union[str, os.PathLike]] = None,
        random_state: Any = None,
        progressbar: bool = False,
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.demonstrations = demonstrations
        self.label_words = label_words
        self.separator = separator
        self.permutations = permutations
        self.head = head
        self.head_params = head_params
        self.layer = layer
        self.pooling = pooling
        self.overflow = overflow
        self.max_length = max_length
        self.memory_limit = memory_limit
        self.memory = memory
        self.random_state = random_state
        self.progressbar = progressbar
        self.verbose = verbose

    # ---- scikit-learn's methods

    def fit(self, X: Any, y: Any) -> PALPClassifier:
        """Extract features, choose demonstrations, fit the head.

        Args:
            X: Texts: strings, or for a template of several slots mappings, a data frame or an array with a column for
                each slot (in the template's order).
            y: Classes, `[texts]`: strings, integers or booleans.

        Raises:
            TypeError, ValueError: If an argument, a text or a class is no good; if there are fewer than two classes; if
                demonstrations and a text don't fit into the model.
        """
        self._check()
        codes = self._set_classes(y)
        self.task_ = self._task()
        examples = self._examples(X)
        if len(examples) != len(codes):
            raise ValueError(f"X has {len(examples)} texts, but y {len(codes)} classes.")
        rng = check_random_state(self.random_state)
        texts = [self.task_.text(example) for example in examples]
        features = self._chosen(texts, codes)
        self.demonstrations_: list[tuple[Example, Any]] = []
        self.prefix_ = ""
        orders = 1
        if self.demonstrations == PER_CLASS:
            shown = self._choose_demonstrations(examples, features, codes)
            features, orders = self._behind_all_orders(texts, codes, shown, rng)
        self.mean_ = features.mean(0, dtype=np.float64)
        self.scale_ = features.std(0, dtype=np.float64)
        self.scale_[self.scale_ < 1e-8] = 1.0
        seed = int(rng.randint(2**31 - 1))
        self.n_feature_size_ = features.shape[1]
        self._fit_head(self._standardised(features), codes, orders, seed)
        if self.verbose:
            print(f"[PALPClassifier] {self.chosen}", flush=True)
        return self

    @property
    def chosen(self) -> str:
        """What is read and how it is regularised, and how that did in cross-validation, as a line."""
        check_is_fitted(self)
        parts = ["features of the extractor" if self.layer_ is None else f"layer {self.layer_}, {self.pooling_}"]
        if self.layer_ is not None and self.pooling_ is not None and self.layer_scores_:
            score = self.layer_scores_[self.layer_, self.pooling_]
            parts[0] += f" (log-probability {score:.3f}, best of {len(self.layer_scores_)})"
        if self.C_ is not None:
            held = self.C_scores_.get(self.C_)
            right = f" ({held.right:.1%} of {held.texts} held-out texts right)" if held is not None else ""
            parts.append(f"C {self.C_:g}{right}")
        return ", ".join(parts)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each text."""
        scores = self.decision_scores(X)
        return self.classes_[scores.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `[texts, classes]`: the softmax of the head's scores (for an SVM, uncalibrated margins)."""
        scores = self.decision_scores(X)
        odds = np.exp(scores - scores.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def decision_scores(self, X: Any) -> np.ndarray:
        """The head's scores `[texts, classes]`."""
        features = self.transform(X)
        return self.head_.scores(self._standardised(features))

    def transform(self, X: Any) -> np.ndarray:
        """Features `[texts, size]`, as `predict` sees them."""
        check_is_fitted(self)
        texts = [self.task_.text(example) for example in self._examples(X)]
        return self._extract(texts, self.prefix_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "head_")

    def __getstate__(self) -> dict[str, Any]:
        """For workers and pickles: of the model without hooks that can't be pickled."""
        state = dict(super().__getstate__())
        if isinstance(state.get("model"), nn.Module):
            state["model"] = without_capturing_hooks(state["model"])
        return state

    def __sklearn_clone__(self) -> PALPClassifier:
        """The model is shared: copies of it would fill the memory, and nothing here changes it."""
        shared = ("model", "tokenizer")
        params = self.get_params(deep=False)
        copy = type(self)(**{n: v if n in shared else clone(v, safe=False) for n, v in params.items()})
        if hasattr(self, "_metadata_request"):
            copy._metadata_request = self._metadata_request
        return copy

    # ---- saved and loaded

    def save_pretrained(self, folder: Union[str, os.PathLike], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the classifier, without the language model: `palp.json`, `head.safetensors` and a model card.

        Args:
            folder: Where to.
            push_to_hub: Upload it as well.
            **kwargs: Of `push_to_hub`, such as `repo_id`, `private` and `token`.

        Raises:
            NotFittedError: If it isn't fitted.
            TypeError: If its classes are neither strings, numbers nor booleans.
        """
        check_is_fitted(self)
        classes = self.classes_.tolist()
        if not all(isinstance(name, (str, int, float)) for name in classes):
            raise TypeError(f"classes of type {type(classes[0]).__name__} can't be saved; use strings or numbers.")
        content = {
            "params": {name: value for name, value in self.get_params(deep=False).items() if name not in _NOT_SAVED},
            "classes": classes,
            "words": self.task_.words,
            "demonstrations": [[self.task_.values(text), name] for text, name in self.demonstrations_],
            "chosen": {
                "layer": self.layer_,
                "pooling": self.pooling_,
                "C": self.C_,
                "layer_scores": [[*block, score] for block, score in self.layer_scores_.items()],
                "C_scores": [[C, *each] for C, each in self.C_scores_.items()],
            },
        }
        head = {f"head.{name}": array for name, array in self.head_.arrays.items()}
        arrays = {"mean": self.mean_, "scale": self.scale_, **head}
        saving.write(Path(folder), self.model, content, arrays, self.model_card())
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(folder).name), **kwargs)

    def model_card(self, token: Any = None, online: bool = False) -> Card:
        """What `save_pretrained` and `push_to_hub` write into README.md; see `peft_ext.model_card`."""
        check_is_fitted(self)
        return palp_card(self, token, online)

    @classmethod
    def from_pretrained(
        cls,
        folder: Union[str, os.PathLike],
        model: Optional[Union[nn.Module, Extractor]] = None,
        tokenizer: Optional[PreTrainedTokenizerBase] = None,
        **kwargs: Any,
    ) -> PALPClassifier:
        """Load what `save_pretrained` wrote.

        Args:
            folder: The folder, or a repository of the hub.
            model: The language model it was fitted on; None: loaded by the name that the folder has.
            tokenizer: Its tokenizer; None: loaded by the same name.
            **kwargs: Of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

        Raises:
            FileNotFoundError: If there is no classifier in the folder.
            ValueError: If it is damaged, or belongs to another model; names both.
        """
        folder = fetched(folder, **kwargs)
        content, arrays = saving.read(folder)
        model, tokenizer = saving.base_of(folder, content["base_model"], model, tokenizer)
        words = dict(zip(content["classes"], content["words"]))
        # what an earlier version's file leaves out has the value that it had there
        content["params"] = {"layer": -1, "pooling": "last", **content["params"]}
        classifier = cls(model, tokenizer, label_words=words, **content["params"])
        classifier.classes_ = np.array(content["classes"])
        classifier.task_ = classifier._task()
        classifier.demonstrations_ = [(text, name) for text, name in content["demonstrations"]]
        classifier.prefix_ = classifier._prefix(range(len(classifier.demonstrations_)))
        # earlier versions chose nothing
        params = content["params"]
        chosen = content.get("chosen", {"layer": params["layer"], "pooling": params["pooling"]})
        classifier.layer_scores_ = {(layer, name): score for layer, name, score in chosen.get("layer_scores", [])}
        classifier.C_ = chosen.get("C")
        classifier.C_scores_ = {C: choice.Held(*held) for C, *held in chosen.get("C_scores", [])}
        classifier.layer_, classifier.pooling_ = chosen.get("layer"), chosen.get("pooling")
        classifier.mean_, classifier.scale_ = arrays.pop("mean"), arrays.pop("scale")
        classifier.head_ = HEADS[classifier.head]({name.removeprefix("head."): each for name, each in arrays.items()})
        return classifier

    # ---- arguments

    def check_options(self) -> None:
        """Refuse what isn't known, before a model is loaded.

        Raises:
            ValueError: Names the argument.
        """
        known = {"demonstrations": DEMONSTRATIONS, "head": tuple(HEADS), "pooling": (AUTO, *POOLING)}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {choices}.")
        if self.layer != AUTO and not isinstance(self.layer, (int, np.integer)):
            raise ValueError(f"layer={self.layer!r} must be an integer, or {AUTO!r}.")
        if not isinstance(self.permutations, (int, np.integer)) or self.permutations < 1:
            raise ValueError(f"permutations={self.permutations!r} must be a positive integer.")

    def _check(self) -> None:
        self.check_options()
        if self.model is None:
            raise ValueError("model is missing: pass a language model of transformers, and its tokenizer.")
        if isinstance(self.model, nn.Module) and self.tokenizer is None:
            raise ValueError("tokenizer is missing: pass the model's.")
        if not isinstance(self.model, nn.Module) and not hasattr(self.model, "extract"):
            raise TypeError(f"model is a {type(self.model).__name__}; pass a model of transformers and its tokenizer.")

    def _set_classes(self, y: Any) -> np.ndarray:
        if y is None:
            raise ValueError("y is missing: a classifier requires y to be passed, a class for each text.")
        y = np.asarray(y)
        if y.ndim != 1:
            raise ValueError(f"y must have one class for each text, got an array of shape {y.shape}.")
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y has one class alone, {self.classes_.tolist()}: there is nothing to decide; it needs two or more."
            )
        return codes

    def _task(self) -> Task:
        words = self.label_words
        if words is None:
            words = {name: f" {name}" for name in self.classes_.tolist()}
        words = self._of_numbered(words)
        missing = [name for name in self.classes_.tolist() if name not in words]
        if missing:
            raise ValueError(f"label_words={dict(words)!r} has no words for the class {missing[0]!r} of y.")
        empty = sorted(str(name) for name in words if name not in self.classes_.tolist())
        if empty and self.demonstrations == PER_CLASS:
            raise ValueError(f"label_words has the class {empty[0]!r}, but y has no sample of it.")
        return Task(self.template, {n: words[n] for n in self.classes_.tolist()}, separator=self.separator)

    def _of_numbered(self, words: Mapping[Any, str]) -> Mapping[Any, str]:
        """Words by the numbers that scikit-learn's `LabelEncoder` gives sorted classes, as its ensembles pass them on."""
        classes = self.classes_.tolist()
        numbered = all(isinstance(name, str) for name in words) and classes == list(range(len(words)))
        if not numbered:
            return words
        names = sorted(words)
        warnings.warn(
            f"y has the classes {classes}, label_words {names}: taken in this order, as the ensembles of scikit-learn number "
            "classes.",
            stacklevel=4,
        )
        return {number: words[name] for number, name in enumerate(names)}

    def _examples(self, X: Any) -> list[Any]:
        if isinstance(X, (str, bytes)):
            raise TypeError("X must be a sequence of texts, got a single one; pass [text].")
        fields = self.task_.fields
        if hasattr(X, "columns") and hasattr(X, "to_dict"):
            return X.to_dict("records")
        if getattr(X, "ndim", 1) == 2:
            if X.shape[1] != len(fields):
                raise ValueError(f"X has {X.shape[1]} columns, but the template the slots {fields}.")
            return [dict(zip(fields, map(str, row))) for row in X]
        if getattr(X, "ndim", 1) == 0:
            raise ValueError(f"X={X!r} is a single value; pass a sequence of texts.")
        # numpy's and pandas's strings are strings
        return list(X)

    # ---- features

    def _chosen(
        self, texts: Sequence[str], codes: np.ndarray, prefix: str = "", left_out: Collection[int] = ()
    ) -> np.ndarray:
        """Features of training texts, of the layer and pooling that are chosen on them.

        Args:
            texts: Whole texts.
            codes: Their classes.
            prefix: Before each.
            left_out: Indices of texts that say nothing: the prefix has them, with their class.
        """
        self.layer_: Optional[int] = None
        self.pooling_: Optional[str] = None
        self.layer_scores_: dict[choice.Block, float] = {}
        blocks = self._blocks()
        if blocks is None:
            return self._extract(texts, prefix)
        if len(blocks) == 1:
            ((self.layer_, self.pooling_),) = blocks
            return self._extract(texts, prefix)
        rows = choice.sample(codes, max(block.stop for block in blocks.values()))
        states = self._extract([texts[row] for row in rows], prefix, blocks)
        judged = [place for place, row in enumerate(rows.tolist()) if row not in left_out]
        if len(set(codes[rows[judged]].tolist())) < len(self.classes_):
            judged = list(range(len(rows)))
        self.layer_scores_ = choice.scores_of(states[judged], blocks, codes[rows[judged]], len(self.classes_))
        expected = choice.expected_blocks(blocks, self._asks_for_the_label())
        self.layer_, self.pooling_ = choice.best(self.layer_scores_, len(judged), expected)
        features = states[:, blocks[self.layer_, self.pooling_]]
        if len(rows) < len(texts):
            own, others = features, np.setdiff1d(np.arange(len(texts)), rows)
            features = np.empty((len(texts), own.shape[1]), np.float32)
            features[rows] = own
            features[others] = self._extract([texts[row] for row in others], prefix)
        if self.memory is not None and isinstance(self.model, nn.Module):
            # the texts' own predictions ask for them
            extractor = self._extractor()
            assert isinstance(extractor, FeatureExtractor)
            extractor.keep(features, texts, prefix, self._file(extractor, texts, prefix))
        return features

    def _asks_for_the_label(self) -> bool:
        """Whether the last token is one of the template, behind which a causal model would write the label."""
        if isinstance(self.model, nn.Module) and language_model(self.model).kind != CAUSAL:
            return False
        return not self.task_.template.rstrip().endswith("}")

    def _blocks(self) -> Optional[dict[choice.Block, slice]]:
        """What may be read, and where it stands in the features of `_extract`; None if the extractor doesn't say."""
        if isinstance(self.model, nn.Module):
            extractor: Any = self._extractor(every=True)
            return extractor.blocks()
        blocks_of = getattr(self.model, "blocks", None)
        if blocks_of is None:
            return None
        blocks = blocks_of()
        depth = max(layer for layer, _ in blocks)
        layer = self.layer + depth + 1 if not isinstance(self.layer, str) and self.layer < 0 else self.layer
        found = {
            each: place
            for each, place in blocks.items()
            if layer in (AUTO, each[0]) and self.pooling in (AUTO, each[1])
        }
        if not found:
            raise ValueError(f"layer={self.layer!r}, pooling={self.pooling!r}: the extractor has only {list(blocks)}.")
        return found

    def _extract(
        self, texts: Sequence[str], prefix: str = "", blocks: Optional[Mapping[choice.Block, slice]] = None
    ) -> np.ndarray:
        """Features of the layer and pooling that are read, or, with `blocks`, of all that may be."""
        if not texts:
            raise ValueError("X has no texts: found 0 samples, at least 1 is required.")
        extractor = self._extractor(every=blocks is not None)
        if self.memory is None or not isinstance(extractor, FeatureExtractor) or extractor is self.model:
            features = np.asarray(extractor.extract(texts, prefix))
        else:
            features = extractor.extract(texts, prefix, self._file(extractor, texts, prefix))
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
            raise ValueError(f"the features of text {row} have NaN or infinity.")
        if blocks is None and self.layer_ is not None and not isinstance(self.model, nn.Module):
            blocks_of: Any = self.model
            return features[:, blocks_of.blocks()[self.layer_, self.pooling_]]
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
            self.overflow,
            str(self.max_length),
        ]
        return folder / f"{digest_of_texts([*settings, *texts])[:32]}.npy"

    def _extractor(self, every: bool = False) -> Extractor:
        """What gives the states that are read, or, with `every`, all that may be."""
        if not isinstance(self.model, nn.Module):
            return self.model  # type: ignore[return-value]
        layer: Any = self.layer_ if self.layer == AUTO and not every else self.layer
        pooling: Any = self.pooling_ if self.pooling == AUTO and not every else self.pooling
        options: dict[str, Any] = {
            "overflow": self.overflow,
            "max_length": self.max_length,
            "memory_limit": self.memory_limit,
            "progressbar": self.progressbar,
        }
        # what isn't chosen yet is all there is
        layer, pooling = ALL if layer == AUTO else int(layer), POOLING if pooling == AUTO else pooling
        return FeatureExtractor(self.model, self.tokenizer, layer=layer, pooling=pooling, **options)

    def _standardised(self, features: np.ndarray) -> np.ndarray:
        if features.shape[1] != len(self.mean_):
            raise ValueError(
                f"the model gives features of size {features.shape[1]}, but the classifier was fitted on "
                f"{len(self.mean_)}: it belongs to another model or layer."
            )
        return (features - self.mean_) / self.scale_

    # ---- demonstrations

    def _choose_demonstrations(self, examples: list[Any], features: np.ndarray, codes: np.ndarray) -> list[int]:
        """Of each class the sample nearest to its mean; their indices."""
        found = []
        for code, name in enumerate(self.classes_.tolist()):
            own = np.flatnonzero(codes == code)
            distances = ((features[own] - features[own].mean(0)) ** 2).sum(1)
            found.append(int(own[distances.argmin()]))
            self.demonstrations_.append((examples[found[-1]], name))
        self.prefix_ = self._prefix(range(len(self.classes_)))
        self._check_room()
        return found

    def _check_room(self) -> None:
        extractor = self._extractor()
        if not isinstance(extractor, FeatureExtractor) or extractor.max_length is None:
            return
        taken = len(extractor.encoder([self.prefix_])[0])
        if taken >= extractor.max_length:
            raise ValueError(
                f"the demonstrations of {len(self.classes_)} classes take {taken} tokens, but the model takes "
                f"{extractor.max_length}, texts included; use demonstrations='none', or shorter texts."
            )

    def _behind_all_orders(
        self, texts: list[str], codes: np.ndarray, shown: list[int], rng: Any
    ) -> tuple[np.ndarray, int]:
        """Features of the training texts behind every order of the demonstrations, order after order, and how many orders
        there are. What is read is chosen behind the first, which texts to predict stand behind as well."""
        orders = _orders(len(self.classes_), int(self.permutations), rng)
        features = [self._chosen(texts, codes, self._prefix(orders[0]), shown)]
        features += [self._extract(texts, self._prefix(order)) for order in orders[1:]]
        return np.concatenate(features), len(orders)

    # ---- the head

    def _fit_head(self, features: np.ndarray, codes: np.ndarray, orders: int, seed: int) -> None:
        """Choose C, if it is to be chosen, and fit; of the features, each text has a row behind each order."""
        head, params, classes = HEADS[self.head], dict(self.head_params or {}), len(self.classes_)
        self.C_: Optional[float] = None
        self.C_scores_: dict[float, choice.Held] = {}
        if head.grid:
            if params.get("C", AUTO) == AUTO:
                self.C_scores_ = choice.scores_of_C(head, params, features, codes, classes, orders, seed)
                # a text of each class alone tells nothing
                params["C"] = choice.best_C(self.C_scores_) or head.defaults["C"]
            self.C_ = float(params["C"])
        self.head_: Head = head.fit(features, np.tile(codes, orders), classes, params, seed)

    # ---- the demonstrations' texts

    def _prefix(self, order: Sequence[int]) -> str:
        shown = [self.task_.demonstration(*self.demonstrations_[index]) for index in order]
        return "".join(text + self.separator for text in shown)


def _orders(count: int, most: int, rng: Any) -> list[Sequence[int]]:
    """The identity first, then others at random; all of them if there are at most `most`."""
    if count <= 8 and math.factorial(count) <= most:
        return list(itertools.permutations(range(count)))
    orders: dict[tuple[int, ...], None] = {tuple(range(count)): None}
    while len(orders) < most:
        orders[tuple(rng.permutation(count).tolist())] = None
    return list(orders)
