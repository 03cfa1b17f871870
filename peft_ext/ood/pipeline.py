# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A classifier with a detector behind it: label, score and whether a text is one that the classifier knows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import PushToHubMixin

from peft_ext.file_formats import JsonFormat, list_of, number, one_of, text, truth, whole
from peft_ext.files import check_digests, digests, written_whole
from peft_ext.hub import fetched
from peft_ext.language_model import unwrapped
from peft_ext.model_card import README, Card, note_measured, write_card
from peft_ext.models import load
from peft_ext.ood.card import ood_card
from peft_ext.ood.classifier import POOLINGS, PooledClassifier
from peft_ext.ood.detectors import Detector, load_detector, make_detector
from peft_ext.ood.features import chosen_layers, extract
from peft_ext.ood.thresholds import COMMON, THRESHOLDS, Scored, Thresholds, choose_thresholds


_CONFIG = "ood_pipeline.json"
_OF_ANGLES = (
    "mahalanobis_cosine",
    "cosine",
    "knn",
)  # detectors that gain from a second layer, on CLINC150's validation texts
_PARTS = ("model", "tokenizer", "detector")  # a folder for each
FILE = JsonFormat(
    _CONFIG,
    {
        "threshold": number().means("scores from here on are in-distribution"),
        "offsets": list_of(number())
        .or_null()
        .or_missing()
        .means("by class, what its own threshold lies above that one; null: nothing"),
        "labels": list_of(one_of(text(), whole()), least=1).means("the classes' names, in the order of the logits"),
        "max_length": whole(1).means("tokens of a text at most"),
        "batch_size": whole(1).means("texts at a time"),
        "adapter": truth().means("whether `model/` holds an adapter alone"),
        "classifier": text("pooled", "transformers"),
        "pooling": text(*POOLINGS).or_null(),
        "layers": whole(1).or_null(),
        "feature_layers": list_of(whole(1))
        .or_missing()
        .means("layers whose states the detector sees beside the head's input"),
    },
    format=1,
    way_out="Save the pipeline again.",
)


class Prediction(NamedTuple):
    """Of many texts: the classes' indices, the detector's scores (higher: more in-distribution), and whether they reach
    the threshold."""

    classes: np.ndarray
    scores: np.ndarray
    in_distribution: np.ndarray


