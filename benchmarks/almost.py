# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""ALMoST from end to end: what each filter lets through, what the reward models know, what self-play, SFT and RLSF gain under
a reward model that was trained on other queries, how often answers repeat themselves, and what sharing prefixes saves.

With several seeds the whole recipe runs once for each, from its queries on; ablations and speed are the first seed's. Runs and
ablations lie in the work folder; each goes on where it was stopped. There are no human comparisons here to train an as-is reward
model on (the paper takes Stack Exchange's), so the run's second reward model, which knows other queries, has to agree in its
place.
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
SFT_GAIN, RLSF_GAIN, RLSF_START = "SFT over the start", "RLSF over SFT", "RLSF over the start"
BEST_GAIN = "best of N over best of 1"
# What is measured with every seed; the rest, with the first.
_OF_EACH_SEED = ("run", "gains")
# Stages that come after what a part measures.
_LATER = {
    "filters": ("self_play", "sft", "rlsf", "rlsf_queries"),
    "generators": ("self_play", "sft", "rlsf", "rlsf_queries"),
    "samples": ("rlsf", "rlsf_queries"),
}


def measure(run: Run) -> None:
    """What isn't stored: of every seed what is measured with each, then the rest."""
    seeds = [Almost(run, seed) for seed in _seeds(run)]
    jobs = [(almost, *job) for almost in seeds for job in almost.jobs() if job[0] in _OF_EACH_SEED]
    jobs += [(seeds[0], *job) for job in seeds[0].jobs() if job[0] not in _OF_EACH_SEED]
    for almost, part, name, work in jobs:
        key = almost.key(part, name)
        if part in run.parts and run.find(key) is None:
            log(f"seed {almost.seed}: {part} {name}".strip())
            almost.config.run_dir = str(almost.work / "run")
            run.add(key, work())
            gc.collect()


def _seeds(run: Run) -> list[int]:
    """The experiment's, or the one that `--seed` names."""
    return [run.settings["seed"]] if "seed" in run.settings else run.seeds


class Almost:
    """A recipe's run with one seed, its ablations, and what is stored of them."""

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.seed = run, seed
        recipe, self._data = write_smoke(run.work) if run.smoke else (ROOT / run.recipe, None)
        self.config = load_recipe(str(recipe), [*run.changes, f"seed={seed}"], run_dir="")

    @property
    def work(self) -> Path:
        """Where this seed's run and its ablations lie."""
        return self.run.work / f"seed-{self.seed}"

    @property
    def ablations(self) -> Ablations:
        """What is trained beside the run."""
        return Ablations(self._evaluated(), self.work, self._data_dir(), self.run.limit)

    def key(self, part: str, name: str = "") -> dict[str, Any]:
        """Everything that a row depends on, with the recipe's blocks that have a part in it."""
        left_out = ("run_dir", "evaluation", *_LATER.get(part, ()))
        if part == "speed":
            left_out = tuple(stage for stage in (*STAGES, "run_dir") if stage != name)
        blocks = {key: value for key, value in vars(self.config).items() if key not in left_out}
        if self.run.smoke:
            del blocks["model_name_or_path"]  # a folder
        if blocks["device"] is None:
            del blocks["device"]  # which recipes haven't always had
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
            ("gains", "", lambda: self.ablations.gains()),
            ("samples", "", lambda: self.ablations.samples()),
            *(("speed", stage, lambda stage=stage: self._speed(stage)) for stage in self.run.speed_stages),
            ("unpenalised", "", lambda: self.ablations.unpenalised()),
            ("tasks", "", lambda: self.ablations.tasks()),
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

    def answers(self) -> str:
        """Answers before and after."""
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


class Seeds:
    """What is stored of all seeds of an experiment, as tables and claims."""

    def __init__(self, run: Run) -> None:
        self.every = [Almost(run, seed) for seed in _seeds(run)]
        self.first = self.every[0]

    def found(self, part: str) -> list[tuple[int, Any]]:
        """Seeds with what is stored of a part, where something is."""
        found = [(almost.seed, almost.found(part)) for almost in self.every]
        return [(seed, result) for seed, result in found if result is not None]

    def tables(self) -> dict[str, str]:
        """All tables that have rows."""
        shown = {
            "time": self._stages(),
            "filters": self._filters(),
            "reward models, filters": self._ablation("filters", FILTERS),
            "reward models, generators": self._ablation("generators", GENERATORS),
            "gains": self._gains(),
            "length": self._reward_models(),
            "tasks": self._tasks(),
            "speed": self._speeds(),
            "answers": self.first.answers(),
        }
        return {title: table for title, table in shown.items() if table}

    def _stages(self) -> str:
        runs = self.found("run")
        if not runs:
            return ""
        rows = [[stage, *(_minutes(run["seconds"].get(stage)) for _, run in runs)] for stage in runs[0][1]["seconds"]]
        total = [_minutes(sum(run["seconds"].values())) for _, run in runs]
        heads = ["minutes"] if len(runs) == 1 else [f"minutes, seed {seed}" for seed, _ in runs]
        return markdown_table(["Stage", *heads], [*rows, ["all", *total]])

    def _filters(self) -> str:
        runs = self.found("run")
        if not runs:
            return ""
        rows = []
        for stage in ("queries", "rlsf_queries", "comparisons"):
            every = [run["counts"].get(stage, {}) for _, run in runs]
            for name in dict.fromkeys(name for counts in every for name in counts):
                if any(counts.get(name) for counts in every):
                    rows.append([f"{stage}: {name}", *(cell for counts in every for cell in _counted(counts, name))])
        heads = ["count", "of all texts"]
        if len(runs) > 1:
            heads = [f"{head}, seed {seed}" for seed, _ in runs for head in heads]
        return markdown_table(["Filter", *heads], rows)

    def _ablation(self, part: str, names: Sequence[str]) -> str:
        rows = []
        for name in names:
            found = self.first.found(part, name)
            if found is not None:
                heldout, hhh = found["heldout"], found["hhh"]
                rows.append([name, found["pairs"], _percent(heldout), _percent(hhh)])
        if not rows:
            return ""
        head = ["Reward model", "pairs", "held-out pairs of its own", "HHH"]
        return markdown_table(head, rows)

    def _gains(self) -> str:
        rows = [
            self._of_seed(seed, row)
            for part in ("gains", "samples", "unpenalised")
            for seed, found in self.found(part)
            for row in _gain_rows(found)
        ]
        head = ["Compared, under the second reward model", "reward", "difference", "characters", "repeated 3-grams, %"]
        if any(len(row) > len(head) for row in rows):
            head = [*head, "difference at equal length"]
        return markdown_table(head, [[*row, *[None] * (len(head) - len(row))] for row in rows]) if rows else ""

    def _reward_models(self) -> str:
        rows = []
        for seed, gains in self.found("gains"):
            for name, found in gains.get("reward_models", {}).items():
                held_out, control = found["held_out_correlation"], found["length_control"]
                if held_out and control:
                    correlations = [f"{part['log_tokens']:+.2f}" for part in (control["before"], held_out)]
                    cells = [name, found["pairs"], f"{100 * found['held_out_accuracy']:.1f}", *correlations]
                    rows.append(self._of_seed(seed, cells))
        head = [
            "Reward model",
            "pairs",
            "held-out pairs right, %",
            "correlation with length before its head changed",
            "held out",
        ]
        return markdown_table(head, rows) if rows else ""

    def _tasks(self) -> str:
        rows = [
            self._of_seed(seed, [name, _percent(tasks.get("hhh")), _percent(tasks.get("truthfulqa"))])
            for part in ("gains", "tasks")
            for seed, found in self.found(part)
            for name, tasks in found["static"].items()
        ]
        return markdown_table(["Model", "HHH", "TruthfulQA MC1"], rows) if rows else ""

    def _of_seed(self, seed: int, row: list[Any]) -> list[Any]:
        return [f"{row[0]} (seed {seed})", *row[1:]] if len(self.every) > 1 else row

    def _speeds(self) -> str:
        rows = []
        for stage in SPEED_STAGES:
            found = self.first.found("speed", stage)
            if found is not None:
                rows.append(
                    [stage, f"{found['ours']:.1f}", f"{found['plain']:.1f}", f"{found['ours'] / found['plain']:.2f}"]
                )
        head = ["Stage", "tokens a second", "plain generate", "ratio"]
        return markdown_table(head, rows) if rows else ""

    def claims(self) -> list[Claim]:
        """The targets, of the worst seed."""
        runs, gains = ([found for _, found in self.found(part)] for part in ("run", "gains"))
        heuristic, samples = self.first.found("filters", "heuristic") or {}, self.first.found("samples") or {}
        speeds = [self.first.found("speed", stage) for stage in SPEED_STAGES]
        repeats = [found["repetition_differences"] for found in gains if "repetition_differences" in found]

        def lower_end(name: str, parts: Sequence[Any]) -> Claim:
            ends = [part["differences"][name]["interval"][0] for part in parts if part]
            return Claim(f"{name}: lower end of the difference", _least(ends), 0, at_least=True)

        def repeated(name: str) -> Claim:
            return Claim(
                f"{name}: difference of repeated 3-grams", _most([each[name]["value"] for each in repeats]), 0
            )

        every = {
            "filters": [
                Claim(
                    "accuracy on held-out synthetic pairs", _value(heuristic.get("heldout")), HELDOUT, at_least=True
                ),
                Claim("accuracy on HHH", _value(heuristic.get("hhh")), HHH, at_least=True),
            ],
            "samples": [lower_end(BEST_GAIN, [samples])],
            "gains": [
                lower_end(SFT_GAIN, gains),
                lower_end(RLSF_GAIN, gains),
                *([repeated(SFT_GAIN), repeated(RLSF_START)] if repeats or not gains else []),
                Claim(
                    "mean length over the start's",
                    _most([r for found in gains for r in found["length_ratios"]]),
                    LENGTH,
                ),
            ],
            "speed": [
                Claim(
                    "slowest stage over plain generate",
                    _least([found["ours"] / found["plain"] for found in speeds if found]),
                    SPEED,
                    at_least=True,
                )
            ],
            "run": [Claim("hours of the run", _most([sum(run["seconds"].values()) / 3600 for run in runs]), HOURS)],
        }
        return [claim for part, claims in every.items() if part in self.first.run.parts for claim in claims]


def _gain_rows(part: Mapping[str, Any]) -> list[list[Any]]:
    return [
        [
            row["name"],
            _interval(row["reward"], "{:.3f}"),
            None if row["difference"] is None else _interval(row["difference"], "{:+.3f}"),
            None if row["length"] is None else f"{row['length']:.0f}",
            _percent(row.get("repetition")),
            *([_interval(row["equal"], "{:+.3f}")] if row.get("equal") else []),
        ]
        for row in part["rows"]
    ]


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
    if result["interval"] is None:
        return shown
    low, high = result["interval"]
    return f"{shown} ({100 * low:.0f} to {100 * high:.0f})"


def _counted(counts: Mapping[str, Any], name: str) -> list[Any]:
    """A count, and its share of all texts of the stage."""
    count, whole = counts.get(name, 0), counts.get("generated") or counts.get("responses")
    return [count, f"{100 * count / whole:.1f} %" if whole else None]


def _minutes(seconds: Optional[float]) -> Optional[str]:
    return None if seconds is None else f"{seconds / 60:.1f}"


def _least(values: Sequence[float]) -> Optional[float]:
    return min(values, default=None)


def _most(values: Sequence[float]) -> Optional[float]:
    return max(values, default=None)


def _short(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the evaluation's own file holds."""
    return {stage: value for stage, value in json.loads(json.dumps(counts)).items() if stage != "evaluation"}


def headlines(runs: Runs) -> list[Headline]:
    """Reward model, RLSF, SFT: of the first experiment that has them."""
    area, page, shown = "Writing", "../benchmarks/almost.md", []
    every = [Seeds(run) for run in runs]
    heuristic = next(filter(None, (seeds.first.found("filters", "heuristic") for seeds in every)), None)
    if heuristic:
        heldout, hhh = (_value(heuristic[name]) for name in ("heldout", "hhh"))
        figures = f"{100 * heldout:.1f} % of held-out synthetic pairs, {100 * hhh:.1f} % of HHH"
        wanted = unless(heldout >= HELDOUT and hhh >= HHH, f"{100 * HELDOUT:.0f} and {100 * HHH:.0f}")
        shown.append(Headline(area, "ALMoST, reward model without human labels", figures, wanted, page))
    gains = next(filter(None, ([found for _, found in seeds.found("gains")] for seeds in every)), [])
    for what, title in (
        (RLSF_GAIN, "ALMoST, RLSF over SFT under an independent reward model"),
        (SFT_GAIN, "ALMoST, SFT over the start"),
    ):
        if gains:
            differences = [found["differences"][what] for found in gains]
            wanted = unless(all(each["interval"][0] >= 0 for each in differences), "above")
            figures = "; ".join(_interval(each, "{:+.2f}") for each in differences)
            shown.append(Headline(area, title, figures, wanted, page))
    repeats = [each["repetition_differences"][RLSF_START] for each in gains if "repetition_differences" in each]
    if repeats:
        points = [
            {"value": 100 * each["value"], "interval": [100 * end for end in each["interval"]]} for each in repeats
        ]
        figures = "; ".join(_interval(each, "{:+.1f}") for each in points)
        wanted = unless(all(each["value"] <= 0 for each in repeats), "not above")
        title = "ALMoST, repeated 3-grams of RLSF's answers, points over the start's"
        shown.append(Headline(area, title, figures, wanted, page))
    return shown


TASK = Task(
    measure,
    tables_of_each(lambda run: Seeds(run).tables()),
    lambda runs: [claim for run in runs for claim in Seeds(run).claims()],
    headlines,
)
