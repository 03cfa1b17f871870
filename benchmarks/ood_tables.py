# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The tables of ood_study.md, from the cells of the study that are finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional

import numpy as np

from benchmarks.core.claims import markdown_table
from benchmarks.ood_baselines import SETS
from peft_ext.ood.study.answers import quantisation_answer, size_answer, tuning_answer
from peft_ext.ood.study.methods import METHODS
from peft_ext.ood.study.report import rank_tables
from peft_ext.ood.study.results import CellResult


# The order of the tables' rows: what isn't packed first.
ORDER = (
    "full",
    "linear",
    "bottleneck",
    "lora",
    "prefix",
    "peqa_4bit",
    "peqa_3bit",
    "alphatuning_4bit",
    "alphatuning_3bit",
)
DETECTORS = {"msp": "MSP", "energy": "Energy", "mahalanobis": "Mahalanobis", "relative_mahalanobis": "relative Mahalanobis",
             "cosine": "Cosine", "knn": "kNN", "vim": "ViM"}  # fmt: skip
BUDGET = 0.005
SHALLOW, MIDDLE, DEEP = (f"SmolLM2 {layers} layers" for layers in (10, 20, 30))
MINILM = "MiniLM-L6"
Measure = Callable[[CellResult], Optional[float]]


class Cells:
    """Finished cells, and means of theirs over seeds."""

    def __init__(self, finished: Sequence[CellResult]) -> None:
        self.finished = list(finished)

    def of(self, data: str, model: str, method: str, budget: Optional[float] = BUDGET) -> list[CellResult]:
        """The seeds of a row; methods without a size stand in every budget. None: of any budget."""
        return [
            row
            for row in self.finished
            if (row.cell.setting.name, row.cell.model.name, row.cell.method) == (data, model, method)
            and (budget is None or row.cell.budget in (budget, None))
        ]


def accuracy(name: str) -> Measure:
    """`validation_accuracy` or `id_accuracy`."""
    return lambda row: row.result[name]


def measure(detector: str, name: str = "auroc") -> Measure:
    """A detector's measure."""
    return lambda row: row.measure(detector, name)


def whole_table(
    cells: Cells, title: str, data: str, model: str, name: str = "auroc", budget: Optional[float] = BUDGET
) -> str:
    """A measure of every detector but relative Mahalanobis and ViM, mean and deviation over seeds; beside AUROC, accuracy.

    Args:
        cells: The cells.
        title: Of the first column.
        data, model, budget: Which cells; None: of any budget.
        name: The measure.
    """
    shown = ("msp", "energy", "mahalanobis", "cosine", "knn")
    columns = {DETECTORS[each]: measure(each, name) for each in shown}
    if name == "auroc":
        accuracies = {f"{part} accuracy": accuracy(f"{part.lower()}_accuracy") for part in ("validation", "ID")}
        columns = {**accuracies, **columns}
    lines = []
    for method in ORDER:
        rows = cells.of(data, model, method, budget)
        if rows:
            lines.append([METHODS[method].title, *(_spread(rows, column) for column in columns.values()), len(rows)])
    return markdown_table([title, *columns, "seeds"], lines)


def short_table(
    cells: Cells, title: str, columns: Sequence[tuple[str, str, str, float]], detectors: Sequence[str], digits: int = 1
) -> str:
    """AUROC of some detectors and ID accuracy in one cell, means over seeds.

    Args:
        cells: The cells.
        title: Of the first column.
        columns: Title, set, model and budget of each.
        detectors: Whose AUROC.
        digits: Of the accuracy.
    """
    lines = []
    for method in ORDER:
        found = [cells.of(data, model, method, budget) for _, data, model, budget in columns]
        if any(found) and (len({budget for *_, budget in columns}) == 1 or METHODS[method].config is not None):
            lines.append([METHODS[method].title, *(_brief(rows, detectors, digits) for rows in found)])
    return markdown_table([title, *(name for name, *_ in columns)], lines)


