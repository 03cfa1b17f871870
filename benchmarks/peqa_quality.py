# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Perplexity after tuning: PEQA against LoRA, LoRA then rounding, QLoRA, rounding alone, and training of all weights.

Every method sees the same batches for the same number of steps. Its learning rate is chosen on the validation split
with shortened runs (once per method and width, on the format named by `search_format`; a grid whose best rate is its
first or last is extended, twice at most; QLoRA takes LoRA's); the test split is read once per row.
Beside it stands the perplexity on a text of another domain, Python's documentation, which nothing is trained on.

    python -m benchmarks.peqa_quality --data-dir wikitext2 --budget full

Rows are stored as they finish and not measured again: after a kill, start it again with the same flags.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from peft import PeftModel
from torch import nn

from benchmarks import baselines
from benchmarks.common import Results, argument_parser, data_folder, describe, log, markdown_table, verdict
from benchmarks.fast_linear import fast_linear
from benchmarks.tuning import Restart, byte_blocks, causal_batches, sample_blocks, tiny_llama, train, trainable
from peft_ext import PeqaConfig
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer
from peft_ext.perplexity import perplexity
from peft_ext.text import PYTHON_DOCS, load_text, token_blocks


INITIALISATIONS = {
    "minmax": "rounded to nearest",
    "mse": "least squared error",
    "calibrated": "GPTQ on calibration data",
}
LEARNING_RATES = {
    "LoRA": (1e-3, 2e-3, 4e-3),
    "PEQA": (1e-2, 2e-2, 4e-2),
    "QAT": (5e-5, 1e-4),
}
EXTENSIONS = 2
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


class Budget(NamedTuple):
    """Steps and blocks of tokens; what decides how long the table takes."""

    steps: int
    search_steps: int
    test_blocks: int
    validation_blocks: int
    other_blocks: int
    calibration_blocks: int = 32
    batch_size: int = 4
    block_size: int = 256


BUDGETS = {
    "smoke": Budget(2, 1, 2, 1, 1, calibration_blocks=4, batch_size=2, block_size=32),
    "fast": Budget(40, 12, 96, 32, 48),
    "full": Budget(100, 20, 96, 32, 32),
}


@dataclass(frozen=True)
class Row:
    """One line of the table. `init_method` is where the integers come from; `tuned` tells whether anything is trained."""

    method: str
    bits: Optional[int] = None
    group_size: int = -1
    init_method: Optional[str] = None
    tuned: bool = True

    @property
    def title(self) -> str:
        """The first column."""
        if self.bits is None or self.method == "QLoRA":
            return f"{self.method}, NF4" if self.method == "QLoRA" else self.method
        form = "per channel" if self.group_size == -1 else f"group {self.group_size}"
        note = "" if self.method == "QAT" else f"; {INITIALISATIONS[str(self.init_method)]}"
        return f"{self.method}, {self.bits} bits, {form}{note}"

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from other rows under the same budget."""
        return {"method": self.method, "bits": self.bits, "group_size": self.group_size, "start": self.init_method}

    def config(self) -> PeqaConfig:
        """The format of the weights."""
        return PeqaConfig(bits=self.bits, group_size=self.group_size, init_method=self.init_method)

    def search_format(self) -> Row:
        """The row on which the learning rate of this row's method and width is chosen."""
        if self.method == "PEQA":
            return Row("PEQA", self.bits, -1 if self.bits == 3 else 64, "calibrated")
        if self.method == "QLoRA":
            return Row("LoRA")  # the same adapter on weights that differ a little
        return Row("QAT", 4, -1, "calibrated") if self.method == "QAT" else self


def all_rows() -> list[Row]:
    """The table, the most telling rows first."""
    widths, groups = (4, 3, 2), (-1, 64)
    rows = [Row("Float, untouched", tuned=False), Row("LoRA")]
    for bits, group in ((4, 64), (3, -1), (2, 64)):
        rows += _with_and_without_tuning(bits, group, "calibrated")
    rows += [Row("LoRA, then quantised", bits, group, "minmax", False) for bits in widths for group in groups]
    rows += [Row("QLoRA", 4, 64)]
    for bits, group in ((4, -1), (3, 64), (2, -1)):
        rows += _with_and_without_tuning(bits, group, "calibrated")
    rows += [Row("Quantised", bits, group, "minmax", False) for bits in widths for group in groups]
    rows += [Row("QAT", bits, -1, "calibrated") for bits in (4, 3)]
    rows += [
        Row("LoRA, then quantised", bits, group, "calibrated", False)
        for bits, group in ((4, 64), (4, -1), (3, 64), (3, -1), (2, 64))
    ]
    for init_method in ("minmax", "mse"):
        rows += [row for row in _with_and_without_tuning(4, -1, init_method) if row not in rows]
    return [*rows, Row("Quantised", 3, -1, "mse", False)]


def _with_and_without_tuning(bits: int, group_size: int, init_method: str) -> list[Row]:
    return [Row("Quantised", bits, group_size, init_method, False), Row("PEQA", bits, group_size, init_method)]


class Data(NamedTuple):
    """Token blocks `[n, block_size]` of each purpose."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    other: torch.Tensor
    calibration: torch.Tensor


class Study:
    """The model, the data and the stored results; measures rows."""

    def __init__(self, args: argparse.Namespace, budget: Budget) -> None:
        self.args, self.budget = args, budget
        self.results = Results(args.output, args.seed)
        self.work = args.output.with_suffix(".work")
        self.float_model = tiny_llama() if args.smoke else load(args.model, dtype=torch.float32)
        self.data = _smoke_data(budget) if args.smoke else load_data(args, budget)
        self.current: tuple[Optional[tuple], Optional[nn.Module]] = (None, None)
        self.methods: dict[str, Callable[[Row], nn.Module]] = {
            "Float, untouched": lambda row: copy.deepcopy(self.float_model),
            "LoRA": lambda row: baselines.lora(copy.deepcopy(self.float_model)),
            "QLoRA": lambda row: baselines.qlora(copy.deepcopy(self.float_model)),
            "Quantised": lambda row: self.quantized(row),
            "PEQA": lambda row: self.quantized(row),
            "LoRA, then quantised": self.lora_then_quantized,
            "QAT": lambda row: baselines.quantization_aware(
                copy.deepcopy(self.float_model), row.config(), self.data.calibration
            ),
        }

    def settings(self, row: Row, **more: Any) -> dict[str, Any]:
        """Everything that the row's result depends on."""
        budget = self.budget._asdict()
        if not row.tuned and not row.method.startswith("LoRA"):
            for name in ("steps", "search_steps", "validation_blocks", "batch_size"):
                del budget[name]
        if row.init_method != "calibrated":
            del budget["calibration_blocks"]
        if row.method == "LoRA, then quantised":
            more["learning_rate"] = self.learning_rates(Row("LoRA"))[1]
        model = "tiny random Llama" if self.args.smoke else self.args.model
        data = "smoke" if self.args.smoke else self.args.data_dir.name
        return {**row.key, **budget, "model": model, "data": data, "seed": self.args.seed, **more}

    def find(self, row: Row) -> Optional[dict[str, Any]]:
        """The stored result, unless its learning rate was the edge of a grid that is to be extended."""
        found = self.results.find(self.settings(row))
        if found is None or not row.tuned or "skipped" in found:
            return found
        return found if self.learning_rates(row)[0] is None else None

    def measure(self, row: Row) -> dict[str, Any]:
        """The row's result: perplexities, and for tuned rows what training took."""
        start = time.perf_counter()
        result = self.tune(row) if row.tuned else {}
        model = result.pop("model", None) or self.build(row)
        result["test"] = perplexity(model, self.data.test, batch_size=self.budget.batch_size)
        result["other"] = perplexity(model, self.data.other, batch_size=self.budget.batch_size)
        result["seconds"] = time.perf_counter() - start
        return result

    def build(self, row: Row) -> nn.Module:
        """The untrained model of a row."""
        torch.manual_seed(self.args.seed)
        return self.methods[row.method](row)

    def quantized(self, row: Row) -> nn.Module:
        """The model under PEQA. Kept for the next row, which often tunes what this one only measures."""
        form = (row.bits, row.group_size, row.init_method)
        if self.current[0] != form:
            self.current = (None, None)  # frees the last one first
            model = baselines.quantized(copy.deepcopy(self.float_model), row.config(), self.data.calibration)
            self.current = (form, model)
        return self.current[1]

    def tune(self, row: Row) -> dict[str, Any]:
        """Train the row's model with the learning rate that validation chose."""
        rate, model, note = self.learning_rate(row)
        model = model if model is not None else self.build(row)
        trained = sum(parameter.numel() for parameter in trainable(model))
        start = time.perf_counter()
        losses = self.train(model, self.budget.steps, rate, row.title)
        seconds = (time.perf_counter() - start) / len(losses)
        if row.method == "LoRA":
            self.keep_lora(model)
        with tempfile.TemporaryDirectory() as folder:
            size = baselines.adapter_bytes(model, folder)
        self.current = (None, None)  # it isn't untrained any more
        return {
            "model": model,
            "learning_rate": rate,
            "search": note,
            "losses": losses,
            "seconds_per_step": seconds,
            "trained": trained,
            "adapter_bytes": size,
        }

    def train(self, model: nn.Module, steps: int, rate: float, name: str) -> list[float]:
        """`steps` steps on the first batches of the training data."""
        blocks = self.data.train[: steps * self.budget.batch_size]
        torch.manual_seed(self.args.seed)
        return train(model, causal_batches(blocks, self.budget.batch_size), learning_rate=rate, name=name)

    def learning_rate(self, row: Row) -> tuple[float, Optional[nn.Module], dict[str, float]]:
        """The rate with the least validation perplexity; with it the row's untrained model, if the search built it."""
        trial = row.search_format()
        rate, best, found = self.learning_rates(row)
        model = None if rate is None else self.build(trial)
        restart = None if model is None else Restart(model)
        while rate is not None and model is not None and restart is not None:
            losses = self.train(model, self.budget.search_steps, rate, f"{trial.title}, rate {rate:g}")
            value = perplexity(model, self.data.validation) if math.isfinite(losses[-1]) else math.inf
            restart()
            self.results.add(self.settings(trial, search=rate), {"validation": value})
            log(f"{trial.title}, learning rate {rate:g}: validation perplexity {value:.2f}")
            rate, best, found = self.learning_rates(row)
        shown = {f"{rate:g}": value for rate, value in found.items()}
        return best or LEARNING_RATES[trial.method][0], model if trial == row else None, shown

    def learning_rates(self, row: Row) -> tuple[Optional[float], Optional[float], dict[float, float]]:
        """The next rate to try (None: enough), the best so far, and the validation perplexity of those tried."""
        trial = row.search_format()
        grid = list(LEARNING_RATES[trial.method])
        for extension in range(EXTENSIONS + 1):
            stored = {rate: self.results.find(self.settings(trial, search=rate)) for rate in grid}
            found = {rate: result["validation"] for rate, result in stored.items() if result is not None}
            best = min(found, key=lambda rate: found[rate]) if found else None
            missing = [rate for rate in grid if rate not in found]
            if best is None or missing or extension == EXTENSIONS or best not in (min(grid), max(grid)):
                break
            grid.append(2 * best if best == max(grid) else best / 2)
        return missing[0] if missing else None, best, found

    def keep_lora(self, model: nn.Module) -> None:
        """Keep the trained LoRA for the rows that quantise it."""
        self.work.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self.work))
        model.save_pretrained(folder)
        shutil.rmtree(self.lora_folder(), ignore_errors=True)
        folder.rename(self.lora_folder())

    def lora_folder(self) -> Path:
        """Where the trained LoRA of these settings lies."""
        rate = self.learning_rates(Row("LoRA"))[1]
        name = "-".join(str(part) for part in (Path(self.args.model).stem, *self.budget, self.args.seed, rate))
        return self.work / f"lora-{name}"

    def lora_then_quantized(self, row: Row) -> nn.Module:
        """LoRA as it was trained in float, merged, then quantised."""
        if self.learning_rates(Row("LoRA"))[0] is not None or not self.lora_folder().is_dir():
            self.tune(Row("LoRA"))
        model = PeftModel.from_pretrained(copy.deepcopy(self.float_model), self.lora_folder()).merge_and_unload()
        return baselines.rounded(model, row.config(), self.data.calibration)


