# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""ALMoST from end to end: what each filter lets through, what the reward models know, what self-play, SFT and RLSF gain under
a reward model that was trained on other queries, and what sharing prefixes saves.

The run and its ablations lie in the run's work folder; each goes on where it was stopped. There are no human comparisons here
to train an as-is reward model on (the paper takes Stack Exchange's), so the run's second reward model, which knows other
queries, has to agree in its place.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from benchmarks.almost_ablations import FILTERS, GENERATORS, Ablations
from benchmarks.almost_smoke import write_smoke
from benchmarks.almost_speed import SPEED_STAGES, measure_speed
from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.environment import ROOT
from benchmarks.core.run import Run, data_folder, log
from benchmarks.core.task import Runs, Task, tables_of_each
from peft_ext.rows import read_rows
from trl_ext.almost.pipeline import Pipeline
from trl_ext.almost.recipe import STAGES, AlmostConfig, load_recipe


# The targets.
HELDOUT, HHH, LENGTH, SPEED, HOURS = 0.70, 0.55, 1.5, 1.5, 3.0
# Stages that come after what a part measures.
_LATER = {
    "filters": ("self_play", "sft", "rlsf", "rlsf_queries"),
    "generators": ("self_play", "sft", "rlsf", "rlsf_queries"),
    "samples": ("rlsf", "rlsf_queries"),
}


def measure(run: Run) -> None:
    """What isn't stored, in the order of the run's stages."""
    almost = Almost(run)
    almost.config.run_dir = str(run.work / "run")
    for part, name, work in almost.jobs():
        key = almost.key(part, name)
        if part in run.parts and run.find(key) is None:
            log(f"{part} {name}".strip())
            run.add(key, work())
            gc.collect()


class Almost:
    """A recipe's run and its ablations, and what is stored of them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        recipe, self._data = write_smoke(run.work) if run.smoke else (ROOT / run.recipe, None)
        self.config = load_recipe(str(recipe), run.changes, run_dir="")

    @property
    def ablations(self) -> Ablations:
        """What is trained beside the run."""
        return Ablations(self._evaluated(), self.run.work, self._data_dir(), self.run.limit)

    def key(self, part: str, name: str = "") -> dict[str, Any]:
        """Everything that a row depends on, with the recipe's blocks that have a part in it."""
        left_out = ("run_dir", "evaluation", *_LATER.get(part, ()))
        if part == "speed":
            left_out = tuple(stage for stage in (*STAGES, "run_dir") if stage != name)
        blocks = {key: value for key, value in vars(self.config).items() if key not in left_out}
        if self.run.smoke:
            del blocks["model_name_or_path"]  # a folder
        return {"part": part, "name": name, "recipe": blocks}

    def _data_dir(self) -> Path:
        return self._data or data_folder("hhh").parent

    def _evaluated(self) -> AlmostConfig:
        """The recipe with the data that the last stage needs."""
        self.config.evaluation["data_dir"] = str(self._data_dir())
        return self.config

    def jobs(self) -> list[tuple[str, str, Any]]:
        """Part, name and work of every row."""
        return [
            ("run", "", self._run),
            *(("filters", name, lambda name=name: self.ablations.filter(name)) for name in FILTERS),
            *(("generators", name, lambda name=name: self.ablations.generators(name)) for name in GENERATORS),
            ("samples", "", lambda: self.ablations.samples()),
            ("gains", "", lambda: self.ablations.gains()),
            *(("speed", stage, lambda stage=stage: self._speed(stage)) for stage in self.run.speed_stages),
        ]

    def found(self, part: str, name: str = "") -> Any:
        """A stored result, or None."""
        return self.run.find(self.key(part, name))

    def _run(self) -> dict[str, Any]:
        pipeline = Pipeline(self._evaluated())
        counts = pipeline.run()
        seconds = {stage: (pipeline.run_files.manifest(stage) or {})["seconds"] for stage in counts}
        return {"counts": _short(counts), "seconds": seconds, "samples": self._answers(pipeline)}

    def _answers(self, pipeline: Pipeline) -> list[dict[str, str]]:
        """Answers to three questions, before and after; the questions, a data set's, by their ids."""
        files = sorted(
            pipeline.run_files.path("evaluation").glob("answers-*.jsonl"), key=lambda path: path.stat().st_mtime_ns
        )
        answers = [{row["id"]: row for row in read_rows(path)} for path in files]
        if not answers:
            return []
        shown = list(answers[0])[:: max(1, len(answers[0]) // 3)][:3]
        return [
            {"question": str(key), **{str(n): rows[key]["responses"][0] for n, rows in enumerate(answers)}}
            for key in shown
        ]

    def _speed(self, stage: str) -> dict[str, float]:
        return measure_speed(self.config, stage, self.run.speed_requests)

    def tables(self) -> dict[str, str]:
        """All tables that have rows."""
        shown = {
            "time": self._stages(),
            "filters": self._filters(),
            "reward models, filters": self._ablation("filters", FILTERS),
            "reward models, generators": self._ablation("generators", GENERATORS),
            **self._gains(),
            "speed": self._speeds(),
            "answers": self._samples(),
        }
        return {title: table for title, table in shown.items() if table}

    def _stages(self) -> str:
        run = self.found("run")
        if run is None:
            return ""
        rows = [[stage, f"{seconds / 60:.1f}"] for stage, seconds in run["seconds"].items()]
        total = sum(run["seconds"].values())
        return markdown_table(["Stage", "minutes"], [*rows, ["all", f"{total / 60:.1f}"]])

    def _filters(self) -> str:
        run = self.found("run")
        if run is None:
            return ""
        rows = []
        for stage in ("queries", "rlsf_queries", "comparisons"):
            counts = run["counts"].get(stage, {})
            whole = counts.get("generated") or counts.get("responses")
            for name, count in counts.items():
                if not count:
                    continue
                rows.append([f"{stage}: {name}", count, f"{100 * count / whole:.1f} %" if whole else None])
        return markdown_table(["Filter", "count", "of all texts"], rows)

    def _ablation(self, part: str, names: Sequence[str]) -> str:
        rows = []
        for name in names:
            found = self.found(part, name)
            if found is not None:
                heldout, hhh = found["heldout"], found["hhh"]
                rows.append([name, found["pairs"], _percent(heldout), _percent(hhh)])
        if not rows:
            return ""
        head = ["Reward model", "pairs", "held-out pairs of its own", "HHH"]
        return markdown_table(head, rows)

    def _gains(self) -> dict[str, str]:
        gains, samples = self.found("gains"), self.found("samples")
        rows = [*(_gain_rows(gains) if gains else []), *(_gain_rows(samples) if samples else [])]
        head = ["Compared, under the second reward model", "reward", "difference", "characters"]
        shown = {"gains": markdown_table(head, rows)} if rows else {}
        return {**shown, "tasks": _static(gains["static"])} if gains else shown

    def _speeds(self) -> str:
        rows = []
        for stage in SPEED_STAGES:
            found = self.found("speed", stage)
            if found is not None:
                rows.append(
                    [stage, f"{found['ours']:.1f}", f"{found['plain']:.1f}", f"{found['ours'] / found['plain']:.2f}"]
                )
        head = ["Stage", "tokens a second", "plain generate", "ratio"]
        return markdown_table(head, rows) if rows else ""

    def claims(self) -> list[Claim]:
        """The targets."""
        run, gains, samples = self.found("run"), self.found("gains"), self.found("samples")
        heuristic = self.found("filters", "heuristic") or {}
        low = {**(gains or {}).get("differences", {}), **(samples or {}).get("differences", {})}
        speeds = [self.found("speed", stage) for stage in SPEED_STAGES]
        ratios = [found["ours"] / found["plain"] for found in speeds if found]
        lengths = gains["length_ratios"] if gains else []
        hours = sum(run["seconds"].values()) / 3600 if run else None
        return [
            Claim("accuracy on held-out synthetic pairs", _value(heuristic.get("heldout")), HELDOUT, at_least=True),
            Claim("accuracy on HHH", _value(heuristic.get("hhh")), HHH, at_least=True),
            *(
                Claim(
                    f"{name}: lower end of the difference",
                    low[name]["interval"][0] if name in low else None,
                    0,
                    at_least=True,
                )
                for name in ("best of N over best of 1", "SFT over the start", "RLSF over SFT")
            ),
            Claim("mean length over the start's", max(lengths) if lengths else None, LENGTH),
            Claim("slowest stage over plain generate", min(ratios) if ratios else None, SPEED, at_least=True),
            Claim("hours of the run", hours, HOURS),
        ]

    def _samples(self) -> str:
        run = self.found("run")
        if not run or not run["samples"]:
            return ""
        names = ["start", "sft", "rlsf"]
        blocks = []
        for sample in run["samples"]:
            lines = [f"**Vicuna's question {sample['question']}**"]
            lines += [
                f"- {name}: {' '.join(sample[str(n)].split())[:400]}"
                for n, name in enumerate(names)
                if str(n) in sample
            ]
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)


def _gain_rows(part: Mapping[str, Any]) -> list[list[Any]]:
    return [
        [
            row["name"],
            _interval(row["reward"], "{:.3f}"),
            None if row["difference"] is None else _interval(row["difference"], "{:+.3f}"),
            None if row["length"] is None else f"{row['length']:.0f}",
        ]
        for row in part["rows"]
    ]


def _static(static: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [[name, _percent(tasks.get("hhh")), _percent(tasks.get("truthfulqa"))] for name, tasks in static.items()]
    return markdown_table(["Model", "HHH", "TruthfulQA MC1"], rows)


def _interval(result: Mapping[str, Any], form: str) -> str:
    if result["interval"] is None:
        return form.format(result["value"])
    low, high = result["interval"]
    return f"{form.format(result['value'])} ({form.format(low)} to {form.format(high)})"


def _value(result: Any) -> Optional[float]:
    return None if result is None else float(result["value"] if isinstance(result, Mapping) else result)


def _percent(result: Any) -> Optional[str]:
    if result is None:
        return None
    shown = f"{100 * _value(result):.1f}"
    if not isinstance(result, Mapping):
        return shown
    low, high = result["interval"]
    return f"{shown} ({100 * low:.0f} to {100 * high:.0f})"


def _short(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the evaluation's own file holds."""
    return {stage: value for stage, value in json.loads(json.dumps(counts)).items() if stage != "evaluation"}


def headlines(runs: Runs) -> list[Headline]:
    """Reward model, RLSF, SFT."""
    area, page, shown = "Writing", "../benchmarks/almost.md", []
    for almost in map(Almost, runs[:1]):
        heuristic, gains = almost.found("filters", "heuristic"), almost.found("gains")
        if heuristic:
            heldout, hhh = (_value(heuristic[name]) for name in ("heldout", "hhh"))
            figures = f"{100 * heldout:.1f} % of held-out synthetic pairs, {100 * hhh:.1f} % of HHH"
            wanted = unless(heldout >= HELDOUT and hhh >= HHH, f"{100 * HELDOUT:.0f} and {100 * HHH:.0f}")
            shown.append(Headline(area, "ALMoST, reward model without human labels", figures, wanted, page))
        for what, title in (
            ("RLSF over SFT", "ALMoST, RLSF over SFT under an independent reward model"),
            ("SFT over the start", "ALMoST, SFT over the start"),
        ):
            if gains:
                difference = gains["differences"][what]
                wanted = unless(difference["interval"][0] >= 0, "above")
                shown.append(Headline(area, title, _interval(difference, "{:+.2f}"), wanted, page))
    return shown


TASK = Task(
    measure,
    tables_of_each(lambda run: Almost(run).tables()),
    lambda runs: [claim for run in runs for claim in Almost(run).claims()],
    headlines,
)
