# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Paraphrases by C-DNPG and by a plain Transformer of the same size, and by SmolLM2 under LoRA with and without
GA-Attention: Quora and Twitter URL, the same pairs, steps and learning rate for all.

`from_scratch` is short: all variants on the first set with two seeds; then the Transformer and the variant that is best on its
*validation* pairs, on all sets with all seeds. The `long_*` are one experiment, a file for each variant, so that two processes
can share it: trained until the Transformer's validation loss is flat, weights of the lowest validation loss, Twitter URL from the
weights of Quora; a run that is killed goes on. Nothing is chosen on test pairs. The paper trains 100,000 steps of 32 pairs at
hidden size 450; what is done here stands on the page, and settings go up to the paper's. Predictions, references and sources are
measured as the set's tokenizer decodes them (lower case, cut to 20 tokens), as in the paper's code. Seconds are of the CPU.
Trained models are kept in the run's work folder.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.experiments import QUICK
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, run_named
from benchmarks.paraphrase_data import as_decoded, split_pairs
from benchmarks.paraphrase_decoding import Candidate, candidates, chosen
from benchmarks.paraphrase_lora import LORAS, lora_paraphrases
from benchmarks.paraphrase_pictures import bars_and_granularities, sentence_picture
from benchmarks.paraphrase_training import RECORD, train_model
from generation_ext.granularity import modeling  # noqa: F401 (registers the model type)
from generation_ext.granularity.metrics import PAPERS_IBLEU, paraphrase_metrics
from generation_ext.granularity.pictures import sentence_granularities
from generation_ext.granularity.tokenizer import train_tokenizer
from peft_ext.files import written_whole
from peft_ext.runs import lock


TRANSFORMER = "Transformer"
# Points over the Transformer that are wanted, by the paper's measure and by iBLEU as defined.
GAINS = {PAPERS_IBLEU: 2.0, "iBLEU": 1.0}
TIME = 1.3
SCRATCH, TUNED, LONG = "from_scratch", "smollm2_lora", "long"  # experiments, and how the names of the last begin
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
    if run.experiment.startswith(LONG):
        yield from (Row(data, mode, seed) for data in run.sets for mode in run.modes for seed in run.seeds)
        return
    yield from (Row(first, mode, seed) for seed in run.seeds[:2] for mode in run.modes)
    pair = [mode for mode in run.modes if mode in (TRANSFORMER, best([run]))]
    yield from (Row(data, mode, seed) for seed in run.seeds for data in run.sets for mode in pair)


def best(runs: Runs) -> Optional[str]:
    """The variant of most iBLEU (the mean of both kinds) on the first set's validation pairs, over the first two seeds."""
    found = {}
    for run in runs:
        for mode in run.modes:
            rows = [run.find(Row(run.sets[0], mode, seed)._asdict()) for seed in run.seeds[:2]]
            values = [_validated(row) for row in rows if row is not None and "validation iBLEU" in row]
            if values and mode != TRANSFORMER:
                found[mode] = statistics.mean(values)
    return max(found, key=found.__getitem__) if found else None


