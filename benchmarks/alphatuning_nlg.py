# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Text from data (E2E, WebNLG): AlphaTuning against full fine-tuning, LoRA and PEQA, by BLEU, METEOR, ROUGE-L, chrF.

Every method sees the same examples in the same order for the same number of steps; the loss counts the target only.
Learning rates are chosen by the validation loss of shortened runs on the first data set, and used on all; those of
scales, which want the same everywhere (`peqa_learning_rate.py`), once for all packed models, on AlphaTuning at 3 bits.
Packed models start calibrated on training examples, per channel. Texts are
generated greedily for a fixed sample of test inputs, and compared with all references of each.

    python -m benchmarks alphatuning_nlg
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch
from peft import get_peft_model
from torch import nn
from tqdm.auto import tqdm

from benchmarks import baselines
from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.models import named
from benchmarks.core.run import NotHere, Run, data_folder, log
from benchmarks.core.task import Runs, Task, claims_of_each, tables_of_each
from benchmarks.fast_linear import fast_linear
from benchmarks.nlg_metrics import METEOR_NOTE, nlg_metrics
from benchmarks.tuning import SMOKE_VOCAB, TINY, Restart, float_model, train, trainable
from peft_ext import AlphaTuningConfig, PeqaConfig, calibrate
from peft_ext.models import load_tokenizer
from peft_ext.quant.formats import GPTQ
from peft_ext.rows import read_rows


FULL, LORA, ALPHA, ALL_ALPHAS, PEQA = (
    "Full fine-tuning",
    "LoRA, r = 8",
    "AlphaTuning",
    "AlphaTuning, all alphas",
    "PEQA",
)
LEARNING_RATES = {
    FULL: (1e-4, 2e-4),
    LORA: (2e-3, 4e-3),
    ALPHA: (1e-2, 2e-2, 4e-2),
}
METRICS = ("BLEU", "METEOR", "ROUGE-L", "chrF")
TARGETS = {4: 2.0, 3: 4.0}  # BLEU below full fine-tuning at most
IGNORED = -100
MADE_UP = "made up"  # the data of the smaller sizes


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    bits: Optional[int] = None

    @property
    def title(self) -> str:
        """The first column."""
        return self.method if self.bits is None else f"{self.method}, {self.bits} bits"

    def config(self) -> Any:
        """The packed format and what is trained."""
        if self.method == PEQA:
            return PeqaConfig(bits=self.bits, init_method=GPTQ, task_type="CAUSAL_LM")
        trained = "all" if self.method == ALL_ALPHAS else "first"
        return AlphaTuningConfig(
            bits=self.bits, trained_alphas=trained, init_method="calibrated", task_type="CAUSAL_LM"
        )


def all_rows() -> list[Row]:
    """The table, the most telling rows first."""
    rows = [Row(FULL), Row(LORA)]
    return rows + [Row(method, bits) for bits in (4, 3, 2) for method in (ALPHA, ALL_ALPHAS, PEQA)]


class Example(NamedTuple):
    """Token ids of an input with its prompt, and of a target with the end token."""

    prompt: list[int]
    target: list[int]


class Data(NamedTuple):
    """Examples of each purpose; `test` holds prompts, `references` the texts that go with them."""

    train: list[Example]
    validation: list[Example]
    test: list[list[int]]
    references: list[list[str]]


def key_of(row: Row, data: str, **more: Any) -> dict[str, Any]:
    """What tells a row's result from others of the experiment."""
    return {"method": row.method, "bits": row.bits, "data": data, **more}


def rows_of(run: Run) -> list[Row]:
    """The rows of an experiment, by their titles; all if it names none."""
    return [row for row in all_rows() if not run.only or row.title in run.only]


