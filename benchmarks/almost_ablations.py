# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What of ALMoST's run is measured beyond the run: reward models of other filters and generators, one sample against N, gains
under the second reward model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import yaml

from peft_ext.rows import Row, read_rows
from trl_ext.almost.data.comparisons import HELDOUT, TRAINING, build_comparisons, write_comparisons
from trl_ext.almost.data.self_play import self_play
from trl_ext.almost.evaluation.run import EvaluationArguments, load_rows
from trl_ext.almost.evaluation.run import run as evaluate
from trl_ext.almost.evaluation.statistics import with_interval
from trl_ext.almost.evaluation.tasks import hhh_of_rewards
from trl_ext.almost.recipe import (
    COMPARISONS,
    EVALUATION,
    RESPONSES,
    REWARD,
    REWARD_2,
    RLSF,
    SCRIPTS,
    SELF_PLAY,
    SFT,
    AlmostConfig,
)
from trl_ext.almost.rewards import RewardModel
from trl_ext.almost.writing.generators import Generator, parse_generators
from trl_ext.almost.writing.loading import backend_of


# Name -> changes of the recipe's comparisons; the as-is reward model comes on top.
FILTERS: dict[str, dict[str, Any]] = {
    "none": {"heuristic_filter": False, "length_aware": False},
    "heuristic": {},
    "heuristic and as-is": {},
}
GENERATORS = ("shots", "bits", "shots and bits")
_OF_THE_RUN = ("heuristic", "shots and bits")


