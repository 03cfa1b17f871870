# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""CriticControl on real tasks (sentiment, topic, detoxification): success by independent judges against perplexity,
diversity and repetition, beside the frozen model, prompts, best-of-N, weighted decoding and RLOO.

Every method continues the same prompts, by the same sampling. Strengths are a curve, not tuned; the judges and the test
prompts have no part in training. Classifiers, critics and the tuned model are kept in the run's work folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import LogitsProcessorList

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, claims_of_each, run_named, tables_of_each
from benchmarks.critic_rloo import tuned_by_rloo
from benchmarks.critic_tasks import TaskData
from benchmarks.critic_training import AS_LORA, SEPARATE, UNSEEN, WEIGHTED, Critics
from benchmarks.in_context import smoke_model
from benchmarks.text_quality import continuation_perplexity, distinct, repetition
from generation_ext.critic import CriticLogitsProcessor, critic_generate
from peft_ext.models import load, load_tokenizer


FROZEN, NARROW, PROMPT, BEST, ACTION, RLOO = (
    "Frozen model",
    "Frozen model, its 10 likeliest tokens",
    "Prompt only",
    "Best of N",
    "CriticControl, action-value",
    "RLOO, LoRA",
)
CRITIC, LORA = SEPARATE, AS_LORA
TOP_K = 10
# Of the strengths that were tried on training prompts, the best within the allowed perplexity.
STRONG = {"sentiment": 40.0, "topic": 100.0}
JUDGED = {"sentiment": "positive", "topic": "on topic", "detoxification": "clean"}
# Points of success above the frozen model, at this ratio of its perplexity.
WANTED, RATIO = {"sentiment": 30, "topic": 40}, 1.35


class Row(NamedTuple):
    """A method at one strength, or N; perhaps the best of several texts of it, by the reward, or among more candidates."""

    method: str
    level: float = 0.0
    best_of: int = 1
    top_k: int = TOP_K

    @property
    def key(self) -> dict[str, Any]:
        """What the row is stored under."""
        usual = {"best_of": 1, "top_k": TOP_K}
        return {name: value for name, value in self._asdict().items() if value != usual.get(name)}

    @property
    def title(self) -> str:
        """A row's first column."""
        if self.method == BEST:
            return f"Best of {self.level:g}"
        among = f", {self.top_k} candidates" if self.top_k != TOP_K else ""
        best = f", best of {self.best_of}" if self.best_of > 1 else ""
        return self.method + (f", strength {self.level:g}" if self.level else "") + among + best

    @property
    def texts(self) -> int:
        """How many texts are written for each that is kept."""
        return int(self.level) if self.method == BEST else self.best_of


def rows_of(run: Run) -> list[Row]:
    """What is measured, in this order."""
    return [
        Row(FROZEN),
        *([Row(NARROW)] if run.settings.get("steering", {}).get("mask_others") else []),
        *([Row(PROMPT)] if run.settings.get("prompt", True) else []),
        *(Row(BEST, count) for count in run.counts),
        *(Row(CRITIC, strength) for strength in run.strengths),
        *(Row(ACTION, strength) for strength in run.action_strengths),
        *(Row(WEIGHTED, strength) for strength in run.weighted_strengths),
        *(Row(CRITIC, *each) for each in run.settings.get("steered_best", [])),
        *(Row(CRITIC, strength, top_k=top_k) for strength, top_k in run.settings.get("wide", [])),
        *(Row(LORA, strength) for strength in run.settings.get("lora_strengths", [])),
        *([Row(RLOO)] if run.rloo_steps else []),
        *(Row(UNSEEN, strength) for strength in run.unseen_strengths),
    ]


class Texts(NamedTuple):
    """What a method wrote; one entry each."""

    prompts: list[str]
    codes: list[Optional[str]]
    continuations: list[list[int]]
    seconds: float


