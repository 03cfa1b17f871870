# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Text from data (E2E, WebNLG): AlphaTuning against full fine-tuning, LoRA and PEQA, by BLEU, METEOR, ROUGE-L, chrF.

Every method sees the same examples in the same order for the same number of steps; the loss counts the target only.
Learning rates are chosen by the validation loss of shortened runs on the first data set, and used on all; those of
scales, which want the same everywhere (`peqa_learning_rate.py`), once for all packed models, on AlphaTuning at 3 bits.
Packed models start calibrated on training examples, per channel. Texts are
generated greedily for a fixed sample of test inputs, and compared with all references of each.

    python -m benchmarks.alphatuning_nlg --data-dir shared/data

Rows are stored as they finish and not measured again: after a kill, start it again with the same flags.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from peft import get_peft_model
from torch import nn
from tqdm.auto import tqdm

from benchmarks import baselines
from benchmarks.common import Results, argument_parser, data_folder, describe, log, markdown_table, verdict
from benchmarks.fast_linear import fast_linear
from benchmarks.nlg_metrics import METEOR_NOTE, nlg_metrics
from benchmarks.tuning import SMOKE_VOCAB, Restart, tiny_llama, train, trainable
from peft_ext import AlphaTuningConfig, PeqaConfig, calibrate
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer
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


class Budget(NamedTuple):
    """How much of the data is used; what decides how long the table takes."""

    steps: int = 40
    search_steps: int = 10
    batch_size: int = 16
    validation_examples: int = 64
    calibration_examples: int = 96
    test_inputs: int = 120
    max_new_tokens: int = 72


SMOKE = Budget(2, 1, 2, 2, 4, 3, 4)


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
            return PeqaConfig(bits=self.bits, init_method="calibrated", task_type="CAUSAL_LM")
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


class Study:
    """Model, data and stored results; measures rows."""

    def __init__(self, args: argparse.Namespace, budget: Budget) -> None:
        self.args, self.budget = args, budget
        self.results = Results(args.output, args.seed)
        self.tokenizer = _SmokeTokenizer() if args.smoke else load_tokenizer(args.model)
        self.float_model = tiny_llama() if args.smoke else load(args.model, dtype=torch.float32)
        self.base: tuple[Any, Optional[nn.Module]] = (None, None)  # the last calibrated one
        names = ("smoke",) if args.smoke else tuple(args.data)
        self.data = {name: _smoke_data() if args.smoke else self.load(name) for name in names}

    def load(self, name: str) -> Data:
        """A fixed sample of a data set's splits."""
        folder, budget = self.args.data_dir / name, self.budget
        training = read_rows(folder / "train.jsonl")
        random.Random(self.args.seed).shuffle(training)
        validation = read_rows(folder / "validation.jsonl")
        random.Random(self.args.seed).shuffle(validation)
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(folder / "test.jsonl"):
            groups.setdefault(row.get("entry", row["source"]), []).append(row)
        chosen = random.Random(self.args.seed).sample(list(groups.values()), min(budget.test_inputs, len(groups)))
        return Data(
            [self.example(row) for row in training[: budget.steps * budget.batch_size]],
            [self.example(row) for row in validation[: budget.validation_examples]],
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

    def settings(self, row: Row, data: str, **more: Any) -> dict[str, Any]:
        """Everything that the row's result depends on."""
        model = "tiny random Llama" if self.args.smoke else self.args.model
        key = {"method": row.method, "bits": row.bits, "data": data, "model": model, "seed": self.args.seed}
        return {**key, **self.budget._asdict(), **more}

    def batches(self, examples: Sequence[Example]) -> list[dict[str, torch.Tensor]]:
        """Padded batches with labels on the targets."""
        size = self.budget.batch_size
        return [_batch(examples[i : i + size], self.tokenizer.pad_token_id) for i in range(0, len(examples), size)]

    def build(self, row: Row, data: Data) -> nn.Module:
        """The untrained model of a row."""
        torch.manual_seed(self.args.seed)
        model = copy.deepcopy(self.float_model)
        if row.method == FULL:
            return model.requires_grad_(True)
        if row.method == LORA:
            return baselines.lora(model)
        config = row.config()
        key = (id(data), type(config), row.bits)
        if self.base[0] != key:  # rows that differ in what they train alone share it
            batches = self.batches(data.train[: self.budget.calibration_examples])
            self.base = (key, calibrate(model, config, batches, progressbar=False))
        return get_peft_model(copy.deepcopy(self.base[1]), config)

    def train(self, model: nn.Module, data: Data, steps: int, rate: float, name: str) -> list[float]:
        """`steps` steps on the first examples."""
        torch.manual_seed(self.args.seed)
        examples = data.train[: steps * self.budget.batch_size]
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
        keys = {rate: self.settings(trial, name, search=rate) for rate in rates}
        if any(self.results.find(key) is None for key in keys.values()):
            model = self.build(trial, self.data[name])
            restart = Restart(model)
            for rate in rates:
                title = f"{trial.title}, rate {rate:g}"
                losses = self.train(model, self.data[name], self.budget.search_steps, rate, title)
                loss = self.validation_loss(model, self.data[name]) if math.isfinite(losses[-1]) else math.inf
                restart()
                self.results.add(keys[rate], {"validation": loss})
                log(f"{title}: validation loss {loss:.3f}")
        for rate, key in keys.items():
            result = self.results.find(key)
            found[rate] = math.inf if result is None else result["validation"]
        return min(found, key=lambda rate: found[rate])

    def measure(self, row: Row, name: str) -> dict[str, Any]:
        """Train, generate, compare."""
        data, rate, start = self.data[name], self.learning_rate(row), time.perf_counter()
        model = self.build(row, data)
        trained = sum(parameter.numel() for parameter in trainable(model))
        losses = self.train(model, data, self.budget.steps, rate, f"{name}: {row.title}")
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
        texts, pad, size = {}, self.tokenizer.pad_token_id, 2 * self.budget.batch_size
        for start in tqdm(range(0, len(order), size), desc="Generating", leave=False):
            indices = order[start : start + size]
            longest = max(len(prompts[index]) for index in indices)
            ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in indices])
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in indices])
            tokens = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.budget.max_new_tokens,
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


