# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Paraphrases by C-DNPG and by a plain Transformer of the same size: Quora and Twitter URL, the same steps, data and
learning rate for all.

Validation pairs (and, for Twitter, test pairs) are carved off the training file by `--seed`. The paper trains 100,000
steps of 32 pairs at hidden size 450; what is done here stands under the tables. Nothing is chosen on test pairs: the
checkpoint is the last one, and the learning rate is the same for all.

    python -m benchmarks.paraphrase --data-dir shared/data

Rows are stored as they finish and not measured again; trained models are kept in `--work_dir`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainingArguments, set_seed

from benchmarks.common import RESULTS, ROOT, Results, describe, log, markdown_table, verdict
from benchmarks.in_context import default_data_dir
from generation_ext.granularity import CDNPGConfig, CDNPGForConditionalGeneration
from generation_ext.granularity.masks import MODES
from generation_ext.granularity.metrics import METEOR_NOTE, paraphrase_metrics
from generation_ext.granularity.tokenizer import train_tokenizer
from generation_ext.granularity.training import paraphrase, paraphrase_trainer


SETS = {"quora": "quora_paraphrase/train.jsonl", "twitter": "twitter_url/train_paraphrases.jsonl"}
TEST = {"quora": "quora_paraphrase/test.jsonl"}
TRANSFORMER = "Transformer"
GAIN, TIME = 2.0, 1.3


class Budget(NamedTuple):
    """How much is trained and tested."""

    hidden: int = 144
    ffn: int = 384
    vocab: int = 6000
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 1e-3
    validation: int = 500
    test: int = 500
    num_beams: int = 4
    max_length: int = 20


SMOKE = Budget(36, 40, 120, 3, 4, 1e-3, 4, 4, 2)


class Row(NamedTuple):
    """A model on a set."""

    data: str
    mode: str
    seed: int