class Steering:
    """One task's models, critics and texts."""

    def __init__(self, run: Run) -> None:
        self.run = run
        data = TaskData(run.work, run.seed, run.labelled, run.reward)
        self.task = data.task(run.attribute)
        self.accuracies = data.accuracies
        log(f"{run.experiment}: accuracy of its classifiers on other texts: {self.accuracies}")
        self.tokenizer = smoke_model()[1] if run.smoke else load_tokenizer(run.model)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = self.fresh()
        self.judge_model = self.model if run.smoke else load(run.judge_model or run.model, dtype=torch.float32)
        self.critics = Critics(self.task, self.model, self.tokenizer, run)

    def fresh(self) -> Any:
        """The frozen model, loaded anew."""
        return smoke_model()[0] if self.run.smoke else load(self.run.model, dtype=torch.bfloat16)

    def row(self, row: Row) -> dict[str, Any]:
        """All figures of a row."""
        result = self.measure(self.write(row))
        kind = CRITIC if row.method == ACTION else row.method
        codes = self.task.codes if row.method in (CRITIC, ACTION, LORA) else (None,)
        known = {str(code): self.critics.knowledge(kind, code) for code in codes}
        return {**result, "classifiers": self.accuracies, "explained_variance": known}

    # ---- texts

    def write(self, row: Row) -> Texts:
        """What a method writes for all test prompts and codes."""
        torch.manual_seed(self.run.seed)
        codes: Sequence[Optional[str]] = self.task.unseen_codes if row.method == UNSEEN else self.task.codes
        samples = (self.run.samples or self.task.samples) * row.texts
        prompts = self.task.test_prompts[: self.run.test_prompts]
        pairs = [(prompt, code) for prompt in prompts for code in codes for _ in range(samples)]
        separate = (CRITIC, ACTION, LORA, *([UNSEEN] if self.run.settings.get("unseen_by_name") else []))
        by_code = row.method in separate and codes != (None,)
        started = time.perf_counter()
        texts = self._by_code(row, pairs, codes) if by_code else self._write(row, pairs, None)
        return texts if row.texts == 1 else self._best(texts, row.texts, started)

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
        elif row.method == BEST:
            before = self._with_code
        elif row.method == LORA:
            model = self._with_lora(row.level, code)
        elif row.method not in (FROZEN, NARROW):
            processor = CriticLogitsProcessor(
                self.model,
                self.critics(CRITIC if row.method == ACTION else row.method, code),
                strength=row.level,
                mode="action-value" if row.method == ACTION else "exact",
                **{"top_k": row.top_k, **self._options(row.method)},
            )
            before = self._plain if code is not None else self._with_code
        started = time.perf_counter()
        options = {**self.task.generation, **({"top_k": TOP_K} if row.method == NARROW else {})}
        continuations = self._generate(model, [before(*pair) for pair in pairs], processor, options)
        seconds = time.perf_counter() - started
        if processor is not None:
            processor.close()
        return Texts(*map(list, zip(*pairs)), continuations, seconds)  # type: ignore[arg-type]

    def _options(self, method: str) -> dict[str, Any]:
        """How a critic steers beside its strength; other heads as in the paper."""
        return self.run.settings.get("steering", {}) if method in (CRITIC, ACTION, UNSEEN) else {}

    @staticmethod
    def _plain(prompt: str, code: Optional[str]) -> str:
        return prompt

    def _with_code(self, prompt: str, code: Optional[str]) -> str:
        return prompt if code is None else f"{code}: {prompt}"

    def _instruction(self, prompt: str, code: Optional[str]) -> str:
        return self.task.instruction.format(code=code, prompt=prompt)

    def _best(self, texts: Texts, count: int, started: float) -> Texts:
        """Of each `count` texts the one with the highest reward."""
        whole = [prompt + self._decode(tokens) for prompt, tokens in zip(texts.prompts, texts.continuations)]
        rewards = np.asarray(self.task.reward(whole, texts.codes)).reshape(-1, count)
        kept = [index * count + int(offset) for index, offset in enumerate(rewards.argmax(1))]
        chosen = ([column[row] for row in kept] for column in texts[:3])
        return Texts(*chosen, time.perf_counter() - started)  # type: ignore[arg-type]

    @torch.no_grad()
    def _generate(
        self, model: nn.Module, texts: list[str], processor: Optional[Any], options: dict[str, Any]
    ) -> list[list[int]]:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found: list[list[int]] = [[] for _ in texts]
        generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
        own_loop = processor is not None and processor.mode == "exact" and processor.mask_others
        for start in range(0, len(order), self.run.batch_size):
            rows = order[start : start + self.run.batch_size]
            batch = self.tokenizer([texts[row] for row in rows], return_tensors="pt", padding=True)
            output = generate(
                **batch,
                do_sample=True,
                max_new_tokens=self.task.new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([processor] if processor is not None else []),
                # where all others are ruled out, the candidates' pass is always the next step's
                custom_generate=critic_generate if own_loop else None,
                **options,
            )
            for row, tokens in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist()):
                found[row] = self._until_end(tokens)
        return found

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return tokens[: tokens.index(end)] if end in tokens else tokens

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _with_lora(self, strength: float, code: Optional[str]) -> nn.Module:
        """The frozen model under a critic's LoRA, as PEFT loads it."""
        folder = self.run.work / f"lora-{strength:g}-{self.task.codes.index(code)}"
        self.critics(LORA, code).to_lora(self.model, folder, strength)
        return PeftModel.from_pretrained(self.fresh(), folder).eval()

    def _tuned(self) -> nn.Module:
        return tuned_by_rloo(self.run, self.task, self.fresh, self.tokenizer)

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


def measure(run: Run) -> None:
    """Every row that isn't stored."""
    missing = [row for row in rows_of(run) if run.find(row.key) is None]
    steering = Steering(run) if missing else None
    for row in missing:
        log(f"{run.experiment}: {row.title}")
        run.add(row.key, steering.row(row))