def load_data(args: argparse.Namespace, budget: Budget) -> Data:
    """Token blocks of the data folder's splits and of Python's documentation."""
    tokenizer = load_tokenizer(args.model)

    def blocks(name: str) -> torch.Tensor:
        text = find_split(args.data_dir, name).read_text(encoding="utf-8")
        return token_blocks(tokenizer, [text], budget.block_size, name=f"{name} split")

    log("Tokenising")
    train_blocks = blocks("train")
    count = max(budget.steps, budget.search_steps) * budget.batch_size
    other = token_blocks(tokenizer, load_text(PYTHON_DOCS).held_out, budget.block_size)
    return Data(
        sample_blocks(train_blocks, count, args.seed),
        blocks("validation")[: budget.validation_blocks],
        blocks("test")[: budget.test_blocks],
        other[: budget.other_blocks],
        sample_blocks(train_blocks, budget.calibration_blocks, args.seed + 1),
    )


def _smoke_data(budget: Budget) -> Data:
    texts = load_text(PYTHON_DOCS)
    train_blocks, held_out = (byte_blocks(part[:20], budget.block_size) for part in texts)
    return Data(
        train_blocks[: budget.steps * budget.batch_size],
        held_out[: budget.validation_blocks],
        held_out[-budget.test_blocks :],
        held_out.flip(1)[: budget.other_blocks],
        train_blocks[-budget.calibration_blocks :],
    )


