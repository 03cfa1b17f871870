# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""CriticControl on real tasks (sentiment, topic, detoxification): success by independent judges against perplexity,
diversity and repetition, beside the frozen model, prompts, best-of-N, weighted decoding and RLOO.

Every method continues the same prompts, by the same sampling. Strengths are a curve, not tuned; the judges and the test
prompts have no part in training.

    python -m benchmarks.critic_control --data-dir shared/data

Rows are stored as they finish and not measured again; critics are kept in `--work_dir`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import nn
from transformers import LogitsProcessorList

from benchmarks.common import ROOT, Results, argument_parser, describe, log, markdown_table, verdict
from benchmarks.critic_tasks import TASKS, Task, TaskData
from benchmarks.critic_training import SEPARATE, UNSEEN, WEIGHTED, Critics
from benchmarks.text_quality import continuation_perplexity, distinct, repetition
from generation_ext.critic import CriticLogitsProcessor
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer


FROZEN, PROMPT, BEST, ACTION, RLOO = (
    "Frozen model",
    "Prompt only",
    "Best of N",
    "CriticControl, action-value",
    "RLOO, LoRA",
)
CRITIC = SEPARATE
ON_ROLLOUTS = (CRITIC, ACTION, UNSEEN)
TOP_K = 10


class Budget(NamedTuple):
    """How much is trained and tested."""

    rollouts: int = 8192
    epochs: int = 6
    samples: Optional[int] = None  # a prompt's; the task's own number
    test_prompts: Optional[int] = None
    rloo_steps: int = 16
    batch_size: int = 64


FULL = Budget()
SMOKE = Budget(16, 2, 1, 2, 1, 8)


@dataclass(frozen=True)
class Row:
    """A method at one strength, or N."""

    method: str
    level: float = 0.0

    @property
    def title(self) -> str:
        """A row's first column."""
        if self.method == BEST:
            return f"Best of {self.level:g}"
        return self.method + (f", strength {self.level:g}" if self.level else "")


STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
ROWS = (
    Row(FROZEN),
    Row(PROMPT),
    *(Row(BEST, count) for count in (2, 4, 10)),
    *(Row(CRITIC, strength) for strength in STRENGTHS),
    *(Row(ACTION, strength) for strength in (4.0, 16.0)),
    *(Row(WEIGHTED, strength) for strength in STRENGTHS),
    Row(RLOO),
)
UNSEEN_ROWS = tuple(Row(UNSEEN, strength) for strength in STRENGTHS)


class Texts(NamedTuple):
    """What a method wrote; one entry each."""

    prompts: list[str]
    codes: list[Optional[str]]
    continuations: list[list[int]]
    seconds: float


