# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PALP (Cho et al. 2023): a classifier on a frozen language model's hidden states of prompted texts, for scikit-learn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import PushToHubMixin

from generation_ext.probing import choice, saving
from generation_ext.probing.card import palp_card
from generation_ext.probing.demonstrations import (
    DEMONSTRATIONS,
    NONE,
    PER_CLASS,
    check_room,
    nearest_to_means,
    orders,
    prefix_of,
)
from generation_ext.probing.features import POOLING
from generation_ext.probing.heads import AUTO, HEADS, Head, Logistic, Ridge
from generation_ext.probing.inputs import classes_of, examples_of, task_of
from generation_ext.probing.reading import BEST, Extractor, StateReader
from generation_ext.prompts import Example
from generation_ext.shared_prefix.inner_states import without_capturing_hooks
from peft_ext.hub import fetched
from peft_ext.language_model import CAUSAL, language_model
from peft_ext.model_card import Card


try:
    from sklearn.base import BaseEstimator, ClassifierMixin, clone
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise ImportError("PALPClassifier needs scikit-learn: pip install 'peft-ext[probing]'") from error

# What is this process's or this machine's is not saved.
_NOT_SAVED = ("model", "tokenizer", "memory", "memory_limit", "progressbar", "random_state", "label_words", "verbose")
__all__ = ["NONE", "PER_CLASS", "Extractor", "PALPClassifier"]


