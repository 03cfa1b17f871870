# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The study's report: tables with mean and deviation over seeds, ranks, two answers with intervals, plots."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from scipy.stats import rankdata

from peft_ext.files import written_whole
from peft_ext.ood.detectors import make_detector
from peft_ext.ood.metrics import Interval
from peft_ext.ood.study.answers import DETECTOR, SECOND_DETECTOR, quantisation_answer, size_answer, tuning_answer
from peft_ext.ood.study.grid import Cell, StudyConfig
from peft_ext.ood.study.manifest import FAILED, SKIPPED, Manifest
from peft_ext.ood.study.methods import METHODS
from peft_ext.ood.study.results import CellResult, finished_cells


class Table(NamedTuple):
    """A part of the report: a heading, text under it, and a table (perhaps without rows)."""

    title: str
    text: str
    headers: list[str]
    rows: list[list[str]]


def write_report(config: StudyConfig) -> Path:
    """Write `report.md`, `report.html` and `plots/` into the output folder; returns the path of `report.md`.

    Cells that failed, were skipped or haven't been run are listed, with the reason.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    finished = finished_cells(config)
    parts = make_tables(config, finished)
    plots = _plots(config, finished)
    with written_whole(folder / "report.md") as path:
        path.write_text(_markdown(parts, plots), encoding="utf-8")
    with written_whole(folder / "report.html") as path:
        path.write_text(_html(parts, plots), encoding="utf-8")
    return folder / "report.md"


def make_tables(config: StudyConfig, finished: Sequence[CellResult]) -> list[Table]:
    """All parts of the report."""
    names = [make_detector(spec).name for spec in config.detectors]
    by_set: dict[str, list[CellResult]] = {}
    for row in finished:
        by_set.setdefault(row.cell.setting.name, []).append(row)
    parts = [_summary(config, finished)]
    for name, rows in by_set.items():
        parts.append(_accuracy_table(name, rows))
        for measure, title in (
            ("auroc", "AUROC"),
            ("fpr95", "FPR at 95 % ID recall (share of OOD texts that pass)"),
            ("aupr_out", "AUPR, OOD positive"),
        ):
            parts.append(_measure_table(f"{name}: {title}", rows, names, measure))
    if finished:
        parts += [*rank_tables(finished, names), *_answers(finished)]
    parts.append(_unfinished(config, finished))
    return parts


def grouped(rows: Iterable[CellResult]) -> list[list[CellResult]]:
    """Cells that differ in the seed only, together."""
    groups: dict[str, list[CellResult]] = {}
    for row in rows:
        same = {name: value for name, value in row.cell.settings().items() if name != "seed"}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(row)
    return list(groups.values())


def _summary(config: StudyConfig, finished: Sequence[CellResult]) -> Table:
    cells = config.cells()
    epochs, batches = (
        " or ".join(map(str, sorted({getattr(cell.training, name) for cell in cells})))
        for name in ("epochs", "batch_size")
    )
    text = (
        f"{len(finished)} of {len(cells)} cells are finished. AUROC: the chance that an in-distribution text scores higher than "
        "an out-of-distribution one. All numbers are mean ± standard deviation over seeds, in percent; nothing outside "
        f"the distribution is trained on or selected by. At most {epochs} epochs, best epoch by validation accuracy, "
        f"batches of {batches}."
    )
    cuts = {row.cell.setting.name: row.result["examples"] for row in finished}
    rows = [[name, *(f"{count:,}" for count in parts.values())] for name, parts in cuts.items()]
    headers = ["Set", "Training texts", "Validation", "Test, inside", "Test, outside"]
    return Table("Out-of-distribution detection", text, headers, rows)


def _accuracy_table(name: str, rows: Sequence[CellResult]) -> Table:
    headers = ["Model", "Method", "Budget", "Size", "Trained", "Rate", "Validation accuracy", "ID accuracy", "Seeds"]
    table = []
    for group in grouped(rows):
        first = group[0].result
        share = first["parameters"] / first["backbone_parameters"]
        size = "" if first["size"] is None else f"{first['size_name']} {first['size']}"
        trained = f"{first['parameters']:,} ({share:.2%})"
        accuracies = (_spread([r.result[k] for r in group]) for k in ("validation_accuracy", "id_accuracy"))
        table.append(
            [*_labels(group[0].cell), size, trained, f"{first['learning_rate']:g}", *accuracies, str(len(group))]
        )
    return Table(f"{name}: accuracy", "", headers, table)


def _measure_table(title: str, rows: Sequence[CellResult], detectors: Sequence[str], measure: str) -> Table:
    table = []
    for group in grouped(rows):
        cells = []
        for detector in detectors:
            values = [v for row in group if (v := row.measure(detector, measure)) is not None]
            cells.append(_spread(values) if values else "failed")
        table.append([*_labels(group[0].cell), *cells])
    notes = sorted({f"{d}: {r.result['detectors'][d]['error']}" for r in rows for d in detectors
                    if "error" in r.result["detectors"].get(d, {})})  # fmt: skip
    return Table(title, " ".join(notes), ["Model", "Method", "Budget", *detectors], table)


def rank_tables(finished: Sequence[CellResult], detectors: Sequence[str]) -> list[Table]:
    """Mean ranks by AUROC: of the methods, and of the detectors."""
    among_methods = [
        {(row.cell.method, detector): row.measure(detector, "auroc") for row in rows}
        for rows in _competitions(finished)
        for detector in detectors
    ]
    among_detectors = [
        {(row.cell.method, detector): row.measure(detector, "auroc") for detector in detectors} for row in finished
    ]
    methods = list(dict.fromkeys(row.cell.method for row in finished))
    return [
        _rank_table(
            "Ranks of the methods",
            "Mean rank by AUROC (1 is best) among the methods of the same set, model, budget and seed; full fine-tuning and "
            "the linear probe stand in every budget.",
            among_methods,
            methods,
            detectors,
        ),
        _rank_table(
            "Ranks of the detectors",
            "Mean rank by AUROC (1 is best) among the detectors behind the same classifiers.",
            among_detectors,
            methods,
            detectors,
        ),
    ]


def _rank_table(
    title: str,
    text: str,
    competitions: Iterable[dict[tuple[str, str], Optional[float]]],
    methods: Sequence[str],
    detectors: Sequence[str],
) -> Table:
    ranks: dict[tuple[str, str], list[float]] = {}
    for competition in competitions:
        measured = {entry: value for entry, value in competition.items() if value is not None}
        for entry, rank in zip(measured, rankdata([-value for value in measured.values()])):
            ranks.setdefault(entry, []).append(float(rank))
    rows = []
    for method in methods:
        means = [f"{np.mean(ranks[entry]):.1f}" if (entry := (method, d)) in ranks else "-" for d in detectors]
        rows.append([METHODS[method].title, *means])
    return Table(title, text, ["Method", *detectors], rows)


def _competitions(finished: Sequence[CellResult]) -> list[list[CellResult]]:
    """Groups of cells that differ in the method only; those without a budget stand in every budget's."""
    groups: dict[Any, list[CellResult]] = {}
    for row in finished:
        if row.cell.budget is not None:
            groups.setdefault((row.cell.setting.name, row.cell.model.name, row.cell.seed, row.cell.budget), []).append(
                row
            )
    for row in finished:
        if row.cell.budget is None:
            for key, rows in groups.items():
                if key[:3] == (row.cell.setting.name, row.cell.model.name, row.cell.seed):
                    rows.append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def _answers(finished: Sequence[CellResult]) -> list[Table]:
    headers = ["", "Difference in AUROC", "95 % interval", "Pairs"]
    measured = {name for row in finished for name in row.result["detectors"]}
    caution = (
        "Differences between cells that differ in nothing else, with t intervals over these pairs: as if they were independent, "
        "which seeds of one set and model are not, and about these sets and models, not about others."
    )
    parts = [Table("Answers", caution, headers, [])]
    for detector in [name for name in (DETECTOR, SECOND_DETECTOR) if name in measured] or [DETECTOR]:
        for title, (text, rows) in (
            (f"Do larger models detect better? ({detector})", size_answer(finished, detector)),
            (f"Do the tuning methods differ? ({detector})", tuning_answer(finished, detector)),
            (f"What does quantising the base do? ({detector})", quantisation_answer(finished, detector)),
        ):
            table = [[name, f"{v.value:+.1%}", _range(v, count), str(count)] for name, v, count in rows]
            parts.append(Table(title, text, headers, table))
    return parts