class _SmokeTokenizer:
    """Bytes as tokens."""

    eos_token_id, pad_token_id = 1, 0

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [byte % SMOKE_VOCAB for byte in text.encode()]}

    def batch_decode(self, tokens: torch.Tensor, skip_special_tokens: bool = True) -> list[str]:
        return ["".join(chr(token) for token in row if 31 < token < 127) or "." for row in tokens.tolist()]


def _smoke_data() -> Data:
    tokenizer = _SmokeTokenizer()
    rows = [Example(tokenizer(f"name[{i}]\n\n")["input_ids"], [*b"A place.", 1]) for i in range(8)]
    return Data(rows, rows[:2], [row.prompt for row in rows[:3]], [["A place."], ["A place.", "Place."], ["The."]])


def table(study: Study, rows: Sequence[Row], name: str) -> str:
    """The Markdown table of one data set."""
    headers = ["Method", *METRICS, "Trained numbers", "Learning rate"]
    lines = []
    for row in rows:
        found = study.results.find(study.settings(row, name))
        if found is None:
            lines.append([row.title, "not measured", *[None] * (len(headers) - 2)])
        else:
            figures = [f"{found[metric]:.1f}" for metric in METRICS]
            lines.append([row.title, *figures, f"{found['trained']:,}", f"{found['learning_rate']:g}"])
    return markdown_table(headers, lines)


def verdicts(study: Study, name: str) -> list[str]:
    """The lines that say which claims the table bears out."""

    def bleu(row: Row) -> Optional[float]:
        found = study.results.find(study.settings(row, name))
        return None if found is None else found["BLEU"]

    def below(row: Row, other: Row) -> Optional[float]:
        one, two = bleu(row), bleu(other)
        return None if one is None or two is None else two - one

    lines = [
        verdict(
            f"{name}: AlphaTuning, {bits} bits, BLEU below full fine-tuning", below(Row(ALPHA, bits), Row(FULL)), gap
        )
        for bits, gap in TARGETS.items()
    ]
    return lines + [
        verdict(
            f"{name}: all alphas, {bits} bits, BLEU below PEQA", below(Row(ALL_ALPHAS, bits), Row(PEQA, bits)), 0.0
        )
        for bits in (4, 3, 2)
    ]


def parse(argv: Optional[Sequence[str]]) -> tuple[argparse.Namespace, Budget]:
    """The command line; single numbers override the budget's."""
    parser = argument_parser(__doc__, "alphatuning_nlg.json", budget=Budget()._asdict())
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default, hub id, folder or .gguf file")
    parser.add_argument(
        "--data-dir", type=Path, default=data_folder("PEFT_EXT_NLG_DATA"), help="holds the data sets' folders"
    )
    parser.add_argument(
        "--data", nargs="+", default=["e2e", "webnlg"], help="folders with {train,validation,test}.jsonl"
    )
    parser.add_argument("--rows", nargs="*", default=[], help="only rows whose title contains one of these")
    args = parser.parse_args(argv)
    if not args.smoke:
        if args.data_dir is None:
            parser.error("no data: pass --data-dir (or PEFT_EXT_NLG_DATA), a folder with e2e/ and webnlg/")
        for name in args.data:
            for split in ("train", "validation", "test"):
                if not (args.data_dir / name / f"{split}.jsonl").is_file():
                    parser.error(f"{args.data_dir / name}: no {split}.jsonl (lines with source and target)")
    return args, SMOKE if args.smoke else Budget(*(getattr(args, name) for name in Budget._fields))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure, then print the tables and the verdicts."""
    args, budget = parse(argv)
    study = Study(args, budget)
    rows = [row for row in all_rows() if not args.rows or any(part in row.title for part in args.rows)]
    turns = [] if args.table else [(name, row) for name in study.data for row in rows]
    with fast_linear():
        for name, row in turns:
            if study.results.find(study.settings(row, name)) is None:
                log(f"{name}: {row.title}")
                result = study.results.add(study.settings(row, name), study.measure(row, name))
                log(f"{name}: {row.title}: BLEU {result['BLEU']:.1f}, {result['seconds']:.0f} s")
    for name in study.data:
        print(f"\n{name}\n\n{table(study, rows, name)}\n")
        print("\n".join(verdicts(study, name)))
    print(f"\n{METEOR_NOTE}\n{budget}")
    if study.results.rows:
        print(describe(study.results.rows[-1]["environment"]))


if __name__ == "__main__":
    main()
