# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Paraphrases by C-DNPG and by a plain Transformer of the same size, and by SmolLM2 under LoRA with and without
GA-Attention: Quora and Twitter URL, the same pairs, steps and learning rate for all.

The order is that of worth: all variants on the first set with two seeds; then the Transformer and the variant that is best
on its *validation* pairs, on all sets with all seeds; then SmolLM2. Nothing is chosen on test pairs: the checkpoint is the
last one, and the learning rate is one for all. The paper trains 100,000 steps of 32 pairs at hidden size 450; what is done
here stands on the page, and settings go up to the paper's. Predictions, references and sources are measured as the
set's tokenizer decodes them (lower case, cut to 20 tokens), as in the paper's code. Seconds are of the CPU. Trained models
are kept in the run's work folder.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainingArguments, set_seed

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.experiments import QUICK
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, run_named
from benchmarks.paraphrase_data import as_decoded, split_pairs
from benchmarks.paraphrase_lora import LORAS, lora_paraphrases
from benchmarks.paraphrase_pictures import bars_and_granularities, sentence_picture
from generation_ext.granularity import CDNPGConfig, CDNPGForConditionalGeneration
from generation_ext.granularity.metrics import PAPERS_IBLEU, paraphrase_metrics
from generation_ext.granularity.pictures import sentence_granularities
from generation_ext.granularity.tokenizer import train_tokenizer
from generation_ext.granularity.training import paraphrase, paraphrase_trainer
from peft_ext.files import written_whole


TRANSFORMER = "Transformer"
# Points over the Transformer that are wanted, by the paper's measure and by iBLEU as defined.
GAINS = {PAPERS_IBLEU: 2.0, "iBLEU": 1.0}
TIME = 1.3
SCRATCH, TUNED = "from_scratch", "smollm2_lora"  # experiments
# Whose granularities are drawn.
SENTENCE = "what is the best way to learn a language in a short time?"
TITLES = {"quora": "Quora", "twitter": "Twitter URL"}
MEASURES = ("BLEU-2", "BLEU-4", PAPERS_IBLEU, "iBLEU", "copies", "ROUGE-L", "METEOR", "corpus BLEU")


class Row(NamedTuple):
    """A model on a set."""

    data: str
    mode: str
    seed: int


def plan(run: Run) -> Iterator[Row]:
    """All rows, those of most worth first; some come twice, and the second time they are there."""
    first = run.sets[0]
    yield from (Row(first, mode, seed) for seed in run.seeds[:2] for mode in run.modes)
    pair = [mode for mode in run.modes if mode in (TRANSFORMER, best(run))]
    yield from (Row(data, mode, seed) for seed in run.seeds for data in run.sets for mode in pair)


def best(run: Run) -> Optional[str]:
    """The variant of most iBLEU on the first set's validation pairs, over the seeds that all variants have."""
    found = {}
    for mode in run.modes:
        rows = [run.find(Row(run.sets[0], mode, seed)._asdict()) for seed in run.seeds[:2]]
        values = [row["validation iBLEU"] for row in rows if row is not None and "validation iBLEU" in row]
        if values and mode != TRANSFORMER:
            found[mode] = statistics.mean(values)
    return max(found, key=found.__getitem__) if found else None


def measure(run: Run) -> None:
    """Train and measure what isn't stored."""
    paraphrasing = Paraphrasing(run)
    for row in plan(run):
        if run.find(row._asdict()) is None:
            result = paraphrasing.measure_lora(row) if row.mode in LORAS else paraphrasing.measure(row)
            run.add(row._asdict(), result)
            log(f"{row}: iBLEU {result['metrics']['iBLEU']:.2f}, {result['seconds']:.0f} s")