def _validated(row: dict[str, Any]) -> float:
    """iBLEU as defined alone, where that is all that is stored."""
    values = row.get("validation", {"iBLEU": row["validation iBLEU"]})
    return statistics.mean(values[name] for name in GAINS if name in values)


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
        folder, tokenizer = self._folder(row), self.tokenizer(row.data)
        if not folder.is_dir():
            mode = None if row.mode == TRANSFORMER else row.mode
            train_model(self.run, mode, row.seed, tokenizer, pairs, folder, self._start(row))
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        training = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        found = {part: self._beams(model, tokenizer, pairs[part]) for part in ("validation", "test")}
        measured = {part: self._measured(tokenizer, pairs[part], beams, 0.0) for part, beams in found.items()}
        result = {
            **training,
            "metrics": measured["test"],
            "validation": measured["validation"],
            "validation iBLEU": measured["validation"]["iBLEU"],
        }
        if "penalties" in self.run.settings:
            result["apart"] = self._apart(tokenizer, pairs, found)
        sources, targets = _columns(tokenizer, pairs["test"])
        if row.mode != TRANSFORMER:
            result["granularities"] = _granularities(model, tokenizer, sources[:64])
            tokens, z = sentence_granularities(model, tokenizer, SENTENCE)
            result["sentence"] = {"tokens": tokens, "granularities": z.tolist()}
        self._keep_examples(row, sources, chosen(found["test"], 0.0), targets)
        return result

    def _start(self, row: Row) -> Optional[Path]:
        """The trained model that another set's begins with; None: from scratch."""
        first = self.run.sets[0]
        if "transfer_steps" not in self.run.settings or row.data == first:
            return None
        source = row._replace(data=first)
        if not self._folder(source).is_dir():
            self.measure(source)
        return self._folder(source)

    def measure_lora(self, row: Row) -> dict[str, Any]:
        """The same for SmolLM2."""
        pairs = self.pairs(row.data)
        tokenizer = self.tokenizer(row.data)
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

    def tokenizer(self, data: str) -> Any:
        """A set's tokenizer, trained on its training pairs; in the long training, the first set's."""
        folder = self.run.work / f"{data}-tokenizer"
        if self.run.experiment.startswith(LONG):
            # of all these files one: ties between pieces are broken otherwise in every process
            run, data = self.run, self.run.sets[0]
            folder = run.path.parent / f"{LONG}.work" / f"{data}-{run.vocab}-{run.max_length}-tokenizer"
            folder.parent.mkdir(exist_ok=True)
        with lock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                texts = (pair[name] for pair in self.pairs(data)["train"] for name in ("source", "target"))
                with written_whole(folder) as partial:
                    train_tokenizer(texts, self.run.vocab, max_length=self.run.max_length).save_pretrained(partial)
        return AutoTokenizer.from_pretrained(folder)

    def _beams(self, model: Any, tokenizer: Any, pairs: list[dict[str, str]]) -> list[list[Candidate]]:
        return candidates(model, tokenizer, _columns(tokenizer, pairs)[0], self.run.num_beams)

    def _measured(
        self, tokenizer: Any, pairs: list[dict[str, str]], beams: list[list[Candidate]], penalty: float
    ) -> dict[str, float]:
        sources, targets = _columns(tokenizer, pairs)
        return paraphrase_metrics(chosen(beams, penalty), targets, sources)

    def _apart(
        self, tokenizer: Any, pairs: dict[str, list[dict[str, str]]], found: dict[str, list[list[Candidate]]]
    ) -> dict[str, Any]:
        """Beams chosen against nearness to the source, under the penalty of most iBLEU on the validation pairs."""

        def validated(penalty: float) -> float:
            return self._measured(tokenizer, pairs["validation"], found["validation"], penalty)["iBLEU"]

        penalty = max(self.run.penalties, key=validated)
        return {"penalty": penalty, "metrics": self._measured(tokenizer, pairs["test"], found["test"], penalty)}

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
    """Mean and deviation over seeds, a table for each set, and again for the long training."""
    shown = {}
    for prefix, some in (("", _short(runs)), (f"{LONG} ", _long(runs))):
        for data in sets_of(some):
            found = stored(some, data)
            if not found:
                continue
            lines = [_line(mode, rows, "metrics") for mode, rows in found.items()]
            shown[prefix + data] = markdown_table([TITLES[data], *MEASURES, "validation loss", *_LAST], lines)
            apart = {mode: [row for row in rows if "apart" in row] for mode, rows in found.items()}
            lines = [_line(mode, [row["apart"] for row in rows], "metrics") for mode, rows in apart.items() if rows]
            if lines:
                head = [f"{TITLES[data]}, beams chosen against nearness", *MEASURES, "penalties", "seeds"]
                shown[f"{prefix}{data} apart"] = markdown_table(head, lines)
    return shown


_LAST = ("CPU minutes", "seeds")


