# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Perplexity after tuning: PEQA against LoRA, LoRA then rounding, QLoRA, rounding alone, and training of all weights.

Every method sees the same batches for the same number of steps. Its learning rate is chosen on the validation split
with shortened runs (once per method and width, on the format named by `search_format`; a grid whose best rate is its
first or last is extended, twice at most; QLoRA takes LoRA's); the test split is read once per row.
Beside it stands the perplexity on a text of another domain, Python's documentation, which nothing is trained on.

    python -m benchmarks peqa_quality
"""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from benchmarks import baselines
from benchmarks.core.claims import Claim, Headline, markdown_table, perplexity_cell, unless
from benchmarks.core.models import named
from benchmarks.core.run import NotHere, Run, data_folder, log
from benchmarks.core.task import Runs, Task, claims_of_each, run_named, tables_of_each
from benchmarks.fast_linear import fast_linear
from benchmarks.tuning import BYTES, Restart, byte_blocks, causal_batches, float_model, sample_blocks, train, trainable
from peft_ext import PeqaConfig
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer
from peft_ext.perplexity import perplexity
from peft_ext.quant.formats import GPTQ
from peft_ext.text import PYTHON_DOCS, load_text, token_blocks


# The integers of the model's own file, with its minimums: nothing is rounded.
FILE = "file"
# GPTQ is what `init_method="calibrated"` was when most rows were measured; it goes on behind error feedback since.
INITIALISATIONS = {
    "minmax": "rounded to nearest",
    "mse": "least squared error",
    GPTQ: "GPTQ on calibration data",
    FILE: "the GGUF's own integers",
}
# What PEQA trains, and what a title says of it.
SCALES, ZEROS, NORMS = "scales", "scales+zeros", "norms"
TRAINED = {
    SCALES: "",
    ZEROS: "; scales and minimums trained",
    f"{SCALES}+{NORMS}": "; scales and norms trained",
    f"{ZEROS}+{NORMS}": "; scales, minimums and norms trained",
}
LEARNING_RATES = {
    "LoRA": (1e-3, 2e-3, 4e-3),
    "PEQA": (1e-2, 2e-2, 4e-2),
    "QAT": (5e-5, 1e-4),
}
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Row:
    """One line of the table. `init_method` is where the integers come from; `tuned` tells whether anything is trained, and
    `trained` what of PEQA's layers."""

    method: str
    bits: Optional[int] = None
    group_size: int = -1
    init_method: Optional[str] = None
    tuned: bool = True
    trained: str = SCALES

    @property
    def title(self) -> str:
        """The first column."""
        if self.bits is None or self.method == "QLoRA":
            return f"{self.method}, NF4" if self.method == "QLoRA" else self.method
        form = "per channel" if self.group_size == -1 else f"group {self.group_size}"
        note = "" if self.method == "QAT" else f"; {INITIALISATIONS[str(self.init_method)]}"
        return f"{self.method}, {self.bits} bits, {form}{note}{TRAINED[self.trained]}"

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from other rows under the same budget."""
        key = {"method": self.method, "bits": self.bits, "group_size": self.group_size, "start": self.init_method}
        return key if self.trained == SCALES else {**key, "trained": self.trained}

    def config(self) -> PeqaConfig:
        """The format of the weights, and what is trained of it."""
        form: dict[str, Any] = {}
        if self.init_method != FILE:
            form = {"bits": self.bits, "group_size": self.group_size, "init_method": self.init_method}
        if ZEROS in self.trained:
            form["trained"] = ZEROS
        return PeqaConfig(**form)

    def search_format(self) -> Row:
        """The row on which the learning rate of this row's method and width is chosen."""
        if self.method == "PEQA" and ZEROS in self.trained:
            return replace(self, trained=ZEROS)
        if self.method == "PEQA":
            return Row("PEQA", self.bits, -1 if self.bits == 3 else 64, GPTQ)
        if self.method == "QLoRA":
            return Row("LoRA")  # the same adapter on weights that differ a little
        return Row("QAT", 4, -1, GPTQ) if self.method == "QAT" else self


def rows_of(run: Run) -> list[Row]:
    """The rows of an experiment: those whose title contains one of its `only`, or all; a file's own integers where there
    is a file that has any."""
    rows = [row for row in all_rows() if not run.only or any(part in row.title for part in run.only)]
    return rows if run.model == DEFAULT_MODEL else [row for row in rows if row.init_method != FILE]


def all_rows() -> list[Row]:
    """The table, the most telling rows first."""
    widths, groups = (4, 3, 2), (-1, 64)
    rows = [Row("Float, untouched", tuned=False), Row("LoRA")]
    for bits, group in ((4, 64), (3, -1), (2, 64)):
        rows += _with_and_without_tuning(bits, group, GPTQ)
    rows += _with_and_without_tuning(4, 32, FILE)
    rows += [Row("PEQA", 4, 32, FILE, trained=trained) for trained in TRAINED if trained != SCALES]
    rows += [Row("LoRA, then quantised", bits, group, "minmax", False) for bits in widths for group in groups]
    rows += [Row("QLoRA", 4, 64)]
    for bits, group in ((4, -1), (3, 64), (2, -1)):
        rows += _with_and_without_tuning(bits, group, GPTQ)
    rows += [Row("Quantised", bits, group, "minmax", False) for bits in widths for group in groups]
    rows += [Row("QAT", bits, -1, GPTQ) for bits in (4, 3)]
    rows += [
        Row("LoRA, then quantised", bits, group, GPTQ, False)
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


def key_of(run: Run, row: Row, **more: Any) -> dict[str, Any]:
    """What tells a row's result from others of the experiment."""
    if row.method == "LoRA, then quantised":
        more["learning_rate"] = learning_rates(run, Row("LoRA"))[1]
    return {**row.key, **more}


def find(run: Run, row: Row) -> Optional[dict[str, Any]]:
    """The stored result, unless its learning rate was the edge of a grid that is to be extended."""
    found = run.find(key_of(run, row))
    if found is None or not row.tuned or "skipped" in found:
        return found
    return found if learning_rates(run, row)[0] is None else None


def learning_rates(run: Run, row: Row) -> tuple[Optional[float], Optional[float], dict[float, float]]:
    """The next rate to try (None: enough), the best so far, and the validation perplexity of those tried."""
    trial = row.search_format()
    grid = list(LEARNING_RATES[trial.method])
    for extension in range(run.extensions + 1):
        stored = {rate: run.find(key_of(run, trial, search=rate)) for rate in grid}
        found = {rate: result["validation"] for rate, result in stored.items() if result is not None}
        best = min(found, key=lambda rate: found[rate]) if found else None
        missing = [rate for rate in grid if rate not in found]
        if best is None or missing or extension == run.extensions or best not in (min(grid), max(grid)):
            break
        grid.append(2 * best if best == max(grid) else best / 2)
    return missing[0] if missing else None, best, found


class Bench:
    """The float model and the data of a run; builds, tunes and measures the models of its rows."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.data = _byte_data(run) if run.data == BYTES else load_data(run)
        self.float_model = float_model(run.model, run.seed)
        self.current: tuple[Optional[tuple], Optional[nn.Module]] = (None, None)
        self.methods = {
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

    def measure(self, row: Row) -> dict[str, Any]:
        """The row's result: perplexities, and for tuned rows what training took."""
        start = time.perf_counter()
        result = self.tune(row) if row.tuned else {}
        model = result.pop("model", None) or self.build(row)
        result["test"] = perplexity(model, self.data.test, batch_size=self.run.batch_size)
        result["other"] = perplexity(model, self.data.other, batch_size=self.run.batch_size)
        result["seconds"] = time.perf_counter() - start
        return result

    def build(self, row: Row) -> nn.Module:
        """The untrained model of a row."""
        torch.manual_seed(self.run.seed)
        return self.methods[row.method](row)

    def quantized(self, row: Row) -> nn.Module:
        """The model under PEQA. Kept for the next row, which often tunes what this one only measures."""
        form = (row.bits, row.group_size, row.init_method, row.trained)
        if self.current[0] != form:
            self.current = (None, None)  # frees the last one first
            if row.init_method == FILE:
                model = get_peft_model(load(named(self.run.model), dtype=torch.float32, packed=True), row.config())
            else:
                model = baselines.quantized(copy.deepcopy(self.float_model), row.config(), self.data.calibration)
            if NORMS in row.trained:
                train_norms(model)
            self.current = (form, model)
        return self.current[1]

    def tune(self, row: Row) -> dict[str, Any]:
        """Train the row's model with the learning rate that validation chose."""
        rate, model, note = self.learning_rate(row)
        model = model if model is not None else self.build(row)
        trained = sum(parameter.numel() for parameter in trainable(model))
        start = time.perf_counter()
        losses = self.train(model, self.run.steps, rate, row.title)
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
        blocks = self.data.train[: steps * self.run.batch_size]
        torch.manual_seed(self.run.seed)
        return train(model, causal_batches(blocks, self.run.batch_size), learning_rate=rate, name=name)

    def learning_rate(self, row: Row) -> tuple[float, Optional[nn.Module], dict[str, float]]:
        """The rate with the least validation perplexity; with it the row's untrained model, if the search built it."""
        trial = row.search_format()
        rate, best, found = learning_rates(self.run, row)
        model = None if rate is None else self.build(trial)
        restart = None if model is None else Restart(model)
        while rate is not None and model is not None and restart is not None:
            losses = self.train(model, self.run.search_steps, rate, f"{trial.title}, rate {rate:g}")
            value = perplexity(model, self.data.validation) if math.isfinite(losses[-1]) else math.inf
            restart()
            self.run.add(key_of(self.run, trial, search=rate), {"validation": value})
            log(f"{trial.title}, learning rate {rate:g}: validation perplexity {value:.2f}")
            rate, best, found = learning_rates(self.run, row)
        shown = {f"{rate:g}": value for rate, value in found.items()}
        return best or LEARNING_RATES[trial.method][0], model if trial == row else None, shown

    def keep_lora(self, model: nn.Module) -> None:
        """Keep the trained LoRA for the rows that quantise it."""
        folder = Path(tempfile.mkdtemp(dir=self.run.work))
        model.save_pretrained(folder)
        shutil.rmtree(self.lora_folder(), ignore_errors=True)
        folder.rename(self.lora_folder())

    def lora_folder(self) -> Path:
        """Where the trained LoRA of these settings lies."""
        return self.run.work / f"lora-{learning_rates(self.run, Row('LoRA'))[1]}"

    def lora_then_quantized(self, row: Row) -> nn.Module:
        """LoRA as it was trained in float, merged, then quantised."""
        if learning_rates(self.run, Row("LoRA"))[0] is not None or not self.lora_folder().is_dir():
            self.tune(Row("LoRA"))
        model = PeftModel.from_pretrained(copy.deepcopy(self.float_model), self.lora_folder()).merge_and_unload()
        return baselines.rounded(model, row.config(), self.data.calibration)


def train_norms(model: nn.Module) -> None:
    """Train the weights of all norms as well: input scales of the layers behind them, which fold away."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.requires_grad_(True)


def load_data(run: Run) -> Data:
    """Token blocks of the data folder's splits and of Python's documentation."""
    folder, tokenizer = data_folder(run.data), load_tokenizer(named(run.model))
    paths = {name: find_split(folder, name) for name in SPLITS}

    def blocks(name: str) -> torch.Tensor:
        return token_blocks(tokenizer, [paths[name].read_text(encoding="utf-8")], run.block_size, name=f"{name} split")

    log("Tokenising")
    train_blocks = blocks("train")
    count = max(run.steps, run.search_steps) * run.batch_size
    other = token_blocks(tokenizer, load_text(PYTHON_DOCS).held_out, run.block_size)
    return Data(
        sample_blocks(train_blocks, count, run.seed),
        blocks("validation")[: run.validation_blocks],
        blocks("test")[: run.test_blocks],
        other[: run.other_blocks],
        sample_blocks(train_blocks, run.calibration_blocks, run.seed + 1),
    )


def _byte_data(run: Run) -> Data:
    texts = load_text(PYTHON_DOCS)
    train_blocks, held_out = (byte_blocks(part[:20], run.block_size) for part in texts)
    return Data(
        train_blocks[: run.steps * run.batch_size],
        held_out[: run.validation_blocks],
        held_out[-run.test_blocks :],
        held_out.flip(1)[: run.other_blocks],
        train_blocks[-run.calibration_blocks :],
    )


def find_split(folder: Path, name: str) -> Path:
    """The text file of a split.

    Raises:
        NotHere: Names what is missing.
    """
    for stem in SPLITS[name]:
        if (folder / f"{stem}.txt").is_file():
            return folder / f"{stem}.txt"
    raise NotHere(
        f"{str(folder)!r} has no {' or '.join(f'{stem}.txt' for stem in SPLITS[name])}; this benchmark takes train.txt, "
        "valid.txt and test.txt (of wikitext-2, for the table in peqa.md)."
    )


def tables(run: Run) -> dict[str, str]:
    """What is measured so far."""
    rows = sorted(rows_of(run), key=lambda row: (-row.bits if row.bits else -32, -row.group_size))
    found = [(row, find(run, row)) for row in rows]
    headers = ["Model", "Test perplexity", "Python's documentation", "Trained numbers", "Learning rate"]
    lines = []
    for row, result in found:
        if result is None or "skipped" in result:
            lines.append([row.title, "not measured" if result is None else result["skipped"], *[None] * 3])
            continue
        lines.append(
            [
                f"**{row.title}**" if row in PEQA.values() else row.title,
                perplexity_cell(result["test"]),
                perplexity_cell(result["other"]),
                f"{result['trained']:,}" if row.tuned else "0",
                f"{result['learning_rate']:g}" if row.tuned else None,
            ]
        )
    return {"Perplexity after tuning": markdown_table(headers, lines)}


def test_perplexity(run: Run, row: Row) -> Optional[float]:
    """On the test split; None if it isn't measured."""
    return (find(run, row) or {}).get("test")


def ratio(run: Run, over: Row, under: Row) -> Optional[float]:
    """Of two rows' perplexities on the test split."""
    above, below = test_perplexity(run, over), test_perplexity(run, under)
    return None if above is None or below is None else above / below


def claims(run: Run) -> list[Claim]:
    """What tuned scales are held to."""
    found = [
        Claim("PEQA, 4 bits, group 64, over LoRA float", ratio(run, PEQA[4, 64], LORA), 1.05),
        Claim("PEQA, 3 bits, per channel, over LoRA float", ratio(run, PEQA[3, -1], LORA), 1.25),
        Claim("PEQA, 3 bits, per channel, over the untouched float model", ratio(run, PEQA[3, -1], FLOAT), 1.0),
        Claim("PEQA, 2 bits, group 64, over the untouched float model", ratio(run, PEQA[2, 64], FLOAT), 1.4),
    ]
    if run.model == DEFAULT_MODEL:
        own = Row("PEQA", 4, 32, FILE)
        found.append(Claim("PEQA on the file's own 4 bits over LoRA float", ratio(run, own, LORA), 1.03))
        both = replace(own, trained=ZEROS)
        found.append(Claim("The same, scales and minimums trained, over LoRA float", ratio(run, both, LORA), 1.03))
        untouched = Row("Quantised", 4, 32, FILE, False)
        found.append(Claim("The file's own integers over the untouched model", ratio(run, untouched, FLOAT), 1.0001))
    for row in rows_of(run):
        if row.method == "LoRA, then quantised":
            found.append(Claim(f"PEQA over {row.title}", ratio(run, PEQA[row.bits, row.group_size], row), 1.0))
    return found


def headlines(runs: Runs) -> list[Headline]:
    """Perplexities at 4, 3 and 2 bits."""
    run = run_named(runs, "wikitext2")
    if run is None:
        return []
    area, page = "Tuning packed models", "../benchmarks/peqa.md"

    def shown(row: Row) -> str:
        return f"{test_perplexity(run, row):.2f}"

    four, three, two = claims(run)[0], claims(run)[1], claims(run)[3]
    assert four.value and three.value and two.value
    return [
        Headline(
            area,
            "PEQA, 4 bits in groups of 64: perplexity on wikitext-2",
            f"{shown(PEQA[4, 64])}; LoRA on float32 {shown(LORA)}, QLoRA {shown(Row('QLoRA', 4, 64))}, untouched {shown(FLOAT)}",
            unless(four.met, f"within 5 % of LoRA: {100 * four.value - 100:.2g} %"),
            page,
        ),
        *_of_a_file(run, area, page),
        Headline(
            area,
            "PEQA, 3 bits per channel",
            shown(PEQA[3, -1]),
            unless(three.met, f"within 25 % of LoRA: {100 * three.value - 100:.2g} %"),
            page,
        ),
        Headline(
            area,
            "PEQA, 2 bits in groups of 64",
            shown(PEQA[2, 64]),
            unless(two.met, f"below 1.4 times the untouched float model: {two.value:.2g}"),
            page,
        ),
    ]


def _of_a_file(run: Run, area: str, page: str) -> list[Headline]:
    """What scales and minimums of integers that lose nothing reach."""
    row = Row("PEQA", 4, 32, FILE, trained=ZEROS)
    value, alone = ratio(run, row, LORA), test_perplexity(run, replace(row, trained=SCALES))
    if value is None or alone is None:
        return []
    return [
        Headline(
            area,
            "PEQA on the GGUF's own 4 bits, scales and minimums trained: perplexity on wikitext-2",
            f"{test_perplexity(run, row):.2f}; scales alone {alone:.2f}, LoRA on float32 {test_perplexity(run, LORA):.2f}",
            unless(value <= 1.03, f"within 3 % of LoRA: {100 * value - 100:.2g} %"),
            page,
        )
    ]


def measure(run: Run) -> None:
    """Measure every row that isn't stored yet."""
    rows = [row for row in rows_of(run) if find(run, row) is None]
    if not rows:
        return
    bench = Bench(run)
    with fast_linear():
        for index, row in enumerate(rows, start=1):
            log(f"Row {index} of {len(rows)}: {row.title}")
            try:
                result = bench.measure(row)
            except (ImportError, TypeError) as error:
                if row.method not in ("QLoRA", "QAT"):
                    raise
                result = {"skipped": f"not possible here: {error}"}
            run.add(key_of(run, row), result)
            if "test" in result:
                log(f"{row.title}: test {result['test']:.2f}, other {result['other']:.2f}, {result['seconds']:.0f} s")


FLOAT, LORA = all_rows()[:2]
PEQA = {(row.bits, row.group_size): row for row in all_rows() if (row.method, row.init_method) == ("PEQA", GPTQ)}
TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