class Paraphrasing:
    """Pairs, tokenizers and trained models."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def pairs(self, data: str) -> dict[str, list[dict[str, str]]]:
        """`train`, `validation` and `test`."""
        return split_pairs(data, self.run.validation, self.run.test, self.run.seed)

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
        test = pairs["test"][: self.run.tested]
        raw, training = lora_paraphrases(row.mode, pairs["train"], test, self.run, row.seed)
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
        folder = self.run.work / f"{data}-tokenizer"
        if not folder.is_dir():
            texts = (pair[name] for pair in pairs for name in ("source", "target"))
            with written_whole(folder) as partial:
                train_tokenizer(texts, self.run.vocab, max_length=self.run.max_length).save_pretrained(partial)
        return AutoTokenizer.from_pretrained(folder)

    def _metrics(self, model: Any, tokenizer: Any, pairs: list[dict[str, str]]) -> tuple[dict[str, float], list[str]]:
        sources, targets = _columns(tokenizer, pairs)
        found = paraphrase(model, tokenizer, sources, batch_size=64, num_beams=self.run.num_beams)
        return paraphrase_metrics(found, targets, sources), found

    def _train(self, row: Row, folder: Path, tokenizer: Any, pairs: dict[str, list[dict[str, str]]]) -> None:
        run = self.run
        steps = max(1, min(run.steps, run.epochs * len(pairs["train"]) // run.batch))
        set_seed(row.seed)
        model = CDNPGForConditionalGeneration(
            CDNPGConfig(
                vocab_size=len(tokenizer),
                d_model=run.hidden,
                encoder_ffn_dim=run.ffn,
                decoder_ffn_dim=run.ffn,
                max_position_embeddings=run.max_length,
                dropout=run.dropout,
                attention_dropout=0.0,
                granularity_mode=None if row.mode == TRANSFORMER else row.mode,
            )
        )
        args = Seq2SeqTrainingArguments(
            str(folder) + "-training",
            max_steps=steps,
            per_device_train_batch_size=run.batch,
            per_device_eval_batch_size=128,
            train_sampling_strategy="group_by_length",
            learning_rate=run.learning_rate,
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
        return self.run.work / f"{row.data}-{row.mode.replace('*', 'x').replace(' ', '')}-{row.seed}"


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


def stored(runs: Runs, data: str) -> dict[str, list[dict[str, Any]]]:
    """Results by variant, seed by seed; only variants that have any."""
    found = {}
    for run in runs:
        for mode in run.modes if data in run.sets else ():
            rows = [run.find(Row(data, mode, seed)._asdict()) for seed in run.seeds]
            found[mode] = [row for row in rows if row is not None]
    return {mode: rows for mode, rows in found.items() if rows}


def sets_of(runs: Runs) -> list[str]:
    """All sets."""
    return list(dict.fromkeys(data for run in runs for data in run.sets))


def tables(runs: Runs) -> dict[str, str]:
    """Mean and deviation over seeds, a table for each set."""
    shown = {}
    for data in sets_of(runs):
        lines = []
        for mode, rows in stored(runs, data).items():
            # texts of earlier rows weren't kept, so what they lack can't be told
            found = {name: [row["metrics"][name] for row in rows if name in row["metrics"]] for name in MEASURES}
            cells = [_spread(values) if len(values) == len(rows) else "" for values in found.values()]
            seconds = statistics.mean(row["seconds"] for row in rows)
            loss = "" if mode in LORAS else f"{statistics.mean(row['loss'] for row in rows):.2f}"
            lines.append([title(mode), *cells, loss, f"{seconds / 60:.1f}", len(rows)])
        shown[data] = markdown_table([TITLES[data], *MEASURES, "validation loss", "CPU minutes", "seeds"], lines)
    return shown


def claims(runs: Runs) -> list[Claim]:
    """The variant that was best on the first set's validation pairs against the Transformer."""
    run, lines = run_named(runs, SCRATCH), []
    for data in ("quora", "twitter"):
        found = {} if run is None else stored([run], data)
        ours, plain = (found.get(mode, []) for mode in (run and best(run), TRANSFORMER))
        known = bool(ours and plain)
        told = known and run.size != QUICK  # so few steps say nothing about what is learnt
        for measure_, gain in GAINS.items():
            means, worst = _above(ours, plain, measure_) if told else (None, None)
            lines += [
                Claim(f"{data}: mean {measure_} above the Transformer's", means, gain, " points", at_least=True),
                Claim(f"{data}: {measure_}, worst seed above its best", worst, 0, " points", at_least=True),
            ]
        lines += [
            Claim(
                f"{data}: share of copies above the Transformer's",
                _above(ours, plain, "copies")[0] if told else None,
                0,
                " points",
            ),
            Claim(
                f"{data}: CPU time of training over the Transformer's, slowest variant",
                max(_seconds(rows) for rows in found.values()) / _seconds(found[TRANSFORMER]) if known else None,
                TIME,
                "x",
            ),
        ]
    return lines


def _above(
    ours: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]], name: str
) -> tuple[Optional[float], Optional[float]]:
    """By how much the mean, and the worst seed over the best, are above the Transformer's; None where a row lacks it."""
    if not all(name in row["metrics"] for row in (*ours, *plain)):
        return None, None
    one, other = ([row["metrics"][name] for row in rows] for rows in (ours, plain))
    return statistics.mean(one) - statistics.mean(other), min(one) - max(other)


def _seconds(rows: Sequence[dict[str, Any]]) -> float:
    return statistics.mean(row["seconds"] for row in rows)


def title(mode: str) -> str:
    """A variant's name in tables."""
    return mode if mode == TRANSFORMER or mode in LORAS else f"C-DNPG ({mode})"


def draw(runs: Runs, folder: Path) -> None:
    """iBLEU and z by layer, and z of one sentence in a picture of its own."""
    found = {data: {title(mode): rows for mode, rows in stored(runs, data).items()} for data in sets_of(runs)}
    bars_and_granularities(found, folder / "granularities.png")
    run = run_named(runs, SCRATCH)
    chosen = run and best(run)
    row = run.find(Row(run.sets[0], chosen, run.seeds[0])._asdict()) if run and chosen else None
    if row is not None:
        sentence_picture(row["sentence"], folder / "sentence.png")


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def headlines(runs: Runs) -> list[Headline]:
    """Gains on both sets, by each measure."""
    shown, all_claims = [], claims(runs)
    for name, wanted in GAINS.items():
        values = [claim.value for claim in all_claims if f"mean {name} above" in claim.name]
        gains = [value for value in values if value is not None]
        if len(gains) == 2:
            what, page = f"C-DNPG against a Transformer of its size, {name}", "../benchmarks/granularity.md"
            figures = f"{gains[0]:+.1f} on Quora, {gains[1]:+.1f} on Twitter"
            shown.append(Headline("Writing", what, figures, unless(min(gains) >= wanted, f"+{wanted:g}"), page))
    return shown


TASK = Task(measure, tables, claims, headlines, draw)