def answers_table(cells: Cells, detectors: Sequence[str] = ("mahalanobis", "msp")) -> str:
    """Differences in AUROC that answer the study's questions, with t intervals over pairs of cells."""
    questions = (
        ("", size_answer),
        ("{}, over full fine-tuning", tuning_answer),
        ("{}, over LoRA of the same budget", quantisation_answer),
    )
    lines = []
    for title, answer in questions:
        found = [
            {name: (interval, count) for name, interval, count in answer(cells.finished, each)[1]}
            for each in detectors
        ]
        for name in found[0]:
            line = [title.format(name) if title else name]
            for each in found:
                interval, count = each[name]
                line.append(f"{100 * interval.value:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})")
            lines.append([*line, found[0][name][1]])
    return markdown_table(["AUROC, points", *(DETECTORS[each] for each in detectors), "pairs"], lines)


def ranks_table(cells: Cells) -> str:
    """Mean ranks of the methods under each detector."""
    methods, _ = rank_tables(cells.finished, list(DETECTORS))
    return markdown_table(["Mean rank among the methods, by AUROC", *DETECTORS.values()], methods.rows)


def rates_table(finished: Sequence[CellResult]) -> str:
    """Validation accuracy by learning rate, best first."""
    found: dict[str, dict[str, float]] = {}
    for row in finished:
        found.setdefault(row.cell.method, {}).update(row.result["searched"])
    lines = []
    for method in ORDER:
        tried = sorted(found.get(method, {}).items(), key=lambda each: -each[1])
        if tried:
            lines.append([METHODS[method].title, ", ".join(f"{rate}: {100 * value:.1f}" for rate, value in tried)])
    return markdown_table(["", "learning rate: validation accuracy, %, best first"], lines)


def recommended_table(study: Sequence[CellResult], recommended: Sequence[CellResult]) -> str:
    """What helps beside the study's own way: means over seeds, with the deviation of AUROC where there are several.

    Args:
        study: The study's cells.
        recommended: Cells of the experiment `recommended`, of which those without a contrastive term are trained as the study's.
    """
    frozen = [row for row in recommended if row.cell.method == "linear"]
    tuned = [row for row in recommended if row.cell.method == "lora"]
    plain = [row for row in (*study, *tuned) if _is_plain(row)]
    contrastive = [row for row in tuned if row.cell.training.contrastive]
    kinds: list[tuple[str, list[CellResult], str]] = [
        ("MiniLM as it is: MSP of a linear probe", frozen, "msp"),
        ("MiniLM as it is: Mahalanobis", frozen, "mahalanobis"),
        ("MiniLM as it is: nearest text (cosine)", frozen, "cosine"),
        ("MiniLM as it is: Mahalanobis cosine, two layers", frozen, "mahalanobis_cosine_layers"),
        ("LoRA as in the study: MSP", plain, "msp"),
        ("LoRA as in the study: Mahalanobis", plain, "mahalanobis"),
        ("LoRA as in the study: nearest text (cosine)", plain, "cosine"),
        ("LoRA, contrastive: MSP", contrastive, "msp"),
        ("LoRA, contrastive: Mahalanobis", contrastive, "mahalanobis"),
        ("LoRA, contrastive: nearest text (cosine)", contrastive, "cosine"),
        ("LoRA, contrastive: nearest text (cosine), two layers", contrastive, "cosine_layers"),
        ("LoRA, contrastive: Mahalanobis cosine", contrastive, "mahalanobis_cosine"),
        ("LoRA, contrastive: Mahalanobis cosine, two layers", contrastive, "mahalanobis_cosine_layers"),
    ]
    names = list(dict.fromkeys(row.cell.setting.name for row in recommended))
    lines = []
    for title, rows, detector in kinds:
        columns = [_of_set([row for row in rows if row.cell.setting.name == name], detector) for name in names]
        if any(columns):
            lines.append([title, *columns])
    headers = ["AUROC / passes at 95 % recall (ID accuracy; seeds)", *(SETS.get(name, name) for name in names)]
    return markdown_table(headers, lines)


