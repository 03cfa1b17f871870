# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""ALMoST from end to end: what each filter lets through, what the reward models know, what self-play, SFT and RLSF gain under
a reward model that was trained on other queries, and what sharing prefixes saves.

    python -m benchmarks.almost --data-dir shared/data > benchmarks/almost_smollm2.md

The run and its ablations lie in `--work`; each goes on where it was stopped. Rows are stored as they finish and not measured
again. There are no human comparisons here to train an as-is reward model on (the paper takes Stack Exchange's), so the
run's second reward model, which knows other queries, has to agree in its place.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from benchmarks.almost_ablations import FILTERS, GENERATORS, Ablations
from benchmarks.almost_smoke import write_smoke
from benchmarks.almost_speed import SPEED_STAGES, measure_speed
from benchmarks.common import RESULTS, ROOT, Results, data_folder, describe, log, markdown_table, verdict
from peft_ext.rows import read_rows
from trl_ext.almost.pipeline import Pipeline
from trl_ext.almost.recipe import STAGES, AlmostConfig, load_recipe


RECIPE = ROOT / "trl_ext" / "recipes" / "smollm2-135m.yaml"
# The targets.
HELDOUT, HHH, LENGTH, SPEED, HOURS = 0.70, 0.55, 1.5, 1.5, 3.0
PARTS = ("run", "filters", "generators", "samples", "gains", "speed")
# Stages that come after what a part measures.
_LATER = {
    "filters": ("self_play", "sft", "rlsf", "rlsf_queries"),
    "generators": ("self_play", "sft", "rlsf", "rlsf_queries"),
    "samples": ("rlsf", "rlsf_queries"),
}


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure what is missing, then print."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.config, args.data_dir = write_smoke(args.work)
        args.speed_requests = 4
    changes = {} if args.model is None else {"model_name_or_path": args.model}
    config = load_recipe(str(args.config), args.set, run_dir=str(args.work / "run"), **changes)
    config.evaluation["data_dir"] = str(args.data_dir)
    study = Study(args, config)
    if not args.table:
        study.fill()
    print(study.report())


class Study:
    """The run, its ablations and what is stored of them.

    Args:
        args: Flags.
        config: The recipe.
    """

    def __init__(self, args: argparse.Namespace, config: AlmostConfig) -> None:
        self.args, self.config = args, config
        self.results = Results(args.output, config.seed)
        self.ablations = Ablations(config, args.work, args.data_dir, args.limit)

    def settings(self, part: str, name: str = "") -> dict[str, Any]:
        """Everything that a row depends on."""
        left_out = ("run_dir", "evaluation", *_LATER.get(part, ()))
        if part == "speed":
            left_out = tuple(stage for stage in (*STAGES, "run_dir") if stage != name)
        blocks = {key: value for key, value in vars(self.config).items() if key not in left_out}
        return {"part": part, "name": name, "recipe": blocks, "limit": self.args.limit}

    def fill(self) -> None:
        """Measure what isn't stored."""
        for part, name, work in self._jobs():
            if part not in self.args.parts or self.results.find(self.settings(part, name)) is not None:
                continue
            log(f"{part} {name}".strip())
            self.results.add(self.settings(part, name), work())
            gc.collect()

    def _jobs(self) -> list[tuple[str, str, Any]]:
        ablations = self.ablations
        return [
            ("run", "", self._run),
            *(("filters", name, lambda name=name: ablations.filter(name)) for name in FILTERS),
            *(("generators", name, lambda name=name: ablations.generators(name)) for name in GENERATORS),
            ("samples", "", ablations.samples),
            ("gains", "", ablations.gains),
            *(("speed", stage, lambda stage=stage: self._speed(stage)) for stage in SPEED_STAGES),
        ]

    def found(self, part: str, name: str = "") -> Any:
        """A stored result, or None."""
        return self.results.find(self.settings(part, name))

    def _run(self) -> dict[str, Any]:
        pipeline = Pipeline(self.config)
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
        return measure_speed(self.config, stage, self.args.speed_requests)

    def report(self) -> str:
        """All tables and verdicts."""
        parts = [
            self._stages(),
            self._filters(),
            self._ablation("filters", FILTERS),
            self._ablation("generators", GENERATORS),
        ]
        parts += [self._gains(), self._speeds(), self._verdicts(), self._samples(), self._environment()]
        return "\n\n".join(part for part in parts if part)

    def _stages(self) -> str:
        run = self.found("run")
        if run is None:
            return ""
        rows = [[stage, f"{seconds / 60:.1f}"] for stage, seconds in run["seconds"].items()]
        total = sum(run["seconds"].values())
        return "## Time\n\n" + markdown_table(["Stage", "minutes"], [*rows, ["all", f"{total / 60:.1f}"]])

    def _filters(self) -> str:
        run = self.found("run")
        if run is None:
            return ""
        rows = []
        for stage in ("queries", "rlsf_queries", "comparisons"):
            counts = run["counts"].get(stage, {})
            whole = counts.get("generated") or counts.get("responses")
            for name, count in counts.items():
                rows.append([f"{stage}: {name}", count, f"{100 * count / whole:.1f} %" if whole else None])
        return "## Filters\n\n" + markdown_table(["Filter", "count", "of all texts"], rows)

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
        return f"## Reward models: {part}\n\n" + markdown_table(head, rows)

    def _gains(self) -> str:
        gains, samples = self.found("gains"), self.found("samples")
        rows = [*(_gain_rows(gains) if gains else []), *(_gain_rows(samples) if samples else [])]
        if not rows:
            return ""
        head = ["Compared, under the second reward model", "reward", "difference", "characters"]
        lines = [markdown_table(head, rows)]
        if gains:
            lines.append(_static(gains["static"]))
            if gains["kl"]:
                lines.append(
                    f"KL per token: {gains['kl']['start']:.4f} at RLSF's start, {gains['kl']['end']:.4f} at its end."
                )
        return "## Gains\n\n" + "\n\n".join(lines)

    def _speeds(self) -> str:
        rows = []
        for stage in SPEED_STAGES:
            found = self.found("speed", stage)
            if found is not None:
                rows.append(
                    [stage, f"{found['ours']:.1f}", f"{found['plain']:.1f}", f"{found['ours'] / found['plain']:.2f}"]
                )
        head = ["Stage", "tokens a second", "plain generate", "ratio"]
        return "## Speed\n\n" + markdown_table(head, rows) if rows else ""

    def _verdicts(self) -> str:
        run, gains, samples = self.found("run"), self.found("gains"), self.found("samples")
        heuristic = self.found("filters", "heuristic") or {}
        low = {**(gains or {}).get("differences", {}), **(samples or {}).get("differences", {})}
        speeds = [self.found("speed", stage) for stage in SPEED_STAGES]
        ratios = [found["ours"] / found["plain"] for found in speeds if found]
        lengths = gains["length_ratios"] if gains else []
        hours = sum(run["seconds"].values()) / 3600 if run else None
        lines = [
            verdict("accuracy on held-out synthetic pairs", _value(heuristic.get("heldout")), HELDOUT, at_least=True),
            verdict("accuracy on HHH", _value(heuristic.get("hhh")), HHH, at_least=True),
            *(
                verdict(
                    f"{name}: lower end of the difference",
                    low[name]["interval"][0] if name in low else None,
                    0,
                    at_least=True,
                )
                for name in ("best of N over best of 1", "SFT over the start", "RLSF over SFT")
            ),
            verdict("mean length over the start's", max(lengths) if lengths else None, LENGTH),
            verdict("slowest stage over plain generate", min(ratios) if ratios else None, SPEED, at_least=True),
            verdict("hours of the run", hours, HOURS),
        ]
        return "## To reach\n\n" + "\n".join(lines)

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
        return "## Answers before and after\n\n" + "\n\n".join(blocks)

    def _environment(self) -> str:
        rows = [row for row in self.results.rows if row["settings"]["part"] == "run"]
        return describe(rows[-1]["environment"]) if rows else ""


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


def _parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=RECIPE)
    parser.add_argument("--model", help="in place of the recipe's")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=data_folder(),
        help="folder with hhh, truthfulqa and vicuna",
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "almost.json")
    parser.add_argument("--work", type=Path, help="the run and its ablations; default: beside the output")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", type=int, help="only so many rows of HHH and TruthfulQA")
    parser.add_argument("--speed-requests", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", nargs="*", default=[], help="settings in place of the recipe's, as queries.count=100")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and tiny data")
    parser.add_argument("--table", action="store_true", help="print what is stored, measure nothing")
    args = parser.parse_args(argv)
    if args.data_dir is None and not (args.smoke or args.table):
        parser.error("--data-dir is missing: a folder with hhh, truthfulqa and vicuna")
    args.work = args.work or args.output.with_suffix(".work")
    return args


if __name__ == "__main__":
    main()