def rows_of(sets: Sequence[str], modes: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """The Transformer and every mode, seed by seed."""
    return [Row(data, mode, seed) for data in sets for seed in seeds for mode in modes]


class Study:
    """Data and stored results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.budget = args, SMOKE if args.smoke else Budget(*(getattr(args, n) for n in Budget._fields))
        self.results = Results(args.output, args.seed)

    def settings(self, row: Row) -> dict[str, Any]:
        """What identifies a row."""
        return {**row._asdict(), **self.budget._asdict(), "split": self.args.seed}

    def pairs(self, data: str) -> dict[str, list[dict[str, str]]]:
        """`train`, `validation` and `test`; no pair is in two of them."""
        rows = _read(self.args.data_dir / SETS[data])
        random.Random(self.args.seed).shuffle(rows)
        held = self.budget.validation
        found = {"validation": rows[:held], "train": rows[held:]}
        if data in TEST:
            found["test"] = _read(self.args.data_dir / TEST[data])[: self.budget.test]
        else:
            found["test"], found["train"] = rows[held : held + self.budget.test], rows[held + self.budget.test :]
        return found

    def fill(self, row: Row) -> None:
        """Train and measure, if the row isn't stored."""
        key = self.settings(row)
        if self.results.find(key) is None:
            result = self.measure(row)
            self.results.add(key, result)
            log(f"{row}: iBLEU {result['metrics']['iBLEU']:.2f}, loss {result['loss']:.3f}, {result['seconds']:.0f} s")

    def measure(self, row: Row) -> dict[str, Any]:
        """Metrics on the test pairs, validation loss, CPU seconds of training, z by layer, examples."""
        pairs = self.pairs(row.data)
        folder = self._folder(row)
        tokenizer = self._tokenizer(row.data, pairs["train"])
        if not (folder / "training.json").is_file():
            self._train(row, folder, tokenizer, pairs)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        sources, targets = ([pair[name] for pair in pairs["test"]] for name in ("source", "target"))
        found = paraphrase(model, tokenizer, sources, batch_size=64, num_beams=self.budget.num_beams)
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        return {
            **training,
            "metrics": paraphrase_metrics(found, targets, sources),
            "granularities": _granularities(model, tokenizer, sources[:64]),
            "examples": [list(each) for each in zip(sources[:5], found[:5], targets[:5])],
        }

    def _train(self, row: Row, folder: Path, tokenizer: Any, pairs: dict[str, list[dict[str, str]]]) -> None:
        budget = self.budget
        set_seed(row.seed)
        model = CDNPGForConditionalGeneration(
            CDNPGConfig(
                vocab_size=len(tokenizer),
                d_model=budget.hidden,
                encoder_ffn_dim=budget.ffn,
                decoder_ffn_dim=budget.ffn,
                max_position_embeddings=budget.max_length,
                granularity_mode=None if row.mode == TRANSFORMER else row.mode,
            )
        )
        args = Seq2SeqTrainingArguments(
            str(folder) + "-training",
            max_steps=budget.steps,
            per_device_train_batch_size=budget.batch,
            per_device_eval_batch_size=128,
            learning_rate=budget.learning_rate,
            warmup_steps=budget.steps // 10,
            weight_decay=0.01,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=row.seed,
        )
        trainer = paraphrase_trainer(model, tokenizer, args, pairs["train"], pairs["validation"])
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        model.save_pretrained(folder)
        training = {"seconds": seconds, "loss": trainer.evaluate()["eval_loss"], "parameters": model.num_parameters()}
        (folder / "training.json").write_text(json.dumps(training), encoding="utf-8")

    def _folder(self, row: Row) -> Path:
        mode = row.mode.replace("*", "x")
        return Path(self.args.work_dir) / f"{row.data}-{mode}-{row.seed}-{self.budget.hidden}-{self.budget.steps}"

    def _tokenizer(self, data: str, pairs: list[dict[str, str]]) -> Any:
        folder = Path(self.args.work_dir) / f"{data}-tokenizer-{self.budget.vocab}"
        if not (folder / "tokenizer.json").is_file():
            texts = (pair[name] for pair in pairs for name in ("source", "target"))
            train_tokenizer(texts, self.budget.vocab, max_length=self.budget.max_length).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def _granularities(model: Any, tokenizer: Any, texts: list[str]) -> Optional[list[list[float]]]:
    """z of the real tokens in each layer of the encoder, sorted; None for the Transformer."""
    if model.config.granularity_mode is None:
        return None
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model(**inputs, decoder_input_ids=inputs["input_ids"][:, :1], output_granularities=True)
    real = inputs["attention_mask"].bool()
    return [[round(value, 4) for value in sorted(z[real].tolist())] for z in output.encoder_granularities]


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: pass --data-dir FOLDER, which holds it.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def table(study: Study, data: str) -> str:
    """Mean and deviation over seeds."""
    lines = []
    for mode in study.args.modes:
        found = [study.results.find(study.settings(Row(data, mode, seed))) for seed in study.args.seeds]
        known = [each for each in found if each is not None]
        if not known:
            continue
        cells = [_spread([each["metrics"][name] for each in known]) for name in known[0]["metrics"]]
        lines.append([_title(mode), *cells, _spread([each["loss"] for each in known]), str(len(known))])
    names = ["iBLEU first: " + data] if not lines else [data]
    measures = ["BLEU-2", "BLEU-4", "iBLEU", "ROUGE-L", "METEOR", "corpus BLEU", "validation loss", "seeds"]
    return markdown_table([*names, *measures], lines)


def verdicts(study: Study, data: str) -> list[str]:
    """The best mode against the Transformer."""
    means, seconds = {}, {}
    for mode in study.args.modes:
        found = [study.results.find(study.settings(Row(data, mode, seed))) for seed in study.args.seeds]
        known = [each for each in found if each is not None]
        if known:
            means[mode] = statistics.mean(each["metrics"]["iBLEU"] for each in known)
            seconds[mode] = statistics.mean(each["seconds"] for each in known)
    if TRANSFORMER not in means or len(means) < 2:
        return [f"- {data}: not measured"]
    best = max((mode for mode in means if mode != TRANSFORMER), key=means.__getitem__)
    gain = means[best] - means[TRANSFORMER]
    slowest = max(seconds[mode] / seconds[TRANSFORMER] for mode in means)
    return [
        verdict(f"{data}: iBLEU of {_title(best)} above the Transformer", gain, GAIN, " points", at_least=True),
        verdict(f"{data}: CPU time of training over the Transformer's, worst mode", slowest, TIME, "x"),
    ]


def plot(study: Study, path: Path) -> None:
    """iBLEU as bars, and the distribution of z by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6))
    bars, spread = figure.subplots(1, 2)
    width = 0.8 / max(1, len(study.args.sets))
    for number, data in enumerate(study.args.sets):
        for place, mode in enumerate(study.args.modes):
            found = [study.results.find(study.settings(Row(data, mode, seed))) for seed in study.args.seeds]
            values = [each["metrics"]["iBLEU"] for each in found if each is not None]
            if values:
                bars.bar(
                    place + number * width,
                    statistics.mean(values),
                    width,
                    yerr=statistics.pstdev(values),
                    color=f"C{number}",
                    label=data if not place else None,
                )
    bars.set_xticks(range(len(study.args.modes)), [_title(mode) for mode in study.args.modes], rotation=20)
    bars.set_ylabel("iBLEU")
    bars.legend()
    for place, mode in enumerate(mode for mode in study.args.modes if mode != TRANSFORMER):
        result = study.results.find(study.settings(Row(study.args.sets[0], mode, study.args.seeds[0])))
        for layer, values in enumerate((result or {}).get("granularities") or []):
            spread.violinplot(values, [place + 0.25 * (layer - 1)], widths=0.22, showextrema=False)
    spread.set_xticks(range(len(study.args.modes) - 1), [m for m in study.args.modes if m != TRANSFORMER])
    spread.set(ylabel="z, encoder layers 1, 2, 3", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _title(mode: str) -> str:
    return mode if mode == TRANSFORMER else f"C-DNPG ({mode})"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.pstdev(values):.2f}"


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure what isn't stored yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=default_data_dir(), help="holds the sets' folders")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--modes", nargs="+", choices=(TRANSFORMER, *MODES), default=[TRANSFORMER, *MODES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    for name, value in Budget()._asdict().items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "paraphrase")
    parser.add_argument("--output", type=Path, default=RESULTS / "paraphrase.json")
    parser.add_argument("--seed", type=int, default=0, help="of the splits")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    parser.add_argument("--smoke", action="store_true", help="next to nothing: checks that the script runs")
    args = parser.parse_args(argv)
    if args.data_dir is None:
        parser.error("no data: pass --data-dir, a folder with quora_paraphrase and twitter_url")
    study = Study(args)
    for row in () if args.table else rows_of(args.sets, args.modes, args.seeds):
        study.fill(row)
    if not args.table:
        plot(study, args.output.with_suffix(".png"))
    for data in args.sets:
        print("\n" + table(study, data) + "\n")
        print("\n".join(verdicts(study, data)))
    print(
        f"\n{METEOR_NOTE}\n{study.budget}: {study.budget.steps * study.budget.batch:,} pairs seen; the paper's are 3,200,000"
    )
    if study.results.rows:
        print(describe(study.results.rows[-1]["environment"]))


if __name__ == "__main__":
    main()
