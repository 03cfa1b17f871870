# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Paraphrases by C-DNPG and by a plain Transformer of the same size, and by SmolLM2 under LoRA with and without
GA-Attention: Quora and Twitter URL, the same pairs, steps and learning rate for all.

The order is that of worth: all variants on the first set with two seeds; then the Transformer and the variant that is best
on its *validation* pairs, on all sets with all seeds; then SmolLM2. Nothing is chosen on test pairs: the checkpoint is the
last one, and the learning rate is one for all. The paper trains 100,000 steps of 32 pairs at hidden size 450; what is done
here stands under the tables, and flags go up to the paper's. Predictions, references and sources are measured as the
set's tokenizer decodes them (lower case, cut to 20 tokens), as in the paper's code. Seconds are of the CPU.

    python -m benchmarks.paraphrase --data-dir shared/data

Rows are stored as they finish and not measured again; trained models are kept in `--work_dir`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainingArguments, set_seed

from benchmarks.common import ROOT, Results, argument_parser, data_folder, describe, log, markdown_table, verdict
from benchmarks.paraphrase_data import SETS, as_decoded, split_pairs
from benchmarks.paraphrase_lora import LORAS, LoraBudget, lora_paraphrases
from benchmarks.paraphrase_pictures import bars_and_granularities, sentence_picture
from generation_ext.granularity import CDNPGConfig, CDNPGForConditionalGeneration
from generation_ext.granularity.masks import MODES
from generation_ext.granularity.metrics import METEOR_NOTE, paraphrase_metrics
from generation_ext.granularity.pictures import sentence_granularities
from generation_ext.granularity.tokenizer import train_tokenizer
from generation_ext.granularity.training import paraphrase, paraphrase_trainer
from peft_ext.files import written_whole


TRANSFORMER = "Transformer"
GAIN, TIME = 2.0, 1.3
# Whose granularities are drawn.
SENTENCE = "what is the best way to learn a language in a short time?"
MEASURES = ("BLEU-2", "BLEU-4", "iBLEU", "ROUGE-L", "METEOR", "corpus BLEU")


class Budget(NamedTuple):
    """How much is trained and tested."""

    hidden: int = 144
    ffn: int = 384
    vocab: int = 6000
    steps: int = 2000
    epochs: int = 8  # at most; Twitter is small
    batch: int = 64
    learning_rate: float = 1e-3
    dropout: float = 0.1  # of hidden states; attention weights are not dropped
    validation: int = 500
    test: int = 1000
    num_beams: int = 4
    max_length: int = 20


SMOKE = Budget(36, 40, 120, 3, 8, 4, 1e-3, 0.0, 4, 4, 2)


class Row(NamedTuple):
    """A model on a set."""

    data: str
    mode: str
    seed: int


