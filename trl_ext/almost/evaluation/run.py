# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Evaluates several models and a reward model, and keeps each result in one file as soon as it is there."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from generation_ext.shared_prefix.sampling import Sampling
from peft_ext import command_line, devices
from peft_ext.files import check_folder_writable, write_json
from peft_ext.models import DEFAULT_MODEL
from peft_ext.rows import read_rows
from peft_ext.runs import differences, plain, read_settings
from trl_ext.almost.evaluation.judges import ChatJudge, Judge, RewardJudge
from trl_ext.almost.evaluation.tasks import (
    hhh_of_model,
    hhh_of_rewards,
    truthfulqa_of_model,
    truthfulqa_of_rewards,
)
from trl_ext.almost.evaluation.win_rate import compare, write_answers
from trl_ext.almost.models import chosen_device, load_chat_tokenizer, load_policy
from trl_ext.almost.prompts.chat import HUMAN
from trl_ext.almost.rewards import RewardModel


logger = logging.getLogger(__name__)
TASKS = ("hhh", "truthfulqa", "win_rate")
FILES = {"hhh": "hhh/test.jsonl", "truthfulqa": "truthfulqa/test.jsonl", "win_rate": "vicuna/questions.jsonl"}


@dataclass
class EvaluationArguments:
    """What is evaluated, on what, and who judges."""

    run_dir: Optional[str] = field(
        default=None,
        metadata={
            "help": "A run of the pipeline: its sft and rlsf are the models, its reward_model the reward model and its "
            "reward_model_2 the judge, where these aren't given."
        },
    )
    models: Optional[list[str]] = field(
        default=None, metadata={"help": "Language models: hub ids, folders, adapters, the default model's name."}
    )
    reward_models: Optional[list[str]] = field(
        default=None, metadata={"help": "Reward models whose HHH and TruthfulQA accuracy is measured."}
    )
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": f"Which of {', '.join(TASKS)}."})
    data_dir: Optional[str] = field(default=None, metadata={"help": "Folder with hhh, truthfulqa and vicuna."})
    questions: Optional[str] = field(
        default=None,
        metadata={"help": "A .jsonl of id and query to compare answers on, instead of the Vicuna questions."},
    )
    limit: Optional[int] = field(
        default=None, metadata={"help": "Only so many rows of each set, evenly spread over it; for a quick look."}
    )
    baseline: Optional[str] = field(
        default=None,
        metadata={
            "help": "What the win rate is against: a model, or a .jsonl of id and response (or responses). Default: --start."
        },
    )
    start: str = field(default=DEFAULT_MODEL, metadata={"help": "The model before alignment; evaluated, too."})
    judge: Optional[str] = field(
        default=None,
        metadata={
            "help": "A reward model (folder or hub id), or the http(s) address of an OpenAI-compatible endpoint."
        },
    )
    judge_model: Optional[str] = field(default=None, metadata={"help": "The judge's name at that endpoint."})
    judge_key_variable: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable with the endpoint's key."}
    )
    samples: int = field(
        default=1, metadata={"help": "Answers to each question that are judged; more make the intervals narrower."}
    )
    temperature: float = field(default=0.7, metadata={"help": "Of the answers that are judged."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Most tokens of an answer."})
    reward_max_length: int = field(default=1024, metadata={"help": "Most tokens of a text that a reward model sees."})
    batch_size: int = field(default=16, metadata={"help": "Answers that are written, or scored, side by side."})
    dtype: str = field(default="float32", metadata={"help": "Float type of all models."})
    seed: int = field(default=0, metadata={"help": "Of the answers and the bootstrap."})
    device: Optional[str] = field(default=None, metadata={"help": devices.HELP})
    output_dir: Optional[str] = field(
        default=None,
        metadata={"help": "Where evaluation.json, answers and judgements go; default: the run's folder `evaluation`."},
    )

    def __post_init__(self):
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"tasks: {unknown[0]!r} is unknown; choose from {TASKS}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1.")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1.")
        if self.run_dir is not None:
            self._fill(Path(self.run_dir).expanduser())
        if not self.output_dir:
            raise ValueError("output_dir is missing: pass --output_dir, or --run_dir.")
        self.models = list(dict.fromkeys([self.start, *(self.models or [])]))
        self.baseline = self.baseline or self.start
        if self.judge is not None and self.judge.startswith(("http://", "https://")) and not self.judge_model:
            raise ValueError(f"judge={self.judge!r} is an endpoint; say with --judge_model which model judges.")

    def _fill(self, run: Path) -> None:
        if not run.is_dir():
            raise FileNotFoundError(f"run_dir={str(run)!r} is not there.")
        models, reward_models = (
            [str(run / name) for name in names if (run / name).is_dir()]
            for names in (("sft", "rlsf"), ("reward_model", "reward_model_2"))
        )
        self.models, self.reward_models = self.models or models, self.reward_models or reward_models
        if not self.judge and (run / "reward_model_2").is_dir():
            self.judge = str(run / "reward_model_2")
        self.output_dir = self.output_dir or str(run / "evaluation")


class ResultFile:
    """Results in one JSON file, written after each; a result that is there from the same settings isn't made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = read_settings(path) or {}

    def get(
        self, name: str, task: str, settings: dict[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """A model's result on a task."""
        result = self.results.get(name, {}).get(task)
        if result is None or differences(result["settings"], plain(settings)):
            logger.info("%s: %s", task, name)
            result = {**make(), "settings": plain(settings)}
            self.results.setdefault(name, {})[task] = result
            write_json(self.path, self.results)
        return result


def parse(argv: Sequence[str]) -> tuple[Any, ...]:
    """What [`run`] takes, from flags and the YAML of `--config`."""
    return command_line.parse(argv, EvaluationArguments)


def run(args: EvaluationArguments) -> dict[str, Any]:
    """Evaluate; goes on where an interrupted evaluation stopped.

    Returns:
        What `evaluation.json` holds: model -> task -> result.

    Raises:
        ValueError, OSError: If a model, a file, a folder or the device isn't as it should be.
    """
    folder = Path(str(args.output_dir)).expanduser()
    check_folder_writable(folder, "output_dir")
    chosen_device(args.device)
    data = {task: load_rows(args, task) for task in args.tasks}
    folder.mkdir(parents=True, exist_ok=True)
    results = ResultFile(folder / "evaluation.json")
    for name in args.reward_models or []:
        _evaluate_rewards(args, results, name, data)
    loader = _LastModel(args)
    for name in args.models or []:
        for task, function in (("hhh", hhh_of_model), ("truthfulqa", truthfulqa_of_model)):
            if task in data:
                settings = _settings(args, name)
                results.get(name, task, settings, lambda: function(*loader(name), data[task]))  # noqa: B023
    if "win_rate" in data:
        _evaluate_win_rates(args, results, loader, folder, data["win_rate"])
    return results.results


def load_rows(args: EvaluationArguments, task: str) -> list[dict[str, Any]]:
    """A task's rows, or `limit` of them from all over the file.

    Raises:
        ValueError, FileNotFoundError: As [`data_path`].
    """
    rows = read_rows(data_path(args, task))
    if args.limit is None or args.limit >= len(rows):
        return rows
    return [rows[number * len(rows) // args.limit] for number in range(args.limit)]


def data_path(args: EvaluationArguments, task: str) -> Path:
    """Where a task's rows lie.

    Raises:
        ValueError: If nothing says where.
        FileNotFoundError: If they aren't there; says how the data is laid out.
    """
    if task == "win_rate" and args.questions is not None:
        path = Path(args.questions).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"questions={args.questions!r}: there is no such file.")
        return path
    if args.data_dir is None:
        own = ", or --questions" if task == "win_rate" else ""
        raise ValueError(
            f"data_dir is missing: the task {task!r} needs a folder with {FILES[task]}; pass --data_dir{own}, or leave the "
            "task out of --tasks."
        )
    path = Path(args.data_dir).expanduser() / FILES[task]
    if not path.is_file():
        raise FileNotFoundError(f"data_dir={args.data_dir!r} has no {FILES[task]}, which the task {task!r} needs.")
    return path


class _LastModel:
    """Loads models with their tokenizers, and keeps the last."""

    def __init__(self, args: EvaluationArguments) -> None:
        self.args, self.name = args, ""
        self.model: Optional[tuple[Any, Any]] = None

    def __call__(self, name: str) -> tuple[Any, Any]:
        if self.model is None or self.name != name:
            self.model = None  # its memory first
            policy = load_policy(name, dtype=self.args.dtype).to(chosen_device(self.args.device))
            self.name, self.model = name, (policy, load_chat_tokenizer(name))
        return self.model


def _evaluate_rewards(args: EvaluationArguments, results: ResultFile, name: str, data: dict[str, Any]) -> None:
    settings = {**_settings(args, name), "max_length": args.reward_max_length}
    rewards = functools.cache(lambda: _rewards(args, name))  # once, and only if there is something to measure
    for task, function in (("hhh", hhh_of_rewards), ("truthfulqa", truthfulqa_of_rewards)):
        if task in data:
            results.get(name, task, settings, lambda: function(rewards(), data[task]))  # noqa: B023


def _evaluate_win_rates(
    args: EvaluationArguments, results: ResultFile, loader: _LastModel, folder: Path, rows: list[dict[str, Any]]
) -> None:
    if args.judge is None:
        raise ValueError("judge is missing: pass --judge, a reward model or the address of an endpoint.")
    questions = {row["id"]: row["query"] if "query" in row else row["turns"][0] for row in rows}
    baseline = str(args.baseline)
    judged_by = [args.judge, args.judge_model, _fingerprint(args.judge)]
    judgements, scores = (folder / f"{name}-{_short_hash(judged_by)}.jsonl" for name in ("judgements", "scores"))
    judge = functools.cache(lambda: _judge(args, scores))

    def compared(name: str) -> dict[str, Any]:
        answers = {each: _answers(args, loader, each, questions, folder) for each in (baseline, name)}
        return compare(questions, answers[name], answers[baseline], judge(), judgements, args.seed)

    for name in args.models or []:
        if name != baseline:
            settings = {
                **_settings(args, name),
                "baseline": [baseline, _fingerprint(baseline)],
                "judge": judged_by,
                "questions": _short_hash(questions),
                "sampling": [args.temperature, args.max_new_tokens, args.seed, args.samples],
            }
            results.get(name, "win_rate", settings, lambda: compared(name))  # noqa: B023


def _answers(
    args: EvaluationArguments, loader: _LastModel, name: str, questions: dict[Any, str], folder: Path
) -> dict[Any, list[str]]:
    if name.endswith(".jsonl"):
        rows = read_rows(Path(name).expanduser())
        return {row["id"]: row["responses"] if "responses" in row else [row["response"]] for row in rows}
    sampling = Sampling(
        temperature=args.temperature,
        top_p=1.0,
        max_new_tokens=args.max_new_tokens,
        stop=(HUMAN,),
        seed=args.seed,
        samples=args.samples,
    )
    sampled = [args.dtype, args.temperature, args.max_new_tokens, args.seed, args.samples]
    made_by = [name, _fingerprint(name), _short_hash(questions), *sampled]
    path = folder / f"answers-{_short_hash(made_by)}.jsonl"
    return write_answers(*loader(name), questions, path, sampling, args.batch_size)


def _judge(args: EvaluationArguments, scores: Path) -> Judge:
    judge = str(args.judge)
    if judge.startswith(("http://", "https://")):
        return ChatJudge(str(args.judge_model), judge, api_key_variable=args.judge_key_variable)
    return RewardJudge(_rewards(args, judge), scores)


def _rewards(args: EvaluationArguments, name: str) -> RewardModel:
    return RewardModel.from_pretrained(
        name,
        dtype=args.dtype,
        device=args.device,
        max_length=args.reward_max_length,
        batch_size=args.batch_size,
        progressbar=True,
    )


def _settings(args: EvaluationArguments, name: str) -> dict[str, Any]:
    return {"limit": args.limit, "dtype": args.dtype, "model": _fingerprint(name)}


def _fingerprint(name: str) -> list[Any]:
    """What tells a folder that was trained again from the one of before; nothing, for a name of the hub."""
    path = Path(name).expanduser()
    files = sorted(path.glob("*")) if path.is_dir() else [path] if path.is_file() else []
    kept = [file for file in files if file.suffix in (".safetensors", ".json", ".jsonl")]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in kept]


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8")).hexdigest()[:12]
