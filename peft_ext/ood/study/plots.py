# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The report's plots: AUROC against model size, or against the budget, histograms of scores, ROC curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from peft_ext.files import written_whole
from peft_ext.ood.detectors import make_detector
from peft_ext.ood.study.answers import DETECTOR
from peft_ext.ood.study.grid import StudyConfig
from peft_ext.ood.study.methods import METHODS
from peft_ext.ood.study.results import CellResult, scores_path
from peft_ext.tensor_files import read_arrays


def draw(config: StudyConfig, finished: Sequence[CellResult], folder: Path) -> list[Path]:
    """Draw all plots into a folder; returns their paths.

    Args:
        config: The study.
        finished: Cells that have a result; scores, which are large, may be missing: then their plots are left out.
        folder: Made if need be.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the report's plots need: pip install matplotlib") from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    names = [make_detector(spec).name for spec in config.detectors]
    detector = DETECTOR if DETECTOR in names else names[0]
    paths = []
    for name in dict.fromkeys(row.cell.setting.name for row in finished):
        rows = [row for row in finished if row.cell.setting.name == name]
        if len({row.result["backbone_parameters"] for row in rows}) > 1 or len(_budgets(rows)) < 2:
            paths.append(_against_size(rows, detector, folder / f"sizes_{name}.png"))
        else:
            paths.append(_against_budget(rows, detector, folder / f"budgets_{name}.png"))
        example = _example(config, rows)
        if example is None:
            continue
        scores = read_arrays(scores_path(config, example.cell))
        caption = f"{name}, {example.cell.model.name}, {METHODS[example.cell.method].title}"
        paths.append(_histograms(scores, names, caption, folder / f"scores_{name}.png"))
        paths.append(_roc(scores, names, caption, folder / f"roc_{name}.png"))
    return paths


def _example(config: StudyConfig, rows: Sequence[CellResult]) -> Optional[CellResult]:
    """Whose scores are drawn: the first cell that trained more than a head; None if no scores are kept."""
    kept = [row for row in rows if scores_path(config, row.cell).is_file()]
    return next((row for row in kept if row.cell.method != "linear"), kept[0] if kept else None)


def _budgets(rows: Sequence[CellResult]) -> set[float]:
    return {row.cell.budget for row in rows if row.cell.budget is not None}


def _against_size(rows: Sequence[CellResult], detector: str, target: Path) -> Path:
    figure, axes = _figure(1)
    several = len(_budgets(rows)) > 1
    for method, budget in dict.fromkeys((row.cell.method, row.cell.budget) for row in rows):
        chosen = [row for row in rows if (row.cell.method, row.cell.budget) == (method, budget)]
        title = METHODS[method].title + (f", {budget:.1%}" if several and budget is not None else "")
        _curve(axes[0], chosen, detector, lambda row: row.result["backbone_parameters"], title)
    sizes = {row.result["backbone_parameters"] for row in rows}
    ticks = {size: f"{size / 1e6:.4g}M" for size in sizes}
    return _save_curves(figure, axes[0], rows, detector, "parameters of the model", ticks, target)


def _against_budget(rows: Sequence[CellResult], detector: str, target: Path) -> Path:
    """Methods without a budget are drawn from side to side."""
    figure, axes = _figure(1)
    ends = min(_budgets(rows)), max(_budgets(rows))
    for method in dict.fromkeys(row.cell.method for row in rows):
        chosen = [row for row in rows if row.cell.method == method]
        if chosen[0].cell.budget is None:
            values = _values(chosen, detector, lambda row: 0).get(0)
            if values:
                title = METHODS[method].title
                axes[0].plot([100 * end for end in ends], [np.mean(values)] * 2, linestyle="--", label=title)
        else:
            _curve(axes[0], chosen, detector, lambda row: 100 * (row.cell.budget or 0), METHODS[method].title)
    ticks = {100 * budget: f"{100 * budget:g}" for budget in _budgets(rows)}
    return _save_curves(figure, axes[0], rows, detector, "trained parameters, % of the model's", ticks, target)


def _curve(
    axis: Any, rows: Sequence[CellResult], detector: str, position: Callable[[CellResult], float], title: str
) -> None:
    points = _values(rows, detector, position)
    positions = sorted(points)
    means, deviations = ([function(points[x]) for x in positions] for function in (np.mean, np.std))
    axis.errorbar(positions, means, yerr=deviations, marker="o", capsize=3, label=title)


def _values(
    rows: Sequence[CellResult], detector: str, position: Callable[[CellResult], float]
) -> dict[float, list[float]]:
    points: dict[float, list[float]] = {}
    for row in rows:
        value = row.measure(detector, "auroc")
        if value is not None:
            points.setdefault(position(row), []).append(value)
    return points


def _save_curves(
    figure: Any,
    axis: Any,
    rows: Sequence[CellResult],
    detector: str,
    label: str,
    ticks: dict[float, str],
    target: Path,
) -> Path:
    axis.set(xscale="log", xlabel=label, ylabel=f"AUROC, {detector}", title=rows[0].cell.setting.name)
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_xticks([], minor=True)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, target)


def _histograms(scores: dict[str, np.ndarray], detectors: Sequence[str], caption: str, target: Path) -> Path:
    shown = [name for name in detectors if f"{name}.id" in scores]
    figure, axes = _figure(max(len(shown), 1))
    for axis, name in zip(axes, shown):
        inside, outside = scores[f"{name}.id"], scores[f"{name}.outside"]
        # a few far outliers would leave one bin for all others
        low, high = np.quantile(np.concatenate([inside, outside]), [0.005, 0.995])
        for values, label in ((inside, "inside"), (outside, "outside")):
            bins = np.linspace(low, high if high > low else low + 1, 40)
            axis.hist(np.clip(values, low, high), bins=bins, density=True, alpha=0.6, label=label)
        axis.set(title=name, yticks=[])
    axes[0].legend(fontsize=8)
    figure.suptitle(caption)
    return _save(figure, target)


def _roc(scores: dict[str, np.ndarray], detectors: Sequence[str], caption: str, target: Path) -> Path:
    figure, axes = _figure(1)
    for name in detectors:
        if f"{name}.id" not in scores:
            continue
        inside, outside = (np.sort(scores[f"{name}.{kind}"]) for kind in ("id", "outside"))
        thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([inside, outside]))[::-1]])
        rates = [1 - np.searchsorted(values, thresholds, side="left") / len(values) for values in (outside, inside)]
        axes[0].plot(*rates, label=name)
    axes[0].set(xlabel="outside, accepted", ylabel="inside, accepted", title=caption)
    axes[0].legend(fontsize=8)
    return _save(figure, target)


def _figure(columns: int) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    width = 6.4 if columns == 1 else 2.4 * columns
    figure, axes = plt.subplots(1, columns, figsize=(width, 4 if columns == 1 else 2.6), squeeze=False)
    return figure, axes[0]


def _save(figure: Any, target: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    with written_whole(target) as path:
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return target