def _is_plain(row: CellResult) -> bool:
    cell = row.cell
    return (cell.model.name, cell.method, cell.budget) == (MINILM, "lora", BUDGET) and not cell.training.contrastive


def _of_set(rows: Sequence[CellResult], detector: str) -> Optional[str]:
    if not any(row.measure(detector, "auroc") is not None for row in rows):
        return None
    passes = 100 * _mean(rows, measure(detector, "fpr95"))
    return f"{_spread(rows, measure(detector))} / {passes:.0f} ({100 * _mean(rows, accuracy('id_accuracy')):.1f}; {len(rows)})"


def _brief(rows: Sequence[CellResult], detectors: Sequence[str], digits: int) -> Optional[str]:
    if not rows:
        return None
    aurocs = " / ".join(f"{100 * _mean(rows, measure(each)):.1f}" for each in detectors)
    return f"{aurocs} ({100 * _mean(rows, accuracy('id_accuracy')):.{digits}f})"


def _mean(rows: Sequence[CellResult], column: Measure) -> float:
    return float(np.mean([value for row in rows if (value := column(row)) is not None]))


def _spread(rows: Sequence[CellResult], column: Measure) -> Optional[str]:
    values = [value for row in rows if (value := column(row)) is not None]
    if not values:
        return None
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def tables_of(cells: Cells) -> dict[str, str]:
    """Every table of the page that has cells, by the name of its place."""
    near, own = "clinc150_near", "clinc150_oos"
    sizes = [("10", SHALLOW), ("20", MIDDLE), ("30", DEEP)]
    pair, three = ("msp", "mahalanobis"), ("msp", "mahalanobis", "relative_mahalanobis")
    found = {
        "own": whole_table(cells, "MiniLM-L6 (22M), CLINC150, its own out-of-scope texts", own, MINILM),
        "near": whole_table(cells, "MiniLM-L6 (22M), CLINC150, 40 intents against 110", near, MINILM),
        "budgets": short_table(
            cells,
            "MiniLM-L6, 40 intents against 110, mean of 1 to 3 seeds (below): AUROC of MSP / Mahalanobis (ID accuracy) by "
            "parameters",
            [(f"{100 * budget:g} %", near, MINILM, budget) for budget in (0.001, 0.005, 0.01)],
            pair,
        ),
        "others": short_table(
            cells,
            "MiniLM-L6, other sets, mean of 1 to 3 seeds (below): AUROC of MSP / Mahalanobis / kNN (ID accuracy)",
            [
                ("Banking77, 25 % of intents", "banking77_near", MINILM, BUDGET),
                ("SNIPS, 5 intents against 2", "snips_leave_2_out", MINILM, BUDGET),
                ("CLINC150 against another corpus", "clinc150_far", MINILM, BUDGET),
            ],
            ("msp", "mahalanobis", "knn"),
        ),
        "sizes near": short_table(
            cells,
            "SmolLM2's first layers, the same 40 intents, mean of seeds: AUROC of MSP / Mahalanobis / relative Mahalanobis "
            "(ID accuracy)",
            [(name, "clinc150_near_small", model, BUDGET) for name, model in sizes],
            three,
            0,
        ),
        "sizes own": short_table(
            cells,
            "SmolLM2's first layers, CLINC150 and its own out-of-scope texts, mean of seeds: AUROC of MSP / Mahalanobis / "
            "relative Mahalanobis (ID accuracy)",
            [(name, "clinc150_oos_small", model, BUDGET) for name, model in sizes],
            three,
            0,
        ),
        "fpr": whole_table(
            cells, "The first table's false positives at 95 % recall of what is inside, %", own, MINILM, "fpr95"
        ),
    }
    found = {name: table for name, table in found.items() if table.count("\n") > 1}
    if found:
        found.update(answers=answers_table(cells), ranks=ranks_table(cells))
    return found