class Study:
    """One task's models, critics and texts."""

    def __init__(self, args: argparse.Namespace, task: Task) -> None:
        self.args, self.task, self.budget = (
            args,
            task,
            (SMOKE if args.smoke else FULL)._replace(rollouts=args.rollouts),
        )
        self.tokenizer = load_tokenizer(args.model)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = load(args.model, dtype=torch.bfloat16)
        self.judge_model = load(args.judge_model or args.model, dtype=torch.float32)
        self.work = Path(args.work_dir) / task.name
        self.critics = Critics(
            task, self.model, self.tokenizer, self.budget, args.head, self.work, args.seed, args.smoke
        )

    # ---- texts

    def write(self, row: Row) -> Texts:
        """What a method writes for all test prompts and codes."""
        torch.manual_seed(self.args.seed)
        codes: Sequence[Optional[str]] = self.task.unseen_codes if row.method == UNSEEN else self.task.codes
        samples = self.budget.samples or self.task.samples
        prompts = self.task.test_prompts[: self.budget.test_prompts]
        pairs = [(prompt, code) for prompt in prompts for code in codes for _ in range(samples)]
        if row.method == BEST:
            return self._best_of(pairs, int(row.level))
        if row.method in (CRITIC, ACTION) and codes != (None,):
            return self._by_code(row, pairs, codes)
        return self._write(row, pairs, None)

    def _by_code(self, row: Row, pairs: list[tuple[str, Optional[str]]], codes: Sequence[Optional[str]]) -> Texts:
        """Each code's texts by its own critic."""
        found = [self._write(row, [pair for pair in pairs if pair[1] == code], code) for code in codes]
        joined = (sum((getattr(texts, name) for texts in found), []) for name in Texts._fields[:3])
        return Texts(*joined, sum(texts.seconds for texts in found))

    def _write(self, row: Row, pairs: list[tuple[str, Optional[str]]], code: Optional[str]) -> Texts:
        model, processor, before = self.model, None, self._plain
        if row.method == PROMPT:
            before = self._instruction
        elif row.method == RLOO:
            model, before = self._tuned(), self._with_code
        elif row.method != FROZEN:
            processor = CriticLogitsProcessor(
                self.model,
                self.critics(CRITIC if row.method == ACTION else row.method, code),
                top_k=TOP_K,
                strength=row.level,
                mode="action-value" if row.method == ACTION else "exact",
            )
            before = self._plain if code is not None else self._with_code
        started = time.perf_counter()
        continuations = self._generate(model, [before(*pair) for pair in pairs], processor)
        seconds = time.perf_counter() - started
        if processor is not None:
            processor.close()
        return Texts(*map(list, zip(*pairs)), continuations, seconds)  # type: ignore[arg-type]

    @staticmethod
    def _plain(prompt: str, code: Optional[str]) -> str:
        return prompt

    def _with_code(self, prompt: str, code: Optional[str]) -> str:
        return prompt if code is None else f"{code}: {prompt}"

    def _instruction(self, prompt: str, code: Optional[str]) -> str:
        return self.task.instruction.format(code=code, prompt=prompt)

    def _best_of(self, pairs: list[tuple[str, Optional[str]]], count: int) -> Texts:
        started = time.perf_counter()
        texts = [self._with_code(prompt, code) for prompt, code in pairs for _ in range(count)]
        tokens = self._generate(self.model, texts, None)
        prompts, codes = zip(*[pair for pair in pairs for _ in range(count)])
        rewards = self.task.reward([p + self._decode(t) for p, t in zip(prompts, tokens)], codes)
        best = np.asarray(rewards).reshape(-1, count).argmax(1)
        chosen = [tokens[index * count + offset] for index, offset in enumerate(best)]
        return Texts(*map(list, zip(*pairs)), chosen, time.perf_counter() - started)  # type: ignore[arg-type]

    @torch.no_grad()
    def _generate(self, model: nn.Module, texts: list[str], processor: Optional[Any]) -> list[list[int]]:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found: list[list[int]] = [[] for _ in texts]
        generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
        for start in range(0, len(order), self.budget.batch_size):
            rows = order[start : start + self.budget.batch_size]
            batch = self.tokenizer([texts[row] for row in rows], return_tensors="pt", padding=True)
            output = generate(
                **batch,
                do_sample=True,
                max_new_tokens=self.task.new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([processor] if processor is not None else []),
                **self.task.generation,
            )
            for row, tokens in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist()):
                found[row] = self._until_end(tokens)
        return found

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return tokens[: tokens.index(end)] if end in tokens else tokens

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _tuned(self) -> nn.Module:
        from benchmarks.critic_rloo import tuned_by_rloo

        return tuned_by_rloo(self.args, self.task, self.tokenizer, self.budget, self.work / "rloo")

    # ---- figures

    def measure(self, texts: Texts) -> dict[str, Any]:
        """Success by every judge, perplexity, diversity, repetition, and some continuations (prompts are not ours to pass
        on)."""
        whole = [prompt + self._decode(tokens) for prompt, tokens in zip(texts.prompts, texts.continuations)]
        tokens = self.tokenizer(texts.prompts).input_ids
        count = sum(map(len, texts.continuations))
        return {
            "success": {name: float(judge(whole, texts.codes).mean()) for name, judge in self.task.judges.items()},
            "reward": self._reward(whole, texts.codes),
            "perplexity": continuation_perplexity(self.judge_model, tokens, texts.continuations),
            **{f"dist-{n}": distinct(texts.continuations, n) for n in (1, 2, 3)},
            "repetition": repetition(texts.continuations),
            "seconds_per_token": texts.seconds / max(count, 1),
            "texts": len(whole),
            "length": count / len(whole),
            "examples": [
                f"[{code}] ...{text}" if code else f"...{text}"
                for code, text in zip(texts.codes[:6], map(self._decode, texts.continuations))
            ],
        }

    def _reward(self, texts: list[str], codes: list[Optional[str]]) -> float:
        return float(np.mean(self.task.reward(texts, codes)))


def rows_of(task: str) -> tuple[Row, ...]:
    """What is measured of a task."""
    return (*ROWS, *(UNSEEN_ROWS if task == "topic" else ()))


def settings_of(args: argparse.Namespace, task: str, row: Row) -> dict[str, Any]:
    """What identifies a row of the results."""
    budget = dict(FULL._asdict() if not args.smoke else SMOKE._asdict(), rollouts=args.rollouts)
    if row.method not in ON_ROLLOUTS:  # a critic's budget has no part in it
        del budget["rollouts"], budget["epochs"]
    if row.method != RLOO:
        del budget["rloo_steps"]
    return {
        "task": task,
        "model": args.model,
        "judge_model": args.judge_model,
        "head": args.head,
        "method": row.method,
        "level": row.level,
        "top_k": TOP_K,
        "budget": budget,
        "seed": args.seed,
    }