class Study:
    """Data and stored results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.budget = SMOKE if args.smoke else Budget(*(getattr(args, name) for name in Budget._fields))
        names = (f"lora_{name}" for name in LoraBudget._fields)
        self.lora = LoraBudget(*(getattr(args, name) for name in names))
        if args.smoke:
            self.lora = self.lora._replace(steps=1, batch=2, test=2)
        self.results = Results(args.output, args.seed)

    def plan(self) -> Iterator[Row]:
        """All rows, those of most worth first; some come twice, and the second time they are there."""
        args, first = self.args, self.args.sets[0]
        yield from (Row(first, mode, seed) for seed in args.seeds[:2] for mode in args.modes)
        best = self.best(first)
        pair = [mode for mode in args.modes if mode in (TRANSFORMER, best)]
        yield from (Row(data, mode, seed) for seed in args.seeds for data in args.sets for mode in pair)
        if args.lora:
            yield from (Row(first, mode, args.seeds[0]) for mode in LORAS)

    def best(self, data: str) -> Optional[str]:
        """The variant of most iBLEU on validation pairs, over the seeds that all variants have."""
        found = {}
        for mode in self.args.modes:
            rows = [self.find(Row(data, mode, seed)) for seed in self.args.seeds[:2]]
            values = [row["validation iBLEU"] for row in rows if row is not None]
            if values and mode != TRANSFORMER:
                found[mode] = statistics.mean(values)
        return max(found, key=found.__getitem__) if found else None

    def find(self, row: Row) -> Optional[dict[str, Any]]:
        """A row's stored result."""
        return self.results.find(self.settings(row))

    def settings(self, row: Row) -> dict[str, Any]:
        """What identifies a row."""
        budget: Any = self.lora if row.mode in LORAS else self.budget
        own = {"held out": [self.budget.validation, self.budget.test], "vocab": self.budget.vocab}
        return {**row._asdict(), **own, **budget._asdict(), "split": self.args.seed}

    def pairs(self, data: str) -> dict[str, list[dict[str, str]]]:
        """`train`, `validation` and `test`."""
        return split_pairs(self.args.data_dir, data, self.budget.validation, self.budget.test, self.args.seed)

    def fill(self, row: Row) -> None:
        """Train and measure, if the row isn't stored."""
        if self.find(row) is None:
            result = self.measure_lora(row) if row.mode in LORAS else self.measure(row)
            self.results.add(self.settings(row), result)
            log(f"{row}: iBLEU {result['metrics']['iBLEU']:.2f}, {result['seconds']:.0f} s")

    def measure(self, row: Row) -> dict[str, Any]:
        """Metrics on test and validation pairs, loss, CPU seconds of training, z by layer."""
        pairs = self.pairs(row.data)
        folder, tokenizer = self._folder(row), self.tokenizer(row.data, pairs["train"])
        if not folder.is_dir():
            self._train(row, folder, tokenizer, pairs)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        validation, _ = self._metrics(model, tokenizer, pairs["validation"])
        metrics, found = self._metrics(model, tokenizer, pairs["test"])
        sources, targets = _columns(tokenizer, pairs["test"])
        result = {**training, "metrics": metrics, "validation iBLEU": validation["iBLEU"]}
        if row.mode != TRANSFORMER:
            result["granularities"] = _granularities(model, tokenizer, sources[:64])
            tokens, z = sentence_granularities(model, tokenizer, SENTENCE)
            result["sentence"] = {"tokens": tokens, "granularities": z.tolist()}
        self._keep_examples(row, sources, found, targets)
        return result

    def measure_lora(self, row: Row) -> dict[str, Any]:
        """The same for SmolLM2."""
        pairs = self.pairs(row.data)
        tokenizer = self.tokenizer(row.data, pairs["train"])
        test = pairs["test"][: self.lora.test]
        raw, training = lora_paraphrases(row.mode, pairs["train"], test, self.lora, row.seed)
        found = as_decoded(tokenizer, raw)
        sources, targets = _columns(tokenizer, test)
        self._keep_examples(row, sources, found, targets)
        return {**training, "metrics": paraphrase_metrics(found, targets, sources)}

    def _keep_examples(self, row: Row, *columns: list[str]) -> None:
        """In the work folder, since the sets' texts are not ours to pass on."""
        path = self._folder(row).with_suffix(".examples.json")
        path.write_text(json.dumps(list(zip(*(column[:20] for column in columns))), indent=1), encoding="utf-8")

    def tokenizer(self, data: str, pairs: list[dict[str, str]]) -> Any:
        """A set's tokenizer, trained on its training pairs."""
        budget = self.budget
        held = (data, budget.vocab, budget.max_length, budget.validation, budget.test, self.args.seed)
        folder = self._place(f"{data}-tokenizer", held)
        if not folder.is_dir():
            texts = (pair[name] for pair in pairs for name in ("source", "target"))
            with written_whole(folder) as partial:
                train_tokenizer(texts, budget.vocab, max_length=budget.max_length).save_pretrained(partial)
        return AutoTokenizer.from_pretrained(folder)

    def _metrics(self, model: Any, tokenizer: Any, pairs: list[dict[str, str]]) -> tuple[dict[str, float], list[str]]:
        sources, targets = _columns(tokenizer, pairs)
        found = paraphrase(model, tokenizer, sources, batch_size=64, num_beams=self.budget.num_beams)
        return paraphrase_metrics(found, targets, sources), found

    def _train(self, row: Row, folder: Path, tokenizer: Any, pairs: dict[str, list[dict[str, str]]]) -> None:
        budget = self.budget
        steps = max(1, min(budget.steps, budget.epochs * len(pairs["train"]) // budget.batch))
        set_seed(row.seed)
        model = CDNPGForConditionalGeneration(
            CDNPGConfig(
                vocab_size=len(tokenizer),
                d_model=budget.hidden,
                encoder_ffn_dim=budget.ffn,
                decoder_ffn_dim=budget.ffn,
                max_position_embeddings=budget.max_length,
                dropout=budget.dropout,
                attention_dropout=0.0,
                granularity_mode=None if row.mode == TRANSFORMER else row.mode,
            )
        )
        args = Seq2SeqTrainingArguments(
            str(folder) + "-training",
            max_steps=steps,
            per_device_train_batch_size=budget.batch,
            per_device_eval_batch_size=128,
            train_sampling_strategy="group_by_length",
            learning_rate=budget.learning_rate,
            warmup_steps=steps // 10,
            weight_decay=0.01,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=True,  # the weights stay in float32
            seed=row.seed,
        )
        trainer = paraphrase_trainer(model, tokenizer, args, pairs["train"], pairs["validation"])
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        training = {"seconds": seconds, "loss": trainer.evaluate()["eval_loss"], "parameters": model.num_parameters()}
        with written_whole(folder) as partial:
            model.save_pretrained(partial)
            (partial / "training.json").write_text(json.dumps(training), encoding="utf-8")

    def _folder(self, row: Row) -> Path:
        settings = {**self.settings(row), "num_beams": None}
        return self._place(f"{row.data}-{row.mode.replace('*', 'x')}-{row.seed}", settings)

    def _place(self, name: str, settings: Any) -> Path:
        """A folder whose name tells all settings apart."""
        self.args.work_dir.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        return self.args.work_dir / f"{name}-{digest}"


def _columns(tokenizer: Any, pairs: list[dict[str, str]]) -> list[list[str]]:
    return [as_decoded(tokenizer, [pair[name] for pair in pairs]) for name in ("source", "target")]


@torch.inference_mode()
def _granularities(model: Any, tokenizer: Any, texts: list[str]) -> list[list[float]]:
    """z of the real tokens in each layer of the encoder, sorted."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model(**inputs, decoder_input_ids=inputs["input_ids"][:, :1], output_granularities=True)
    real = inputs["attention_mask"].bool()
    return [[round(value, 4) for value in sorted(z[real].tolist())] for z in output.encoder_granularities]


def stored(study: Study, data: str) -> dict[str, list[dict[str, Any]]]:
    """Results by variant, seed by seed; only variants that have any."""
    found = {}
    for mode in (*study.args.modes, *LORAS):
        rows = [study.find(Row(data, mode, seed)) for seed in study.args.seeds]
        found[mode] = [row for row in rows if row is not None]
    return {mode: rows for mode, rows in found.items() if rows}


def table(study: Study, data: str) -> str:
    """Mean and deviation over seeds."""
    lines = []
    for mode, rows in stored(study, data).items():
        cells = [_spread([row["metrics"][name] for row in rows]) for name in MEASURES]
        seconds = statistics.mean(row["seconds"] for row in rows)
        loss = _spread([row["loss"] for row in rows])
        lines.append([title(mode), *cells, loss, f"{seconds / 60:.1f}", str(len(rows))])
    return markdown_table([data, *MEASURES, "validation loss", "CPU minutes", "seeds"], lines)


def verdicts(study: Study, data: str) -> list[str]:
    """The variant that was best on the first set's validation pairs against the Transformer, and what GA adds to LoRA."""
    found, best = stored(study, data), study.best(study.args.sets[0])
    if best not in found or TRANSFORMER not in found:
        return [f"- {data}: not measured"]
    ours, plain = ([row["metrics"]["iBLEU"] for row in found[mode]] for mode in (best, TRANSFORMER))
    seconds = {
        mode: statistics.mean(row["seconds"] for row in found[mode]) for mode in study.args.modes if mode in found
    }
    slowest = max(seconds.values()) / seconds[TRANSFORMER]
    gain = statistics.mean(ours) - statistics.mean(plain)
    name = title(best)
    lines = [
        verdict(f"{data}: mean iBLEU of {name} above the Transformer's", gain, GAIN, " points", at_least=True),
        verdict(
            f"{data}: its worst seed above the Transformer's best", min(ours) - max(plain), 0, " points", at_least=True
        ),
        verdict(f"{data}: CPU time of training over the Transformer's, slowest variant", slowest, TIME, "x"),
    ]
    if all(mode in found for mode in LORAS):
        plain_lora, ga_lora = (statistics.mean(row["metrics"]["iBLEU"] for row in found[mode]) for mode in LORAS)
        lines.append(f"- {data}: GA-Attention changes SmolLM2 + LoRA's iBLEU by {ga_lora - plain_lora:+.2f} points")
    return lines


def title(mode: str) -> str:
    """A variant's name in tables."""
    return mode if mode == TRANSFORMER or mode in LORAS else f"C-DNPG ({mode})"


def draw(study: Study) -> None:
    """iBLEU and z by layer beside the JSON, and z of one sentence in a picture of its own."""
    path = study.args.output
    found = {data: {title(mode): rows for mode, rows in stored(study, data).items()} for data in study.args.sets}
    bars_and_granularities(found, path.with_suffix(".png"))
    best = study.best(study.args.sets[0])
    row = study.find(Row(study.args.sets[0], best, study.args.seeds[0])) if best else None
    if row is not None:
        sentence_picture(row["sentence"], path.with_name(f"{path.stem}-sentence.png"))


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure what isn't stored yet, and print the tables."""
    args = _arguments(argv)
    study = Study(args)
    if not args.table:
        for row in study.plan():
            study.fill(row)
    if study.results.rows:
        draw(study)
    for data in args.sets:
        print("\n" + table(study, data) + "\n")
        print("\n".join(verdicts(study, data)))
    seen = study.budget.steps * study.budget.batch
    print(
        f"\n{METEOR_NOTE}\n{study.budget}: at most {seen:,} pairs seen, {seen / 3.2e6:.1%} of the paper's 100,000 x 32"
    )
    print(f"{study.lora} for SmolLM2")
    if study.results.rows:
        print(describe(study.results.rows[-1]["environment"]))


def _arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argument_parser(__doc__, "paraphrase.json")
    parser.add_argument("--data-dir", type=Path, default=data_folder(), help="holds the sets' folders")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--modes", nargs="+", choices=(TRANSFORMER, *MODES), default=[TRANSFORMER, *MODES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--no-lora", dest="lora", action="store_false", help="leave the language model out")
    for name, value in Budget()._asdict().items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    for name, value in LoraBudget()._asdict().items():
        parser.add_argument(f"--lora_{name}", type=type(value), default=value, help="of the language model")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "paraphrase")
    args = parser.parse_args(argv)
    if args.data_dir is None:
        parser.error("no data: pass --data-dir, a folder with quora_paraphrase and twitter_url")
    return args


if __name__ == "__main__":
    main()