def _line(mode: str, rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    # texts of earlier rows weren't kept, so what they lack can't be told
    found = {measure: [row[name][measure] for row in rows if measure in row[name]] for measure in MEASURES}
    cells = [_spread(values) if len(values) == len(rows) else "" for values in found.values()]
    if "penalty" in rows[0]:
        return [title(mode), *cells, ", ".join(f"{row['penalty']:g}" for row in rows), len(rows)]
    loss = "" if mode in LORAS else f"{statistics.mean(row['loss'] for row in rows):.2f}"
    return [title(mode), *cells, loss, f"{_seconds(rows) / 60:.1f}", len(rows)]


def _long(runs: Runs) -> list[Run]:
    """The Transformer's first, as in the other tables."""
    found = [run for run in runs if run.experiment.startswith(LONG)]
    return sorted(found, key=lambda run: TRANSFORMER not in run.modes)


def _short(runs: Runs) -> list[Run]:
    return [run for run in runs if not run.experiment.startswith(LONG)]


def _judged(runs: Runs, data: str) -> tuple[list[Run], dict[str, list[dict[str, Any]]]]:
    """The runs that claims are about, and what they have: the long ones once they have a variant beside the Transformer."""
    scratch = run_named(runs, SCRATCH)
    for some in (_long(runs), [scratch] if scratch else []):
        found = stored(some, data)
        if TRANSFORMER in found and len(found) > 1:
            return some, found
    return [], {}


def claims(runs: Runs) -> list[Claim]:
    """The variant that was best on the first set's validation pairs against the Transformer."""
    lines = []
    for data in ("quora", "twitter"):
        some, found = _judged(runs, data)
        ours, plain = (found.get(mode or "", []) for mode in (best(some), TRANSFORMER))
        known = bool(ours and plain)
        told = known and some[0].size != QUICK  # so few steps say nothing about what is learnt
        for name, gain in GAINS.items():
            mean, worst = _above(ours, plain, name) if told else (None, None)
            lines += [
                Claim(f"{data}: mean {name} of C-DNPG above the Transformer's", mean, gain, " points", at_least=True),
                Claim(
                    f"{data}: {name}, its worst seed above the Transformer's best", worst, 0, " points", at_least=True
                ),
            ]
        copies = _above(ours, plain, "copies")[0] if told else None
        slowest = max(_seconds(rows) for rows in found.values()) / _seconds(plain) if known else None
        lines += [
            Claim(f"{data}: share of copies above the Transformer's", copies, 0, " points"),
            Claim(f"{data}: CPU time of training over the Transformer's, slowest variant", slowest, TIME, "x"),
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
    """iBLEU and z by layer, and z of one sentence in a picture of its own; of the long training, once it has rows."""
    some = [run for run in _long(runs) if run.rows] or _short(runs)
    found = {data: {title(mode): rows for mode, rows in stored(some, data).items()} for data in sets_of(some)}
    bars_and_granularities(
        {data: variants for data, variants in found.items() if variants}, folder / "granularities.png"
    )
    variant = best(some)
    rows = stored(some, some[0].sets[0]).get(variant or "", [])
    if rows:
        sentence_picture(rows[0]["sentence"], folder / "sentence.png")


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def headlines(runs: Runs) -> list[Headline]:
    """Gains on both sets, by each measure."""
    shown, all_claims = [], claims(runs)
    for name, wanted in GAINS.items():
        gains = {
            TITLES[claim.name.partition(":")[0]]: claim.value
            for claim in all_claims
            if f"mean {name} of" in claim.name and claim.value is not None
        }
        if gains:
            what, page = f"C-DNPG against a Transformer of its size, {name}", "../benchmarks/granularity.md"
            figures = ", ".join(f"{gain:+.1f} on {data}" for data, gain in gains.items())
            met = min(gains.values()) >= wanted
            shown.append(Headline("Writing", what, figures, unless(met, f"+{wanted:g}"), page))
    return shown


TASK = Task(measure, tables, claims, headlines, draw)