class OODPipeline(PushToHubMixin):
    """Called with texts, as a pipeline of transformers is; [`OODPipeline.fit`] makes one from a trained classifier.

    Args:
        model: A model for sequence classification (of transformers, or [`PooledClassifier`]), adapted by PEFT or not.
        tokenizer: Its tokenizer.
        detector: A fitted detector.
        threshold: Scores from here on are in-distribution.
        label_names: The classes' names, in the order of the logits; None: the config's `id2label`.
        max_length: Tokens of a text at most.
        batch_size: Texts at a time.
        offsets: How far each class's own threshold lies above `threshold`, in the order of the logits; None: all have this
            one. A text is judged by the threshold of the class that it is given.
        layers: Layers whose states the detector was fitted on, beside the head's input; see `peft_ext.ood.extract`.

    Raises:
        ValueError: If `threshold` isn't finite, or `offsets` aren't a finite number for each class.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        detector: Detector,
        threshold: float,
        label_names: Optional[Sequence[str]] = None,
        max_length: int = 128,
        batch_size: int = 64,
        offsets: Optional[Sequence[float]] = None,
        layers: Sequence[int] = (),
    ) -> None:
        self.model, self.tokenizer, self.detector = model.eval(), tokenizer, detector
        self.threshold, self.max_length, self.batch_size = float(threshold), max_length, batch_size
        if not np.isfinite(self.threshold):
            raise ValueError(f"threshold={threshold!r} must be a finite number.")
        self.layers = chosen_layers(model, layers)
        self.label_names = list(label_names) if label_names is not None else _config_labels(model)
        self.offsets = None if offsets is None else [float(each) for each in offsets]
        if self.offsets is not None:
            if len(self.offsets) != len(self.label_names) or not np.isfinite(self.offsets).all():
                raise ValueError(
                    f"offsets={self.offsets!r} must be a finite number for each of the {len(self.label_names)} classes."
                )

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        labels: Sequence[Any],
        validation_texts: Sequence[str],
        detector: Union[str, Mapping[str, Any], Detector] = "mahalanobis_cosine",
        id_recall: float = 0.95,
        *,
        thresholds: str = COMMON,
        validation_labels: Optional[Sequence[Any]] = None,
        outside_texts: Optional[Sequence[str]] = None,
        outside_share: float = 0.5,
        layers: Union[None, str, Sequence[int]] = "auto",
        **kwargs: Any,
    ) -> OODPipeline:
        """Fit a detector on a trained classifier's features, and choose the threshold.

        Args:
            model, tokenizer: The classifier.
            texts, labels: In-distribution training examples; labels are names or indices of classes.
            validation_texts: In-distribution examples that were not trained on, for the threshold: scores of training
                examples are too high.
            detector: Name, name with arguments, or a detector. The default was the best on CLINC150's validation texts.
            id_recall: Share of the validation texts that must be accepted.
            thresholds: `"common"`: one for all classes; `"per-class"`: each class has its own, so that a class whose texts
                score lower isn't refused more often; see [`choose_thresholds`].
            validation_labels: The validation texts' labels, as `labels`; with `outside_texts`, texts that get a wrong class
                then count as wrong whether they are accepted or not.
            outside_texts: Examples from outside that were not trained on: then the threshold is the one with the most
                right answers ([`best_threshold`]), and `id_recall` isn't used.
            outside_share: With `outside_texts`, how many of the texts in use come from outside.
            layers: Layers whose states the detector sees beside the head's input, numbered as `peft_ext.ood.extract` takes
                them. None: none. `"auto"`: the last but one under detectors of angles (`"mahalanobis_cosine"`,
                `"cosine"`, `"knn"`), none under others.
            **kwargs: As the constructor.

        Raises:
            ValueError: Names the argument that is no good.
        """
        if thresholds not in THRESHOLDS:
            raise ValueError(f"thresholds={thresholds!r} is unknown; choose one of {THRESHOLDS}.")
        if outside_texts is None and validation_labels is not None:
            raise ValueError("validation_labels are used beside outside_texts alone; pass these, or leave them out.")
        if validation_labels is not None and len(validation_labels) != len(validation_texts):
            raise ValueError(
                f"validation_labels has {len(validation_labels)} labels for {len(validation_texts)} validation_texts."
            )
        options: dict[str, Any] = {name: kwargs[name] for name in ("max_length", "batch_size") if name in kwargs}
        detector = make_detector(detector)
        if layers == "auto" and getattr(detector, "name", None) not in _OF_ANGLES:
            layers = None
        options["layers"] = kwargs["layers"] = chosen_layers(model, layers)
        train = extract(model, tokenizer, texts, **options)
        detector = detector.fit(train.features, train.logits, np.asarray(labels))
        inside = _scored(model, tokenizer, detector, validation_texts, options)
        outside = None if outside_texts is None else _scored(model, tokenizer, detector, outside_texts, options)
        if validation_labels is not None:
            names = kwargs.get("label_names")
            known = _indices(validation_labels, list(names) if names is not None else _config_labels(model))
            inside = inside._replace(right=inside.classes == known)
        chosen = choose_thresholds(
            inside,
            train.logits.shape[1],
            kind=thresholds,
            id_recall=id_recall,
            outside=outside,
            outside_share=outside_share,
        )
        offsets = None if thresholds == COMMON else chosen.offsets.tolist()
        pipeline = cls(model, tokenizer, detector, chosen.common, offsets=offsets, **kwargs)
        accepted = float((inside.scores >= chosen.of(inside.classes)).mean())
        measured = {"in_distribution": accepted}
        if outside is not None:
            measured["outside"] = float((outside.scores >= chosen.of(outside.classes)).mean())
        note_measured(pipeline, f"share of {len(inside.scores)} validation texts that is accepted", **measured)
        return pipeline

    def __call__(self, inputs: Union[str, Sequence[str]]) -> Union[dict[str, Any], list[dict[str, Any]]]:
        """`{"label", "score", "in_distribution"}` of a text, or a list of these of several.

        `label` is the likeliest class, whatever the detector says; `score` the detector's, higher for texts that look
        more like the training data.

        Raises:
            ValueError: If there is no text, or something that is none.
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        strange = [text for text in texts if not isinstance(text, str)]
        if strange:
            raise ValueError(
                f"inputs hold {strange[0]!r}, a {type(strange[0]).__name__}; pass a text or a list of texts."
            )
        predicted = self.predict(texts)
        rows = [
            {"label": self.label_names[index], "score": float(score), "in_distribution": bool(inside)}
            for index, score, inside in zip(*predicted)
        ]
        return rows[0] if isinstance(inputs, str) else rows

    def predict(self, texts: Sequence[str]) -> Prediction:
        """As arrays."""
        features, logits = extract(
            self.model,
            self.tokenizer,
            texts,
            max_length=self.max_length,
            batch_size=self.batch_size,
            layers=self.layers,
        )
        scores, classes = np.asarray(self.detector.score(features, logits)), logits.argmax(dim=1).numpy()
        offsets = np.zeros(logits.shape[1]) if self.offsets is None else np.asarray(self.offsets)
        return Prediction(classes, scores, scores >= Thresholds(self.threshold, offsets).of(classes))

    def save_pretrained(
        self, save_directory: Union[str, os.PathLike], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write everything into one folder: the model (or its adapter alone), tokenizer, detector and threshold.

        Args:
            save_directory: The folder, which is made if need be.
            push_to_hub: Upload it as well.
            **kwargs: Of `push_to_hub`, such as `repo_id`, `private` and `token`.
        """
        folder = Path(save_directory)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(folder, keep=True, stale=lambda name: name.partition("/")[0] in _PARTS) as partial:
            self._write(partial, folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def _write(self, folder: Path, before: Path) -> None:
        """Write everything into a new folder; `before` may hold a card that a user has edited."""
        folder.mkdir()
        for part, saved in zip(_PARTS, (self.model, self.tokenizer, self.detector)):
            saved.save_pretrained(folder / part)
        base = unwrapped(self.model)
        pooled = isinstance(base, PooledClassifier)
        config = {
            "threshold": self.threshold,
            "offsets": self.offsets,
            "labels": self.label_names,
            "max_length": self.max_length,
            "batch_size": self.batch_size,
            "adapter": isinstance(self.model, PeftModel),
            "classifier": "pooled" if pooled else "transformers",
            "pooling": base.config.pooling if pooled else None,
            "layers": base.config.num_hidden_layers if pooled else None,
            "feature_layers": self.layers,
        }
        # of the adapter alone, which nobody loads by itself
        (folder / "model" / README).unlink(missing_ok=True)
        files = digests(folder)
        if (before / README).is_file():
            shutil.copy(before / README, folder)
        write_card(self.model_card(), folder)
        FILE.write(folder / _CONFIG, {**config, "files": files})

    def model_card(self, token: Any = None, online: bool = False) -> Card:
        """What `save_pretrained` and `push_to_hub` write into README.md; see `peft_ext.model_card`."""
        return ood_card(self, token, online)

    @classmethod
    def from_pretrained(
        cls, name_or_path: Union[str, os.PathLike], model: Optional[nn.Module] = None, **kwargs: Any
    ) -> OODPipeline:
        """Read a pipeline that `save_pretrained` wrote.

        Args:
            name_or_path: The folder, or a repository of the hub.
            model: For an adapter, the base model; None: the one that the adapter's config names is loaded.
            **kwargs: Of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

        Raises:
            FileNotFoundError: If a folder has no such file.
            ValueError: If it was written by a later version, or a file isn't the one that was saved with the others.
        """
        folder = fetched(name_or_path, **kwargs)
        if not (folder / _CONFIG).is_file():
            raise FileNotFoundError(f"{str(folder)!r} has no {_CONFIG}, as OODPipeline.save_pretrained writes it.")
        config = FILE.read(folder / _CONFIG)
        check_digests(folder, config.get("files"), _CONFIG)
        model, tokenizer = _load(folder / "model", config, model), AutoTokenizer.from_pretrained(folder / "tokenizer")
        padding = unwrapped(model).config
        count = len(config["labels"])
        if padding.num_labels != count:
            raise ValueError(
                f"{str(folder / _CONFIG)!r}: labels has {count} names, and the model beside it {padding.num_labels} classes; the "
                "folder is damaged, or was put together from two. Save the pipeline again."
            )
        if padding.pad_token_id is None:  # an adapter's files don't say what was set on its base
            padding.pad_token_id = tokenizer.pad_token_id
        offsets = config.get("offsets")
        if offsets is not None and len(offsets) != count:
            raise ValueError(
                f"{str(folder / _CONFIG)!r}: offsets has {len(offsets)} numbers for {count} labels; the file is damaged or was "
                "changed. Save the pipeline again."
            )
        return cls(
            model,
            tokenizer,
            load_detector(folder / "detector"),
            config["threshold"],
            config["labels"],
            config["max_length"],
            config["batch_size"],
            offsets,
            config.get("feature_layers", ()),
        )


def _scored(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    detector: Detector,
    texts: Sequence[str],
    options: Mapping[str, Any],
) -> Scored:
    features, logits = extract(model, tokenizer, texts, **options)
    return Scored(np.asarray(detector.score(features, logits)), logits.argmax(dim=1).numpy())


def _indices(labels: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    """Labels, names or indices of classes, as indices.

    Raises:
        ValueError: If one is neither.
    """
    places: dict[Any, int] = {index: index for index in range(len(names))}
    places.update({name: index for index, name in enumerate(names)})
    unknown = [label for label in labels if label not in places]
    if unknown:
        raise ValueError(f"validation_labels hold {unknown[0]!r}, which is no class: {list(names)[:5]}...")
    return np.array([places[label] for label in labels])


def _config_labels(model: nn.Module) -> list[str]:
    names = unwrapped(model).config.id2label
    return [names[index] for index in sorted(names)]


def _load(folder: Path, config: Mapping[str, Any], base: Optional[nn.Module]) -> nn.Module:
    pooled, count = config["classifier"] == "pooled", len(config["labels"])
    if not config["adapter"]:
        return PooledClassifier.from_pretrained(folder) if pooled else load(str(folder), kind="classifier")
    if base is None:
        name = PeftConfig.from_pretrained(folder).base_model_name_or_path
        if pooled:
            base = PooledClassifier.from_backbone(name, count, config["pooling"], config["layers"])
        else:
            # the head comes with the adapter
            base = load(name, kind="classifier", num_labels=count, ignore_mismatched_sizes=True)
    try:
        return PeftModel.from_pretrained(base, folder)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        mismatch = str(error).splitlines()[-1].strip().rstrip(".")
        raise ValueError(
            f"{str(folder.parent / _CONFIG)!r}: labels has {count} classes, pooling is {config['pooling']!r}, layers is "
            f"{config['layers']!r}, but the adapter beside it doesn't fit such a model ({mismatch}). Save the pipeline again."
        ) from error