class Bench:
    """The model and the data of a run; builds, tunes and measures the models of its rows."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.tokenizer = _ByteTokenizer() if run.model == TINY else load_tokenizer(named(run.model))
        self.data = {name: _made_up() if name == MADE_UP else self.load(name) for name in run.data}
        self.float_model = float_model(run.model, run.seed)
        self.base: tuple[Any, Optional[nn.Module]] = (None, None)  # the last calibrated one

    def load(self, name: str) -> Data:
        """A fixed sample of a data set's splits."""
        folder, run = data_folder(name), self.run
        for split in ("train", "validation", "test"):
            if not (folder / f"{split}.jsonl").is_file():
                raise NotHere(f"{folder} has no {split}.jsonl (lines with source and target).")
        training = read_rows(folder / "train.jsonl")
        random.Random(self.run.seed).shuffle(training)
        validation = read_rows(folder / "validation.jsonl")
        random.Random(self.run.seed).shuffle(validation)
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(folder / "test.jsonl"):
            groups.setdefault(row.get("entry", row["source"]), []).append(row)
        chosen = random.Random(self.run.seed).sample(list(groups.values()), min(run.test_inputs, len(groups)))
        return Data(
            [self.example(row) for row in training[: run.steps * run.batch_size]],
            [self.example(row) for row in validation[: run.validation_examples]],
            [self.prompt(group[0]["source"]) for group in chosen],
            [[row["target"] for row in group] for group in chosen],
        )

    def prompt(self, source: str) -> list[int]:
        """Token ids of what comes before a target."""
        return self.tokenizer(f"{source}\n\n", add_special_tokens=False)["input_ids"]

    def example(self, row: Mapping[str, Any]) -> Example:
        """Token ids of an input and one of its targets."""
        target = self.tokenizer(row["target"], add_special_tokens=False)["input_ids"]
        return Example(self.prompt(row["source"]), [*target, self.tokenizer.eos_token_id])

    def batches(self, examples: Sequence[Example]) -> list[dict[str, torch.Tensor]]:
        """Padded batches with labels on the targets."""
        size = self.run.batch_size
        return [_batch(examples[i : i + size], self.tokenizer.pad_token_id) for i in range(0, len(examples), size)]

    def build(self, row: Row, data: Data) -> nn.Module:
        """The untrained model of a row."""
        torch.manual_seed(self.run.seed)
        model = copy.deepcopy(self.float_model)
        if row.method == FULL:
            return model.requires_grad_(True)
        if row.method == LORA:
            return baselines.lora(model)
        config = row.config()
        key = (id(data), type(config), row.bits)
        if self.base[0] != key:  # rows that differ in what they train alone share it
            batches = self.batches(data.train[: self.run.calibration_examples])
            self.base = (key, calibrate(model, config, batches, progressbar=False))
        return get_peft_model(copy.deepcopy(self.base[1]), config)

    def train(self, model: nn.Module, data: Data, steps: int, rate: float, name: str) -> list[float]:
        """`steps` steps on the first examples."""
        torch.manual_seed(self.run.seed)
        examples = data.train[: steps * self.run.batch_size]
        return train(model, self.batches(examples), learning_rate=rate, name=name)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module, data: Data) -> float:
        """Mean loss of a target token."""
        total = count = 0.0
        for batch in self.batches(data.validation):
            tokens = (batch["labels"][:, 1:] != IGNORED).sum().item()
            total += model(**batch, use_cache=False).loss.item() * tokens
            count += tokens
        return total / count

    def learning_rate(self, row: Row) -> float:
        """The rate with the least validation loss on the first data set."""
        trial, name, found = row if row.bits is None else Row(ALPHA, 3), next(iter(self.data)), {}
        rates = LEARNING_RATES[trial.method]
        keys = {rate: key_of(trial, name, search=rate) for rate in rates}
        if any(self.run.find(key) is None for key in keys.values()):
            model = self.build(trial, self.data[name])
            restart = Restart(model)
            for rate in rates:
                title = f"{trial.title}, rate {rate:g}"
                losses = self.train(model, self.data[name], self.run.search_steps, rate, title)
                loss = self.validation_loss(model, self.data[name]) if math.isfinite(losses[-1]) else math.inf
                restart()
                self.run.add(keys[rate], {"validation": loss})
                log(f"{title}: validation loss {loss:.3f}")
        for rate, key in keys.items():
            result = self.run.find(key)
            found[rate] = math.inf if result is None else result["validation"]
        return min(found, key=lambda rate: found[rate])

    def measure(self, row: Row, name: str) -> dict[str, Any]:
        """Train, generate, compare."""
        data, rate, start = self.data[name], self.learning_rate(row), time.perf_counter()
        model = self.build(row, data)
        trained = sum(parameter.numel() for parameter in trainable(model))
        losses = self.train(model, data, self.run.steps, rate, f"{name}: {row.title}")
        loss = self.validation_loss(model, data)
        if row.bits is not None:
            model = model.merge_and_unload(dequantize=True)  # the same numbers, faster to generate with
        elif row.method == LORA:
            model = model.merge_and_unload()
        texts = self.generate(model, data.test)
        return {
            **nlg_metrics(texts, data.references),
            "validation": loss,
            "learning_rate": rate,
            "trained": trained,
            "losses": losses,
            "texts": texts[:5],
            "seconds": time.perf_counter() - start,
        }

    @torch.no_grad()
    def generate(self, model: nn.Module, prompts: Sequence[list[int]]) -> list[str]:
        """A greedy text for each prompt, its first line."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        texts, pad, size = {}, self.tokenizer.pad_token_id, 2 * self.run.batch_size
        for start in tqdm(range(0, len(order), size), desc="Generating", leave=False):
            indices = order[start : start + size]
            longest = max(len(prompts[index]) for index in indices)
            ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in indices])
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in indices])
            tokens = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.run.max_new_tokens,
                do_sample=False,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=pad,
            )
            decoded = self.tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)
            texts.update({index: text.strip().split("\n")[0] for index, text in zip(indices, decoded)})
        return [texts[index] for index in range(len(prompts))]


def _batch(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    longest = max(len(prompt) + len(target) for prompt, target in examples)
    ids, labels, mask = [], [], []
    for prompt, target in examples:
        left = longest - len(prompt) - len(target)
        ids.append([*prompt, *target, *[pad] * left])
        labels.append([IGNORED] * len(prompt) + target + [IGNORED] * left)
        mask.append([1] * (longest - left) + [0] * left)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


class _ByteTokenizer:
    """Bytes as tokens."""

    eos_token_id, pad_token_id = 1, 0

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [byte % SMOKE_VOCAB for byte in text.encode()]}

    def batch_decode(self, tokens: torch.Tensor, skip_special_tokens: bool = True) -> list[str]:
        return ["".join(chr(token) for token in row if 31 < token < 127) or "." for row in tokens.tolist()]


def _made_up() -> Data:
    tokenizer = _ByteTokenizer()
    rows = [Example(tokenizer(f"name[{i}]\n\n")["input_ids"], [*b"A place.", 1]) for i in range(8)]
    return Data(rows, rows[:2], [row.prompt for row in rows[:3]], [["A place."], ["A place.", "Place."], ["The."]])


def measure(run: Run) -> None:
    """Every row that isn't stored yet."""
    missing = [(name, row) for name in run.data for row in rows_of(run) if run.find(key_of(row, name)) is None]
    if not missing:
        return
    bench = Bench(run)
    with fast_linear():
        for name, row in missing:
            log(f"{name}: {row.title}")
            result = run.add(key_of(row, name), bench.measure(row, name))
            log(f"{name}: {row.title}: BLEU {result['BLEU']:.1f}, {result['seconds']:.0f} s")