class PALPClassifier(ClassifierMixin, PushToHubMixin, BaseEstimator):
    """A light classifier on hidden states of a frozen language model, behind a prompt.

    Plain linear probing is `template="{text}"`, PALP-T a template that ends where the label would stand, PALP-D the same
    with `demonstrations="per-class"`: of each class the training sample nearest to the class's mean (of PALP-T features)
    is shown, with its label, before every text. Training texts are encoded behind these in several orders, texts to be
    predicted behind the first. The demonstrations run once for each order.

    What is read are the states of several layers together, means over the text and last tokens, and where the template asks
    for the label, the model's own scores of the label words. How much each of them counts and how much the head is
    regularised follows from the training texts in closed form: one forward pass has all layers (`choice.py`, `ridge.py`).
    The paper reads the last token of the last layer under a logistic regression: `layer=-1, pooling="last",
    head_params={"C": 0.1}`.

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
        label_scores: Whether the `"ridge"` head may add the model's own scores of the label words behind the text, in the
            share that the training texts ask for. Only where there is something to score: a causal model with its output
            head, a template that asks for the label, classes that are named, and the last layer's last token among what is
            read.
        separator: After each demonstration.
        permutations: Most orders of the demonstrations for training texts (the paper's code: 20); all of them if
            there are fewer.
        head: `"ridge"`, `"logistic"`, `"svm"`, `"gda"`, `"knn"` or `"mlp"`, see `heads.py`; on standardised features.
            `"auto"`: `"ridge"`, or `"logistic"` where there are `head_params`.
        head_params: For the head, beside the defaults there. `{"C": 0.1}` sets the C of `"logistic"` and `"svm"`, which is
            otherwise chosen by cross-validation.
        layer: Of [`FeatureExtractor`]; or `"best"`: the layer that is best by cross-validation; or `"auto"`: several together
            for the `"ridge"` head, `"best"` for the others, and where there are more than 4,000 rows to fit on.
        pooling: Of [`FeatureExtractor`], or `"auto"`: both, or where one layer is read, the better one.
        overflow, max_length, memory_limit, progressbar: Of [`FeatureExtractor`].
        memory: A folder to keep features in, for the next fit on the same texts; a fit that was killed goes on.
        random_state: Of the orders, the folds and the head.
        verbose: Print a line that says what was chosen.

    Attributes:
        classes_: `[classes]`.
        blocks_: What is read, in the order of the features: pairs of a layer, counted from 0, the embeddings, and a pooling.
            Empty for an extractor of one's own without `blocks`.
        layer_, pooling_: The same if it is one block; else None.
        label_weight_: What the model's own log-probabilities of the label words are multiplied with before they are added;
            None where they aren't read.
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
        label_scores: bool = True,
        separator: str = "\n",
        permutations: int = 20,
        head: str = AUTO,
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
        self.label_scores = label_scores
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
        self.classes_, codes = classes_of(y)
        self.task_ = self._task()
        examples = examples_of(X, self.task_.fields)
        if len(examples) != len(codes):
            raise ValueError(f"X has {len(examples)} texts, but y {len(codes)} classes.")
        rng = check_random_state(self.random_state)
        texts = [self.task_.text(example) for example in examples]
        self.demonstrations_: list[tuple[Example, Any]] = []
        self.prefix_ = ""
        in_orders = [] if self.demonstrations == NONE else orders(len(self.classes_), int(self.permutations), rng)
        forms, shown = max(1, len(in_orders)), []
        features = self._choose(texts, codes, forms)
        if in_orders:
            seen = choice.standardised(features) if len(self.blocks_) > 1 else features
            shown = nearest_to_means(seen, codes)
            self.demonstrations_ = [(examples[index], name) for index, name in zip(shown, self.classes_.tolist())]
            self.prefix_ = self._prefix(in_orders[0])
            reader = self._reader()
            check_room(reader.extractor(), self.prefix_, len(self.classes_))
            # what is read is chosen behind the first order, which texts to predict stand behind as well
            every = [self._choose(texts, codes, forms, self.prefix_, shown)]
            every += [self._reader().read(texts, self._prefix(order)) for order in in_orders[1:]]
            features = np.concatenate(every)
        own = self._label_scores(features)
        features = features if own is None else np.concatenate([features, own], 1)
        self.mean_ = features.mean(0, dtype=np.float64)
        self.scale_ = features.std(0, dtype=np.float64)
        self.scale_[self.scale_ < 1e-8] = 1.0
        if own is not None:
            self.scale_[-own.shape[1] :] = 1.0  # log-probabilities are compared with their mean alone
        seed = int(rng.randint(2**31 - 1))
        self.n_feature_size_ = features.shape[1]
        self._fit_head(self._standardised(features), codes, forms, seed, own is not None, shown)
        if self.verbose:
            print(f"[PALPClassifier] {self.chosen}", flush=True)
        return self

    @property
    def chosen(self) -> str:
        """What is read and how it is regularised, and how that did in cross-validation, as a line."""
        check_is_fitted(self)
        parts = []
        if len(self.blocks_) > 1:
            for pooling, what in (("mean", "means of"), ("last", "the last token of")):
                layers = [str(layer) for layer, each in self.blocks_ if each == pooling]
                parts += [f"{what} layer{'s' * (len(layers) > 1)} {', '.join(layers)}"] * bool(layers)
        elif self.layer_ is None or self.pooling_ is None:
            parts.append("features of the extractor")
        else:
            parts.append(f"layer {self.layer_}, {self.pooling_}")
            if self.layer_scores_:
                score = self.layer_scores_[self.layer_, self.pooling_]
                parts[0] += f" (log-probability {score:.3f}, best of {len(self.layer_scores_)})"
        if self.label_weight_ is not None:
            parts.append(f"the model's own scores of the labels times {self.label_weight_:.2f}")
        if self.C_ is not None:
            held = self.C_scores_.get(self.C_)
            right = f" ({held.right:.1%} of {held.texts} held-out texts right)" if held is not None else ""
            parts.append(f"C {self.C_:g}{right}")
        return ", ".join(parts)

    @property
    def layer_(self) -> Optional[int]:
        """The layer that is read; None if it isn't one."""
        return self.blocks_[0][0] if len(self.blocks_) == 1 else None

    @property
    def pooling_(self) -> Optional[str]:
        """Its pooling; None if more than one block is read."""
        return self.blocks_[0][1] if len(self.blocks_) == 1 else None

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
        """Features `[texts, size]`, as `predict` sees them: block beside block, as `blocks_` says, and if there is a
        `label_weight_`, last the model's own log-probabilities of the label words."""
        check_is_fitted(self)
        texts = [self.task_.text(example) for example in examples_of(X, self.task_.fields)]
        features = self._reader().read(texts, self.prefix_)
        if self.label_weight_ is None:
            return features
        own = self._reader().label_scores(features, self._words())
        if own is None:
            raise ValueError(
                "the classifier adds the model's own scores of the labels, but this model writes no text."
            )
        return np.concatenate([features, own], 1)

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
                "blocks": [list(block) for block in self.blocks_],
                "head": self.head_.name,
                "label_weight": self.label_weight_,
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
        content["params"] = {"layer": -1, "pooling": "last", "label_scores": False, **content["params"]}
        classifier = cls(model, tokenizer, label_words=words, **content["params"])
        classifier.classes_ = np.array(content["classes"])
        classifier.task_ = classifier._task()
        classifier.demonstrations_ = [(text, name) for text, name in content["demonstrations"]]
        classifier.prefix_ = classifier._prefix(range(len(classifier.demonstrations_)))
        chosen = content.get("chosen", {})
        classifier.layer_scores_ = {(layer, name): score for layer, name, score in chosen.get("layer_scores", [])}
        classifier.C_ = chosen.get("C")
        classifier.C_scores_ = {C: choice.Held(*held) for C, *held in chosen.get("C_scores", [])}
        one = [] if chosen.get("layer") is None else [[chosen["layer"], chosen["pooling"]]]
        classifier.blocks_ = [(layer, pooling) for layer, pooling in chosen.get("blocks", one)]
        if not chosen and isinstance(model, nn.Module):
            # earlier versions chose nothing, and counted from the end
            classifier.blocks_ = list(classifier._reader().candidates() or [])
        classifier.label_weight_ = chosen.get("label_weight")
        classifier.mean_, classifier.scale_ = arrays.pop("mean"), arrays.pop("scale")
        own = {name.removeprefix("head."): each for name, each in arrays.items()}
        classifier.head_ = HEADS[chosen.get("head", classifier.head)](own)
        return classifier

    # ---- arguments

    def check_options(self) -> None:
        """Refuse what isn't known, before a model is loaded.

        Raises:
            ValueError: Names the argument.
        """
        known = {"demonstrations": DEMONSTRATIONS, "head": (AUTO, *HEADS), "pooling": (AUTO, *POOLING)}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {choices}.")
        if self.layer not in (AUTO, BEST) and not isinstance(self.layer, (int, np.integer)):
            raise ValueError(f"layer={self.layer!r} must be an integer, {AUTO!r} or {BEST!r}.")
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

    def _task(self) -> Any:
        shown = self.demonstrations == PER_CLASS
        return task_of(self.template, self.separator, self.label_words, self.classes_.tolist(), shown)

    @property
    def _head(self) -> type[Head]:
        if self.head == AUTO:
            return Logistic if self.head_params and set(self.head_params) - set(Ridge.defaults) else Ridge
        return HEADS[self.head]

    # ---- features

    def _reader(self) -> StateReader:
        """What reads states; once fitted, those that were chosen."""
        options = {name: getattr(self, name) for name in ("overflow", "max_length", "memory_limit", "progressbar")}
        blocks = getattr(self, "blocks_", [])
        return StateReader(self.model, self.tokenizer, self.layer, self.pooling, options, self.memory, blocks)

    def _choose(
        self, texts: Sequence[str], codes: np.ndarray, forms: int, prefix: str = "", left_out: Sequence[int] = ()
    ) -> np.ndarray:
        """Features of training texts, of what is chosen on them; see `StateReader.choose`."""
        reader = self._reader()
        join = self._head is Ridge and self.layer == AUTO
        features = reader.choose(texts, codes, self._asks_for_the_label(), join, forms, prefix, left_out)
        self.blocks_: list[choice.Block] = list(reader.blocks)
        self.layer_scores_: dict[choice.Block, float] = reader.scores
        return features

    def _asks_for_the_label(self) -> bool:
        """Whether the last token is one of the template, behind which a causal model would write the label."""
        if isinstance(self.model, nn.Module) and language_model(self.model).kind != CAUSAL:
            return False
        return not self.task_.template.rstrip().endswith("}")

    def _label_scores(self, features: np.ndarray) -> Optional[np.ndarray]:
        """The model's own scores of the labels, for training texts; None where they aren't read."""
        named = self.label_words is not None or all(isinstance(name, str) for name in self.classes_.tolist())
        if not (self.label_scores and named and self._head is Ridge and self._asks_for_the_label()):
            return None
        return self._reader().label_scores(features, self._words())

    def _words(self) -> list[str]:
        """The label words as they would be written behind a text."""
        return [word.lstrip(" ") if self.task_.template.endswith(" ") else word for word in self.task_.words]

    def _standardised(self, features: np.ndarray) -> np.ndarray:
        if features.shape[1] != len(self.mean_):
            raise ValueError(
                f"the model gives features of size {features.shape[1]}, but the classifier was fitted on "
                f"{len(self.mean_)}: it belongs to another model or layer."
            )
        return (features - self.mean_) / self.scale_

    # ---- the head

    def _fit_head(
        self, features: np.ndarray, codes: np.ndarray, forms: int, seed: int, own: bool, shown: Sequence[int]
    ) -> None:
        """Choose C, if it is to be chosen, and fit; of the features, each text has a row behind each order."""
        head, params, classes = self._head, dict(self.head_params or {}), len(self.classes_)
        self.C_: Optional[float] = None
        self.C_scores_: dict[float, choice.Held] = {}
        self.label_weight_: Optional[float] = None
        if head is Ridge:
            self.head_: Head = Ridge.fit(features, np.tile(codes, forms), classes, params, seed, forms, own, shown)
            self.label_weight_ = float(self.head_.arrays["weight"][0, -classes]) if own else None
            return
        if head.grid:
            if params.get("C", AUTO) == AUTO:
                self.C_scores_ = choice.scores_of_C(head, params, features, codes, classes, forms, seed)
                # a text of each class alone tells nothing
                params["C"] = choice.best_C(self.C_scores_) or head.defaults["C"]
            self.C_ = float(params["C"])
        self.head_ = head.fit(features, np.tile(codes, forms), classes, params, seed)

    # ---- the demonstrations' texts

    def _prefix(self, order: Sequence[int]) -> str:
        return prefix_of(self.task_, [self.demonstrations_[index] for index in order])