def _range(interval: Interval, count: int) -> str:
    return "of one pair, none" if count == 1 else f"{interval.low:+.1%} to {interval.high:+.1%}"


def _unfinished(config: StudyConfig, finished: Sequence[CellResult]) -> Table:
    events = Manifest(config.output_dir).last()
    done = {row.cell.id for row in finished}
    rows = []
    for cell in config.cells():
        if cell.id in done:
            continue
        event = events.get(cell.id, {})
        status = event.get("status") if event.get("status") in (FAILED, SKIPPED) else "not finished"
        rows.append([cell.setting.name, *_labels(cell), str(cell.seed), f"**{status}**", event.get("reason", "")])
    text = "" if rows else "None."
    return Table(
        "Cells without a result", text, ["Set", "Model", "Method", "Budget", "Seed", "Status", "Reason"], rows
    )


def _labels(cell: Cell) -> list[str]:
    budget = "" if cell.budget is None else f"{cell.budget:.1%}"
    return [cell.model.name, METHODS[cell.method].title, budget]


def _spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, in percent."""
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def _plots(config: StudyConfig, finished: Sequence[CellResult]) -> list[Path]:
    if not finished:
        return []
    from peft_ext.ood.study.plots import draw

    return draw(config, finished, Path(config.output_dir) / "plots")


def _markdown(parts: Sequence[Table], plots: Sequence[Path]) -> str:
    lines = []
    for number, part in enumerate(parts):
        lines += [f"{'#' if number == 0 else '##'} {part.title}", ""]
        lines += [part.text, ""] if part.text else []
        if part.rows:
            lines += ["| " + " | ".join(part.headers) + " |", "|---|" + "---:|" * (len(part.headers) - 1)]
            lines += [
                "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
                for row in part.rows
            ]
            lines += [""]
    lines += [f"![{path.stem}](plots/{path.name})" for path in plots]
    return "\n".join(lines).rstrip() + "\n"


_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}"
)


def _html(parts: Sequence[Table], plots: Sequence[Path]) -> str:
    lines = ["<!doctype html>", '<meta charset="utf-8">', f"<title>{html.escape(parts[0].title)}</title>"]
    lines += [f"<style>{_STYLE}</style>"]
    for number, part in enumerate(parts):
        level = 1 if number == 0 else 2
        lines += [f"<h{level}>{html.escape(part.title)}</h{level}>"]
        lines += [f"<p>{html.escape(part.text)}</p>"] if part.text else []
        if part.rows:
            lines += [
                "<table>",
                _html_row(part.headers, "th"),
                *(_html_row(row, "td") for row in part.rows),
                "</table>",
            ]
    lines += [f'<p><img src="plots/{path.name}" alt="{path.stem}"></p>' for path in plots]
    return "\n".join(lines) + "\n"


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell.strip('*'))}</{tag}>" for cell in cells) + "</tr>"
