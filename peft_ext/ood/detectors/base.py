# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What all detectors share: checked input, scores in blocks, files, and the table of their names."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch

from peft_ext.file_formats import Field, JsonFormat, Tensor, check_tensors, record, text, whole
from peft_ext.files import check_digests, digests, read_json, written_whole
from peft_ext.tensor_files import read_arrays, write_tensors


Array = Union[np.ndarray, torch.Tensor]
BLOCK_ROWS = 2048
_FORMAT = 1
_CONFIG, _WEIGHTS = "detector.json", "detector.safetensors"
_DETECTORS: dict[str, type[Detector]] = {}


class Detector:
    """Base of the detectors. Everything is computed in float64; a higher score means more in-distribution.

    The constructor only stores its arguments, under their names; `fit` checks them. What is learned is in `state_`, a
    dict of arrays, and in `n_features_` and `n_logits_`.
    """

    name: str  # in configs and files
    needs_features = True
    needs_logits = True
    # of the files: the constructor's arguments, and what is learned (`n`: the size of the features)
    params: Mapping[str, Field] = {}
    tensors: Mapping[str, Tensor] = {}

    state_: dict[str, np.ndarray]
    n_features_: Optional[int]
    n_logits_: Optional[int]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            _DETECTORS[cls.name] = cls

    def get_params(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def fit(
        self, features: Optional[Array] = None, logits: Optional[Array] = None, labels: Optional[Any] = None
    ) -> Detector:
        """Learn from in-distribution training examples.

        Args:
            features: What the classifier's head sees `[examples, size]`; of any float type.
            logits: What it gives `[examples, classes]`.
            labels: The classes `[examples]`, numbers or names.

        Raises:
            ValueError: If something that the detector needs is missing, empty, not finite (names the rows), or of
                another number of examples.
        """
        self._check_params()
        known = {
            "features": _matrix(features, "features") if self.needs_features else None,
            "logits": _matrix(logits, "logits") if self.needs_logits else None,
        }
        lengths = {name: len(value) for name, value in known.items() if value is not None}
        if labels is not None:
            labels = np.asarray(labels)
            lengths["labels"] = len(labels)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the numbers of examples differ: {lengths}.")
        if not all(lengths.values()):
            raise ValueError(f"{type(self).__name__} can't be fitted on no examples at all.")
        self.n_features_, self.n_logits_ = (None if v is None else v.shape[1] for v in known.values())
        self.state_ = self._fit(known["features"], known["logits"], labels)
        return self

    def score(self, features: Optional[Array] = None, logits: Optional[Array] = None) -> Union[np.ndarray, float]:
        """How in-distribution examples are: `[examples]`, float64, or one number for one example.

        Args:
            features: `[examples, size]`, or `[size]` for one example.
            logits: `[examples, classes]`, or `[classes]`.

        Raises:
            ValueError: If the detector isn't fitted, was fitted on features of another size, or an input is missing or
                not finite (names the rows).
        """
        if not hasattr(self, "state_"):
            raise ValueError(f"this {type(self).__name__} isn't fitted yet; call fit(features, logits, labels) first.")
        inputs: dict[str, np.ndarray] = {}
        single = False
        for name, value, needed, size in (
            ("features", features, self.needs_features, self.n_features_),
            ("logits", logits, self.needs_logits, self.n_logits_),
        ):
            if needed:
                single = value is not None and value.ndim == 1
                inputs[name] = self._checked(value, name, size, single)
        if len({len(value) for value in inputs.values()}) > 1:
            raise ValueError(f"the numbers of examples differ: { {n: len(v) for n, v in inputs.items()} }.")
        count = len(next(iter(inputs.values())))
        scores = np.empty(count)
        for rows in blocks(count):
            part = {name: value[rows].astype(np.float64) for name, value in inputs.items()}
            scores[rows] = self._score(part.get("features"), part.get("logits"))
        return float(scores[0]) if single else scores

    def save_pretrained(self, save_directory: Union[str, os.PathLike]) -> None:
        """Write `detector.json` and `detector.safetensors` into a folder, which is made if need be."""
        if not hasattr(self, "state_"):
            raise ValueError(f"this {type(self).__name__} isn't fitted yet, so there is nothing to save.")
        folder = Path(save_directory)
        folder.parent.mkdir(parents=True, exist_ok=True)
        config = {
            "detector": self.name,
            "params": self.get_params(),
            "n_features": self.n_features_,
            "n_logits": self.n_logits_,
        }
        type(self).file_format().check_written({"format": _FORMAT, **config})
        with written_whole(folder, keep=True) as partial:
            partial.mkdir()
            write_tensors(partial / _WEIGHTS, self.state_)
            type(self).file_format().write(partial / _CONFIG, {**config, "files": digests(partial)})

    @classmethod
    def file_format(cls) -> JsonFormat:
        """What `detector.json` holds for a detector of this class."""
        size = whole(1)
        return JsonFormat(
            _CONFIG,
            {
                "detector": text(cls.name).means("which detector"),
                "params": record(cls.params).means("the constructor's arguments"),
                "n_features": (size if cls.needs_features else size.or_null()).means("size of the features"),
                "n_logits": (size if cls.needs_logits else size.or_null()).means("number of classes"),
            },
            format=_FORMAT,
            way_out="Fit and save the detector again.",
        )

    @classmethod
    def from_pretrained(cls, folder: Union[str, os.PathLike]) -> Detector:
        """Read what `save_pretrained` wrote; as [`load_detector`], but refuses another class's file."""
        found = load_detector(folder)
        if not isinstance(found, cls):
            raise ValueError(f"{str(folder)!r} holds a {type(found).__name__}, not a {cls.__name__}.")
        return found

    def _check_params(self) -> None:
        """Refuse bad constructor arguments."""

    def _check_sizes(self, sizes: Mapping[str, int], where: str) -> None:
        """Refuse sizes of a file's tensors that don't go with the arguments; `where`: the file, for messages."""

    def _fit(
        self, features: Optional[np.ndarray], logits: Optional[np.ndarray], labels: Optional[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """What is learned; inputs are checked, float64."""
        return {}

    def _score(self, features: Any, logits: Any) -> np.ndarray:
        """Scores of one block of rows, float64 `[rows]`."""
        raise TypeError(f"{type(self).__name__} scores nothing; use one of {sorted(_DETECTORS)}.")

    def _checked(self, value: Optional[Array], name: str, size: Optional[int], single: bool) -> np.ndarray:
        if value is not None and single:
            value = value[None]
        matrix = _matrix(value, name, keep_type=True)
        if matrix.shape[1] != size:
            raise ValueError(
                f"{name} have size {matrix.shape[1]}, but this {type(self).__name__} was fitted on {name} of size {size}: it "
                "belongs to another model, or another layer of it."
            )
        return matrix

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
        return f"{type(self).__name__}({arguments})"


def make_detector(spec: Union[str, Mapping[str, Any], Detector]) -> Detector:
    """A detector from its name, or from a mapping of `name` and its arguments.

    Raises:
        ValueError: If there is none of that name; lists those known.
        TypeError: If it has no such argument.
    """
    if isinstance(spec, Detector):
        return spec
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = arguments.pop("name", None)
    if name not in _DETECTORS:
        raise ValueError(f"detector {name!r} is unknown; choose one of {sorted(_DETECTORS)}.")
    known = list(inspect.signature(_DETECTORS[name].__init__).parameters)[1:]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise TypeError(f"detector {name!r} has no argument {unknown[0]!r}; it has {known}.")
    return _DETECTORS[name](**arguments)


def load_detector(folder: Union[str, os.PathLike]) -> Detector:
    """Read a detector of any kind from the folder that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or of a later version.
    """
    path = Path(folder)
    if not (path / _CONFIG).is_file() or not (path / _WEIGHTS).is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {_CONFIG} and {_WEIGHTS}, as save_pretrained writes them.")
    config = read_json(path / _CONFIG)
    known = {"detector": text(*sorted(_DETECTORS))}
    JsonFormat(_CONFIG, known, _FORMAT, "Fit and save the detector again.").check(config, path / _CONFIG)
    kind = _DETECTORS[config["detector"]]
    kind.file_format().check(config, path / _CONFIG)
    try:
        detector = make_detector({"name": config["detector"], **config["params"]})
        detector._check_params()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path / _CONFIG)!r}: params: {error} Fit and save the detector again.") from error
    detector.n_features_, detector.n_logits_ = config["n_features"], config["n_logits"]
    check_digests(path, config.get("files"), _CONFIG)
    detector.state_ = read_arrays(path / _WEIGHTS)
    sizes = {} if detector.n_features_ is None else {"n": detector.n_features_}
    where = repr(str(path / _WEIGHTS))
    sizes = check_tensors(detector.state_, kind.tensors, where, sizes, "Fit and save the detector again.")
    detector._check_sizes(sizes, where)
    return detector


def blocks(count: int) -> Iterator[slice]:
    """The rows of `count` examples in parts that bound the memory."""
    return (slice(start, min(start + BLOCK_ROWS, count)) for start in range(0, count, BLOCK_ROWS))


def _matrix(value: Optional[Array], name: str, keep_type: bool = False) -> np.ndarray:
    """A checked array `[examples, size]`, float64 unless `keep_type`."""
    if value is None:
        raise ValueError(f"this detector needs {name}; pass {name}=... .")
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    matrix = np.asarray(value)
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu":
        raise ValueError(f"{name} have shape {matrix.shape} and type {matrix.dtype}; pass numbers [examples, size].")
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"{name} have NaN or infinity in rows {bad[:5].tolist()}{more}; find out what the model made of them."
        )
    return matrix if keep_type and matrix.dtype.kind == "f" else matrix.astype(np.float64)
