# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The study's YAML file: which cells there are, in which order."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from peft_ext.ood.classifier import POOLINGS
from peft_ext.ood.detectors import make_detector
from peft_ext.ood.study.data import Setting, make_setting
from peft_ext.ood.study.methods import METHODS, get_method
from peft_ext.ood.study.training import TrainingOptions
from peft_ext.runs import plain


DETECTORS = ("msp", "energy", "mahalanobis", "relative_mahalanobis", "cosine", "knn", "vim", "mahalanobis_cosine")
# Of `TrainingOptions`, those of the contrastive term.
_LATER_OPTIONS = ("contrastive", "contrastive_temperature", "together")


@dataclass(frozen=True)
class ModelSpec:
    """A model of the study.

    Attributes:
        name: In tables and results, which it identifies, so that these can be read where the path is another; the last
            part of the path if it isn't given.
        path: What `peft_ext.models.load` takes: None for the default model, a folder, a hub id.
        pooling: None: `"last"` for causal models, `"mean"` for encoders.
        layers: Keep only so many of its first layers.
    """

    name: str
    path: Optional[str] = None
    pooling: Optional[str] = None
    layers: Optional[int] = None


@dataclass(frozen=True)
class Cell:
    """One trained classifier of the study."""

    setting: Setting
    model: ModelSpec
    method: str
    budget: Optional[float]
    seed: int
    training: TrainingOptions

    @property
    def id(self) -> str:
        """Readable, and different wherever anything that the result depends on is; a model stands under its name."""
        budget = "" if self.budget is None else f"-{self.budget * 100:g}pct"
        words = f"{self.setting.name}-{self.model.name}-{self.method}{budget}-seed{self.seed}"
        everything = json.dumps(self.settings(), sort_keys=True)
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', words)}-{hashlib.sha1(everything.encode()).hexdigest()[:8]}"

    def settings(self) -> dict[str, Any]:
        """All that the result depends on, as it comes back from JSON."""
        values = plain(self)
        del values["model"]["path"]
        # options that came later aren't named where they change nothing, so that earlier results are found
        for name in _LATER_OPTIONS if not self.training.contrastive else ():
            del values["training"][name]
        return values

    @property
    def key(self) -> tuple[str, str, str, Optional[float]]:
        """What seeds are averaged over."""
        return self.setting.name, self.model.name, self.method, self.budget


@dataclass
class StudyConfig:
    """A study, as its YAML file says it.

    Attributes:
        output_dir: Where everything goes.
        sets: Names of data settings, or mappings (see `data.Setting`).
        models: Paths, or mappings (see `ModelSpec`).
        methods: Names (see `methods.METHODS`).
        budgets: Shares of the backbone's parameters.
        seeds: Seeds; the first one searches learning rates.
        grids: Mappings with any of the five fields above, and with fields of `training` that differ there: cells are run in
            the grids' order, each once. Without them, there is one grid of everything.
        detectors: Names, or mappings with arguments.
        training: See `training.TrainingOptions`.
        data_dir: Where the known data sets' folders lie.
        resamples: Of the bootstrap intervals.
        layers: Layers as `peft_ext.ood.extract` takes them, or `"auto"`: detectors of features are measured on these layers'
            states as well, as `<detector>_layers`.
        keep_features: Keep every cell's features, so that more detectors can be tried without training.
    """

    output_dir: str
    sets: Sequence[Any] = ("clinc150_oos",)
    models: Sequence[Any] = (None,)
    methods: Sequence[str] = tuple(METHODS)
    budgets: Sequence[float] = (0.001, 0.005, 0.01)
    seeds: Sequence[int] = (42, 1, 7)
    grids: Sequence[Mapping[str, Any]] = ()
    detectors: Sequence[Any] = DETECTORS
    training: TrainingOptions = field(default_factory=TrainingOptions)
    data_dir: Optional[str] = None
    resamples: int = 300
    layers: Any = None
    keep_features: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.training, TrainingOptions):
            _check_names("training", self.training, TrainingOptions)
            self.training = TrainingOptions(**self.training)
        for spec in self.detectors:
            make_detector(spec)
        self.cells()

    def cells(self) -> list[Cell]:
        """All cells in order, each once.

        Raises:
            ValueError, TypeError: If a set, model, method or grid is unknown or bad.
        """
        axes = ("sets", "models", "methods", "budgets", "seeds")
        cells: dict[str, Cell] = {}
        for number, grid in enumerate(self.grids or [{}]):
            _check_names(f"grid {number + 1}", grid, (*axes, "training"))
            training = self._training(f"grid {number + 1}", grid.get("training", {}))
            sets, models, methods, budgets, seeds = (
                _listed(axis, grid.get(axis, getattr(self, axis))) for axis in axes
            )
            for seed in seeds:
                for spec in sets:
                    setting = make_setting(spec)
                    for model in map(_model, models):
                        for method in methods:
                            sizes = budgets if get_method(method).config is not None else [None]
                            for budget in sizes:
                                cell = Cell(setting, model, method, budget, int(seed), training)
                                cells.setdefault(cell.id, cell)
        return list(cells.values())

    def searching_cell(self, cell: Cell) -> Optional[Cell]:
        """The cell that chooses the learning rate for this one; None if there is nothing to choose, or it does itself."""
        rates = cell.training.learning_rates.get(cell.method, ())
        if len(rates) < 2:
            return None
        first = next(other for other in self.cells() if (other.key, other.training) == (cell.key, cell.training))
        return None if first.id == cell.id else first

    def _training(self, where: str, changes: Any) -> TrainingOptions:
        """How a grid's cells are trained."""
        _check_names(f"{where}: training", changes, TrainingOptions)
        training = replace(self.training, **changes)
        for name in training.learning_rates:
            get_method(name)
        return training


def read_config(path: Union[str, Path], **overrides: Any) -> StudyConfig:
    """Read a study's YAML file.

    Args:
        path: The file.
        **overrides: Fields that take the file's place, unless None.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError, TypeError: If it holds something unknown or bad.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"config={str(path)!r}: there is no such file.")
    values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"config={str(path)!r} holds a {type(values).__name__}; expected names and values.")
    values.update({name: value for name, value in overrides.items() if value is not None})
    _check_names(str(path), values, StudyConfig)
    if not values.get("output_dir"):
        raise ValueError(f"config={str(path)!r} has no output_dir; say where the results go.")
    return StudyConfig(**values)


def _model(spec: Any) -> ModelSpec:
    if isinstance(spec, ModelSpec):
        return spec
    values = dict(spec) if isinstance(spec, Mapping) else {"path": spec}
    _check_names("model", values, ModelSpec)
    values.setdefault("name", Path(str(values.get("path") or "smollm2-135m-instruct")).name)
    model = ModelSpec(**values)
    if model.pooling is not None and model.pooling not in POOLINGS:
        raise ValueError(f"model {model.name!r}: pooling={model.pooling!r} is unknown; choose one of {POOLINGS}.")
    return model


def _listed(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{name}={value!r} must be a list with at least one entry.")
    return list(value)


def _check_names(where: str, values: Any, allowed: Any) -> None:
    """`allowed`: names, or the dataclass whose fields they are."""
    names = [f.name for f in fields(allowed)] if isinstance(allowed, type) else list(allowed)
    if not isinstance(values, Mapping):
        raise TypeError(f"{where}: {values!r} must be a mapping of names and values.")
    unknown = sorted(set(map(str, values)) - set(names))
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is unknown; choose from {names}.")