def print_tables(args: argparse.Namespace, results: Results) -> None:
    """A table for each task, and what was to be reached."""
    for task in args.tasks:
        found = {row: results.find(settings_of(args, task, row)) for row in rows_of(task)}
        rows = []
        for row, result in found.items():
            if result is None:
                rows.append([row.title, "not measured"])
                continue
            judged = [f"{100 * value:.0f}" for value in result["success"].values()]
            rows.append(
                [
                    row.title,
                    *judged,
                    f"{100 * result['reward']:.0f}",
                    f"{result['perplexity']:.1f}",
                    "/".join(f"{result[f'dist-{n}']:.2f}" for n in (1, 2, 3)),
                    f"{100 * result['repetition']:.1f}",
                    f"{1e3 * result['seconds_per_token']:.1f}",
                ]
            )
        some = next((result for result in found.values() if result), None)
        if some is None:
            continue
        header = [task, *some["success"], "reward", "perplexity", "Dist-1/2/3", "repeated 3-grams, %", "ms a token"]
        print("\n" + markdown_table(header, rows) + "\n")
        for line in verdicts(task, found):
            print(line)
    if results.rows:
        print("\n" + describe(results.rows[-1]["environment"]))


def verdicts(task: str, found: dict[Row, Optional[dict[str, Any]]]) -> list[str]:
    """What the project wanted, against what came out: the strongest steering within 1.35 x the frozen perplexity."""
    frozen = found[Row(FROZEN)]
    if frozen is None:
        return []

    def best(method: str) -> Optional[dict[str, Any]]:
        allowed = [
            result
            for row, result in found.items()
            if row.method == method and result and result["perplexity"] <= 1.35 * frozen["perplexity"]
        ]
        return max(allowed, key=_first) if allowed else None

    steered, lines = best(CRITIC), []
    if steered is None:
        return ["- CriticControl: no strength within 1.35 x the frozen model's perplexity"]
    gain = 100 * (_first(steered) - _first(frozen))
    ratio = steered["perplexity"] / frozen["perplexity"]
    if task in ("sentiment", "topic"):
        lines.append(
            verdict(
                "success, points above the frozen model", gain, {"sentiment": 30, "topic": 40}[task], at_least=True
            )
        )
        lines.append(verdict("perplexity over the frozen model's", ratio, 1.35))
    else:
        left = (1 - _first(steered)) / max(1 - _first(frozen), 1e-9)
        lines.append(verdict("toxic texts over the frozen model's", left, 0.5))
    unseen = best(UNSEEN)
    if unseen is not None:
        share = (_first(unseen) - _first(frozen)) / max(_first(steered) - _first(frozen), 1e-9)
        lines.append(verdict("gain on unseen topics over that on seen ones", share, 0.5, at_least=True))
    return lines


def _first(result: dict[str, Any]) -> float:
    return next(iter(result["success"].values()))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure what isn't stored yet, and print the tables."""
    parser = argument_parser(__doc__, "critic_control.json")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the frozen language model")
    parser.add_argument("--judge_model", help="whose perplexity is measured; the frozen model's own by default")
    parser.add_argument("--head", choices=("linear", "mlp"), default="linear", help="the critic's")
    parser.add_argument("--rollouts", type=int, help=f"that a critic learns from; {FULL.rollouts} by default")
    parser.add_argument("--data-dir", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", help="only these; all by default")
    parser.add_argument("--levels", nargs="+", type=float, help="only these strengths and Ns; all by default")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "critic_control")
    args = parser.parse_args(argv)
    args.rollouts = args.rollouts or (SMOKE if args.smoke else FULL).rollouts
    results = Results(args.output, args.seed)
    for name in () if args.table else args.tasks:
        wanted = [row for row in rows_of(name) if not args.methods or row.method in args.methods]
        wanted = [row for row in wanted if not args.levels or row.level in (0.0, *args.levels)]
        wanted = [row for row in wanted if results.find(settings_of(args, name, row)) is None]
        if not wanted:
            continue
        data = TaskData(args.data_dir, args.work_dir, args.seed)
        study = Study(args, data.task(name))
        log(f"{name}: accuracy of its classifiers on other texts: {data.accuracies}")
        for row in wanted:
            log(f"{name}: {row.title}")
            result = study.measure(study.write(row))
            kind = CRITIC if row.method == ACTION else row.method
            codes = study.task.codes if row.method in (CRITIC, ACTION) else (None,)
            known = {str(code): study.critics.knowledge(kind, code) for code in codes}
            results.add(
                settings_of(args, name, row), {**result, "classifiers": data.accuracies, "explained_variance": known}
            )
    print_tables(args, results)


if __name__ == "__main__":
    main()