def tables(run: Run) -> dict[str, str]:
    """By data set."""
    headers, shown = ["Method", *METRICS, "Trained numbers", "Learning rate"], {}
    for name in run.data:
        lines = []
        for row in rows_of(run):
            found = run.find(key_of(row, name))
            if found is None:
                lines.append([row.title, "not measured", *[None] * (len(headers) - 2)])
            else:
                figures = [f"{found[metric]:.1f}" for metric in METRICS]
                lines.append([row.title, *figures, f"{found['trained']:,}", f"{found['learning_rate']:g}"])
        shown[name] = f"{markdown_table(headers, lines)}\n\n{METEOR_NOTE}"
    return shown


def bleu(run: Run, row: Row, data: str) -> Optional[float]:
    """On the test inputs; None if it isn't measured."""
    return (run.find(key_of(row, data)) or {}).get("BLEU")


def claims(run: Run) -> list[Claim]:
    """How far below full fine-tuning, and all alphas against PEQA."""

    def below(name: str, row: Row, other: Row) -> Optional[float]:
        one, two = bleu(run, row, name), bleu(run, other, name)
        return None if one is None or two is None else two - one

    def says_nothing(row: Row, other: Row, name: str) -> bool:
        """Texts without a phrase in common with their references, as a quick run's, compare nothing."""
        found = [bleu(run, each, name) for each in (row, other)]
        return None not in found and max(each or 0.0 for each in found) < 1

    found = []
    for name in run.data:
        data = "e2e" if name == MADE_UP else name  # so that a quick figure finds the full-size one
        for bits, gap in TARGETS.items():
            if says_nothing(Row(ALPHA, bits), Row(FULL), name):
                continue
            value = below(name, Row(ALPHA, bits), Row(FULL))
            found.append(Claim(f"{data}: AlphaTuning, {bits} bits, BLEU below full fine-tuning", value, gap))
        for bits in (4, 3, 2):
            if says_nothing(Row(ALL_ALPHAS, bits), Row(PEQA, bits), name):
                continue
            value = below(name, Row(ALL_ALPHAS, bits), Row(PEQA, bits))
            found.append(Claim(f"{data}: all alphas, {bits} bits, BLEU below PEQA", value, 0.0))
    return found


def headlines(runs: Runs) -> list[Headline]:
    """E2E."""
    found = []
    for run in runs:
        full, lora = bleu(run, Row(FULL), "e2e"), bleu(run, Row(LORA), "e2e")
        for bits, gap in TARGETS.items():
            ours = bleu(run, Row(ALPHA, bits), "e2e")
            if ours is None or full is None or lora is None:
                continue
            found.append(
                Headline(
                    "Tuning packed models",
                    f"AlphaTuning, {bits} bits: BLEU on E2E",
                    f"{ours:.1f}" + f"; full fine-tuning {full:.1f}, LoRA {lora:.1f}" * (bits == max(TARGETS)),
                    unless(full - ours <= gap, f"at most {gap:g} below full fine-tuning: {full - ours:.3g}"),
                    "../benchmarks/alphatuning.md",
                )
            )
    return found


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