def find_split(folder: Path, name: str) -> Path:
    """The text file of a split.

    Raises:
        FileNotFoundError: Names what is missing and how to pass it.
    """
    for stem in SPLITS[name]:
        if (folder / f"{stem}.txt").is_file():
            return folder / f"{stem}.txt"
    raise FileNotFoundError(
        f"data-dir={str(folder)!r} has no {' or '.join(f'{stem}.txt' for stem in SPLITS[name])}; pass a folder with "
        "train.txt, valid.txt and test.txt (wikitext-2, for the table in peqa.md) as --data-dir or in PEFT_EXT_DATA."
    )


def table(study: Study, rows: Sequence[Row]) -> str:
    """The Markdown table of what is measured so far."""
    found = [(row, study.find(row)) for row in rows]
    headers = ["Model", "Test perplexity", "Python's documentation", "Trained parameters", "Learning rate"]
    lines = []
    for row, result in found:
        if result is None or "skipped" in result:
            lines.append([row.title, "not measured" if result is None else result["skipped"], *[None] * 3])
            continue
        lines.append(
            [
                row.title,
                _number(result["test"]),
                _number(result["other"]),
                f"{result['trained']:,}" if row.tuned else "0",
                f"{result['learning_rate']:g}" if row.tuned else None,
            ]
        )
    return markdown_table(headers, lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def verdicts(study: Study) -> list[str]:
    """The lines that say which claims the table bears out."""

    def test(row: Row) -> Optional[float]:
        result = study.find(row)
        return None if result is None else result.get("test")

    def ratio(over: Row, under: Row) -> Optional[float]:
        above, below = test(over), test(under)
        return None if above is None or below is None else above / below

    float_row, lora_row = all_rows()[:2]
    peqa = {
        (row.bits, row.group_size): row
        for row in all_rows()
        if (row.method, row.init_method) == ("PEQA", "calibrated")
    }
    lines = [
        verdict("PEQA, 4 bits, group 64, over LoRA float", ratio(peqa[4, 64], lora_row), 1.05),
        verdict("PEQA, 3 bits, per channel, over LoRA float", ratio(peqa[3, -1], lora_row), 1.25),
        verdict("PEQA, 3 bits, per channel, over the untouched float model", ratio(peqa[3, -1], float_row), 1.0),
        verdict("PEQA, 2 bits, group 64, over the untouched float model", ratio(peqa[2, 64], float_row), 1.4),
    ]
    for row in all_rows():
        if row.method == "LoRA, then quantised":
            value = ratio(peqa[row.bits, row.group_size], row)
            lines.append(verdict(f"PEQA over {row.title}", value, 1.0))
    return lines


def run(study: Study, rows: Sequence[Row]) -> None:
    """Measure every row that isn't stored yet."""
    for index, row in enumerate(rows, start=1):
        if study.find(row) is not None:
            continue
        log(f"Row {index} of {len(rows)}: {row.title}")
        try:
            result = study.measure(row)
        except (ImportError, TypeError) as error:
            if row.method not in ("QLoRA", "QAT"):
                raise
            result = {"skipped": f"not possible here: {error}"}
        study.results.add(study.settings(row), result)
        if "test" in result:
            log(f"{row.title}: test {result['test']:.2f}, other {result['other']:.2f}, {result['seconds']:.0f} s")


def parse(argv: Optional[Sequence[str]]) -> tuple[argparse.Namespace, Budget]:
    """The command line; single numbers override the budget's."""
    parser = argument_parser(__doc__, "peqa_quality.json")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default, hub id, folder or .gguf file")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=data_folder("PEFT_EXT_DATA", "wikitext2"),
        help="train.txt, valid.txt and test.txt",
    )
    parser.add_argument(
        "--budget", choices=("fast", "full"), default="fast", help="70 minutes, or 3 hours, on 2 cores"
    )
    for name in Budget._fields:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="overrides the budget's")
    parser.add_argument("--rows", nargs="*", default=[], help="only rows whose title contains one of these")
    args = parser.parse_args(argv)
    if not args.smoke:
        if args.data_dir is None:
            parser.error("no data: pass --data-dir (or PEFT_EXT_DATA) with train.txt, valid.txt and test.txt")
        for name in SPLITS:
            find_split(args.data_dir, name)
    given = {name: getattr(args, name) for name in Budget._fields if getattr(args, name) is not None}
    return args, BUDGETS["smoke" if args.smoke else args.budget]._replace(**given)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure, then print the table and the verdicts."""
    args, budget = parse(argv)
    study = Study(args, budget)
    rows = [row for row in all_rows() if not args.rows or any(part in row.title for part in args.rows)]
    if not args.table:
        with fast_linear():
            run(study, rows)
    print(table(study, rows))
    print()
    print("\n".join(verdicts(study)))
    tokens = f"{budget.batch_size} x {budget.block_size} tokens"
    print(f"\n{budget.steps} steps of {tokens}, {budget.test_blocks} test blocks.")
    if study.results.rows:
        print(describe(study.results.rows[-1]["environment"]))


if __name__ == "__main__":
    main()