class Ablations:
    """Trains and judges beside a run, from its queries and answers.

    Args:
        config: The run's recipe.
        work: The folder of the run (`run`) and of what is trained here.
        data_dir: With `hhh`, for reward models.
        limit: Only so many rows of HHH.
    """

    def __init__(self, config: AlmostConfig, work: Path, data_dir: Path, limit: Optional[int]) -> None:
        self.config, self.work, self.run, self.limit = config, work, Path(config.run_dir), limit
        self.data_dir = data_dir

    def filter(self, name: str) -> dict[str, Any]:
        """A reward model of comparisons under other filters: pairs, accuracy on its held-out pairs and on HHH."""
        settings = self.config.data_config(COMPARISONS)
        settings = dataclasses.replace(settings, **FILTERS[name])
        reward = self.second().score if "as-is" in name else None
        return self._reward_model(
            name, self._answers(), self.config.data_config(RESPONSES).generators, settings, reward
        )

    def generators(self, name: str) -> dict[str, Any]:
        """A reward model of comparisons between some of the generators."""
        every = parse_generators(self.config.data_config(RESPONSES).generators)
        chosen = [place for place, each in enumerate(every) if name == GENERATORS[2] or _belongs(each, every, name)]
        rows = [{**row, "rung": chosen.index(row["rung"])} for row in self._answers() if row["rung"] in chosen]
        return self._reward_model(
            name, rows, [every[place] for place in chosen], self.config.data_config(COMPARISONS), None
        )

    def samples(self) -> dict[str, Any]:
        """The best of N against the first answer, in the demonstrations and in what SFT makes of them."""
        folder, config = self.work / "one sample", self.config.data_config(SELF_PLAY)
        queries = read_rows(self.run / "queries.jsonl")
        one = dataclasses.replace(config, samples=1)
        backend = backend_of(one)
        self_play(backend, one, queries, folder / "demonstrations.jsonl")
        del backend
        first = {row["id"]: row["messages"] for row in read_rows(folder / "demonstrations.jsonl")}
        best = {row["id"]: row["messages"] for row in read_rows(self.run / "demonstrations.jsonl")}
        shared = [key for key in best if key in first]
        judge, scores = self.second(), {}
        for title, talks in (("1", first), ("N", best)):
            prompts, answers = [talks[key][:1] for key in shared], [talks[key][1]["content"] for key in shared]
            scores[title] = judge.score(prompts, answers)
        self._script(SFT, folder / "sft", dataset_name=str(folder / "demonstrations.jsonl"))
        tuned = self._win_rate(folder / "evaluation", folder / "sft", self._start())
        self._copy_answers(folder / "evaluation")
        above = self._win_rate(folder / "evaluation", self.run / "sft", str(folder / "sft"))
        difference = with_interval([n - one for n, one in zip(scores["N"], scores["1"])])
        rows = [
            _row("first answers, best of 1", with_interval(scores["1"])),
            _row(f"first answers, best of {config.samples}", with_interval(scores["N"]), difference),
            _compared("SFT on best of 1, over the start", tuned),
            _compared(f"SFT on best of {config.samples}, over SFT on best of 1", above),
        ]
        return {"rows": rows, "differences": {"best of N over best of 1": difference}}

    def tasks(self) -> dict[str, Any]:
        """HHH and TruthfulQA of all models, where the run's own evaluation leaves them out."""
        block = {key: value for key, value in self.config.block(EVALUATION).items() if key != "tasks"}
        found = evaluate(
            EvaluationArguments(
                **{**block, "tasks": ["hhh", "truthfulqa"], "output_dir": str(self.work / "tasks"), "batch_size": 32}
            )
        )
        return {"static": {Path(name).name: _without_win_rate(tasks) for name, tasks in found.items()}}

    def unpenalised(self) -> dict[str, Any]:
        """RLSF from the same SFT policy by the reward model alone, over SFT."""
        folder = self.work / "no penalty"
        self._script(RLSF, folder / "rlsf", repetition_weight=0.0)
        self._copy_answers(folder / "evaluation")
        above = self._win_rate(folder / "evaluation", folder / "rlsf", str(self.run / "sft"))
        return {"rows": [_compared("RLSF without the penalty of repetitions, over SFT", above)]}

    def gains(self) -> dict[str, Any]:
        """SFT and RLSF over the start, RLSF over SFT, under the second reward model; HHH and TruthfulQA; KL."""
        static = json.loads((self.run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
        sft, rlsf = (static[str(self.run / name)]["win_rate"] for name in ("sft", "rlsf"))
        over = self.work / "rlsf over sft"
        self._copy_answers(over)
        above = self._win_rate(over, self.run / "rlsf", str(self.run / "sft"))
        rows = [
            _row("start", _shifted(sft, "reward"), None, sft["length"][1], _shifted(sft, "repetition")),
            _compared("SFT, over the start", sft),
            _compared("RLSF, over the start", rlsf),
            _compared("RLSF, over SFT", above),
        ]
        training = json.loads((self.run / "rlsf" / "training.json").read_text(encoding="utf-8"))
        return {
            "rows": rows,
            "differences": {
                "SFT over the start": sft["reward_difference"],
                "RLSF over SFT": above["reward_difference"],
            },
            "repetition_differences": {
                "SFT over the start": sft["repetition_difference"],
                "RLSF over the start": rlsf["repetition_difference"],
            },
            "length_ratios": [each["length"][0] / each["length"][1] for each in (sft, rlsf)],
            "static": {
                Path(name).name: tasks
                for name, tasks in ((name, _without_win_rate(tasks)) for name, tasks in static.items())
                if tasks
            },
            "kl": training.get("kl"),
            "length_correlation": sft.get("length_correlation"),
            "reward_models": {name: self._of_training(name) for name in (REWARD, REWARD_2)},
        }

    def _of_training(self, name: str) -> dict[str, Any]:
        """What a reward model's training says of it."""
        training = json.loads((self.run / name / "training.json").read_text(encoding="utf-8"))
        names = ("pairs", "held_out_accuracy", "held_out_correlation", "length_control")
        return {key: training.get(key) for key in names}

    def _copy_answers(self, folder: Path) -> None:
        """The run's answers and their scores to where they would be made anew."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("answers", "scores"):
            for path in (self.run / "evaluation").glob(f"{name}-*.jsonl"):
                shutil.copy2(path, folder)

    def second(self) -> RewardModel:
        """The reward model that was trained on other queries."""
        return self._load(self.run / "reward_model_2")

    def _load(self, folder: Path) -> RewardModel:
        dtype = self.config.evaluation.get("dtype", "float32")
        return RewardModel.from_pretrained(str(folder), dtype=dtype, batch_size=32)

    def _answers(self) -> list[Row]:
        return read_rows(self.run / "responses.jsonl")

    def _start(self) -> str:
        return str(self.config.block(EVALUATION)["start"])

    def _reward_model(
        self, name: str, rows: Sequence[Row], generators: Sequence[Generator], settings: Any, reward: Any
    ) -> dict[str, Any]:
        folder = self.run if name in _OF_THE_RUN else self.work / f"reward model, {name}"
        if folder != self.run:
            comparisons, _ = build_comparisons(rows, generators, settings, reward)
            write_comparisons(comparisons, folder, settings)
            files = {"dataset_name": str(folder / TRAINING), "eval_dataset_name": str(folder / HELDOUT)}
            self._script(REWARD, folder / "reward_model", **files)
        model = self._load(folder / "reward_model")
        hits = model.score_pairs(read_rows(folder / HELDOUT)).hits
        data = EvaluationArguments(data_dir=str(self.data_dir), limit=self.limit, output_dir=str(self.work))
        hhh = load_rows(data, "hhh")
        training = json.loads((folder / "reward_model" / "training.json").read_text(encoding="utf-8"))
        return {"pairs": training["pairs"], "heldout": with_interval(hits), "hhh": hhh_of_rewards(model, hhh)}

    def _script(self, stage: str, output: Path, **changes: Any) -> None:
        """A training stage with other data, as the pipeline runs it."""
        output.parent.mkdir(parents=True, exist_ok=True)
        path = output.parent / f"{stage}.yaml"
        block = {**self.config.block(stage), **changes, "output_dir": str(output)}
        path.write_text(yaml.safe_dump(block), encoding="utf-8")
        with contextlib.redirect_stdout(sys.stderr):
            SCRIPTS[stage].run(*SCRIPTS[stage].parse(["--config", str(path)]))

    def _win_rate(self, folder: Path, model: Path, baseline: str) -> dict[str, Any]:
        block = {key: value for key, value in self.config.block(EVALUATION).items() if key not in ("run_dir", "start")}
        args = EvaluationArguments(
            **{
                **block,
                "models": [str(model)],
                "start": baseline,
                "judge": str(self.run / "reward_model_2"),
                "tasks": ["win_rate"],
                "output_dir": str(folder),
            }
        )
        return evaluate(args)[str(model)]["win_rate"]


def _belongs(generator: Generator, every: Sequence[Generator], name: str) -> bool:
    if name == "shots":
        return generator.bits is None
    quantised = next((each for each in every if each.bits is not None), None)
    if quantised is None:
        raise ValueError("no generator has bits; the part 'generators' compares with one.")
    return (generator.prompt, generator.shots) == (quantised.prompt, quantised.shots)


def _row(
    name: str, reward: Any, difference: Any = None, length: Optional[float] = None, repetition: Any = None
) -> dict[str, Any]:
    return {"name": name, "reward": reward, "difference": difference, "length": length, "repetition": repetition}


def _compared(name: str, win: Any) -> dict[str, Any]:
    """A row of a model against its baseline."""
    row = _row(name, win["reward"], win["reward_difference"], win["length"][0], win["repetition"])
    return {**row, "equal": win.get("reward_difference_at_equal_length")}


def _shifted(result: Any, what: str) -> dict[str, Any]:
    """The baseline's reward or repetition, which is the model's less the difference."""
    return {"value": result[what]["value"] - result[f"{what}_difference"]["value"], "interval": None}


def _without_win_rate(tasks: Any) -> dict[str, Any]:
    return {task: {key: r[key] for key in ("value", "interval")} for task, r in tasks.items() if task != "win_rate"}