def found(run: Run) -> dict[Row, dict[str, Any]]:
    """Stored results."""
    return {row: result for row in rows_of(run) if (result := run.find(row.key)) is not None}


def tables(run: Run) -> dict[str, str]:
    """Success, perplexity and diversity of every row."""
    results, lines = found(run), []
    for row, result in results.items():
        lines.append(
            [
                row.title,
                *(f"{100 * value:.0f}" for value in result["success"].values()),
                f"{result['reward']:.2f}",
                f"{result['perplexity']:.1f}",
                f"{result['dist-2']:.2f}",
                f"{100 * result['repetition']:.1f}",
                f"{1e3 * result['seconds_per_token']:.0f}",
            ]
        )
    judges = next(iter(results.values()))["success"] if results else ()
    judged = [f"{JUDGED[run.attribute]}, by {judge}, %" for judge in judges]
    header = ["", *judged, "mean reward", "perplexity", "Dist-2", "repeated 3-grams, %", "ms a token"]
    return {"success": markdown_table(header, lines)}


def claims(run: Run) -> list[Claim]:
    """The strongest steering within so many times the frozen model's perplexity."""
    results = found(run)
    frozen = results.get(Row(FROZEN))

    def best(method: str) -> Optional[dict[str, Any]]:
        allowed = [
            result
            for row, result in results.items()
            if row.method == method and row.best_of == 1 and frozen and result["perplexity"] <= limit
        ]
        return max(allowed, key=_first, default=None)

    ratio = run.settings.get("ratio", RATIO)
    limit = ratio * frozen["perplexity"] if frozen else 0.0
    steered = best(CRITIC)
    gain = 100 * (_first(steered) - _first(frozen)) if steered else None
    if run.attribute == "detoxification":
        left = (1 - _first(steered)) / max(1 - _first(frozen), 1e-9) if steered else None
        return [Claim("toxic texts over the frozen model's", left, 0.5)]
    lines = [
        Claim(
            f"success at {ratio:g} times the frozen model's perplexity, above its",
            gain,
            WANTED[run.attribute],
            " points",
            at_least=True,
        )
    ]
    two = results.get(Row(BEST, 2))
    if two and run.settings.get("running_mean"):
        points = [
            100 * (_first(result) - _first(two))
            for row, result in results.items()
            if row.method == CRITIC and row.best_of == 1 and result["perplexity"] <= two["perplexity"]
        ]
        lines.append(
            Claim("success above best of 2, at no higher perplexity", max(points, default=None), 0.0, " points", True)
        )
    if run.unseen_strengths:
        shares = [
            (_first(result) - _first(frozen)) / (_first(seen) - _first(frozen))
            for row, result in results.items()
            if row.method == UNSEEN
            and frozen
            and (seen := results.get(Row(CRITIC, row.level)))
            and _first(seen) > _first(frozen)
        ]
        lines.append(
            Claim("gain on unseen topics over that on seen ones", max(shares, default=None), 0.5, at_least=True)
        )
    return lines


def _first(result: dict[str, Any]) -> float:
    return next(iter(result["success"].values()))


def headlines(runs: Runs) -> list[Headline]:
    """Sentiment and topics at one strength, of the newer experiments where they are measured."""
    area, page, shown = "Steering", "../benchmarks/critic_control.md", []
    for name, title, wanted in (
        ("sentiment", "Sentiment, strength {:g}, by two judges", "30 points more at 1.35 times"),
        ("topic", "Topics, strength {:g}", "40 points more at 2 times"),
    ):
        both = [
            (run, Row(CRITIC, strength))
            for ending, strength in (("_running_mean", STRONG[name]), ("", 16.0))
            if (run := run_named(runs, name + ending))
        ]
        measured = [(run, row) for run, row in both if {row, Row(FROZEN), Row(BEST, 2)} <= set(found(run))]
        if not measured:
            continue
        chosen, strong = measured[0]
        results = found(chosen)
        compared = Row(BEST, 10) if Row(BEST, 10) in results else Row(BEST, 2)
        ours, frozen = results[strong], results[Row(FROZEN)]
        what = JUDGED[name]
        percent = [
            " and ".join(f"{100 * value:.0f}" for value in each["success"].values())
            for each in (ours, frozen, results[compared])
        ]
        ratio = ours["perplexity"] / frozen["perplexity"]
        gain = 100 * (_first(ours) - _first(frozen))
        met = gain >= WANTED[name] and ratio <= chosen.settings.get("ratio", RATIO)
        figures = (
            f"{percent[0]} % {what} at {ratio:.2f} times the perplexity; frozen model {percent[1]} %, "
            f"{compared.title.lower()} {percent[2]} %"
        )
        shown.append(Headline(area, title.format(strong.level), figures, unless(met, wanted), page))
    return shown


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
