# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PALP on eight data sets: accuracy at 4, 8, 16 shots a class and on a full pool, five draws; plain linear probing, PALP-T,
PALP-D, in-context learning and LoRA; MiniLM as an encoder for reference; and what a shared prefix saves.

Training texts are drawn from a pool of at most `--pool` texts a set, which "full" is; the test is at most `--test` texts.
Nothing was tuned on the test split: the heads' regularisation was chosen on texts of the pool that a draw leaves over
(`--choose`). Seconds are of the CPU, so that what else runs on the machine has no part in them.

    python -m benchmarks.palp --data-dir shared/data

Rows are stored as they finish and not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch

from benchmarks.common import RESULTS, Results, data_folder, describe, log, markdown_table, verdict
from benchmarks.palp_data import PLAIN, SETS, Remembering, Split
from generation_ext.in_context import LabelScorer
from generation_ext.probing import FeatureExtractor, PALPClassifier
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer


SEEDS = (13, 27, 250, 583, 915)  # the paper's
LP, PALP_T, PALP_D, ICL, LORA, MINILM = (
    "Linear probing",
    "PALP-T",
    "PALP-D",
    "In-context learning",
    "LoRA",
    "MiniLM, linear probing",
)
FULL = 0  # in the place of shots
SHOTS = (4, 8, 16)
HEAD_SETS = ("sst2", "ag_news", "snips")


class Budget(NamedTuple):
    """How much is used."""

    pool: int = 1500
    test: int = 200
    permutations: int = 4
    lora_epochs: int = 3
    lora_epochs_few: int = 10


SMOKE = Budget(24, 8, 2, 1, 1)


class Row(NamedTuple):
    """One measurement."""

    name: str
    method: str
    shots: int
    seed: int
    head: str = "logistic"


def rows_of(
    names: Sequence[str], seeds: Sequence[int], lora_sets: Sequence[str], full_demonstrations: bool = True
) -> list[Row]:
    """All rows; what says most comes first."""
    shown = [name for name in names if SETS[name].demonstrations]
    found = []
    for number, seed in enumerate(seeds):
        for name in names:
            for shots in SHOTS:
                found += [Row(name, LP, shots, seed), Row(name, PALP_T, shots, seed), Row(name, MINILM, shots, seed)]
                found += [Row(name, PALP_D, shots, seed)] * (name in shown)
                # more shots than these don't fit on most sets
                found += [Row(name, ICL, shots, seed)] * (name in shown and shots == SHOTS[0])
        if not number:
            found += [Row(name, method, FULL, seed) for name in names for method in (LP, PALP_T, MINILM)]
            found += [Row(name, PALP_T, 16, seed, head) for name in HEAD_SETS for head in ("svm", "gda", "knn", "mlp")]
            found += [Row(name, LORA, shots, seed) for shots in (FULL, *SHOTS[::-1]) for name in lora_sets]
    if full_demonstrations:
        found += [Row(name, PALP_D, FULL, seeds[0]) for name in shown]
    return [row for row in found if row.name in names]


class Study:
    """Model, data and stored results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.budget = SMOKE if args.smoke else Budget(args.pool, args.test, args.permutations)
        self.results = Results(args.output, args.seed)
        self.tokenizer = load_tokenizer(args.model)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = load(args.model, dtype=torch.bfloat16)
        options: dict[str, Any] = {"overflow": "truncate_start", "max_length": args.max_length}
        self.features = Remembering(FeatureExtractor(self.model, self.tokenizer, **options))
        self.encoder: Optional[Remembering] = None
        self.splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """A set's texts."""
        if name not in self.splits:
            self.splits[name] = Split(SETS[name], self.args.data_dir, self.budget.pool, self.budget.test)
        return self.splits[name]

    def settings(self, row: Row) -> dict[str, Any]:
        """What identifies a row."""
        settings = {"model": self.args.model, **row._asdict(), "pool": self.budget.pool, "test": self.budget.test}
        if row.method == PALP_D:
            settings["permutations"] = self.budget.permutations
        if row.method == LORA:
            settings["epochs"] = self._epochs(row)
        return settings

    def fill(self, row: Row) -> None:
        """Measure a row, if it isn't stored."""
        key = self.settings(row)
        if self.results.find(key) is None:
            start, saved = time.process_time(), self.features.saved
            accuracy = self.measure(row)
            seconds = time.process_time() - start + self.features.saved - saved
            self.results.add(key, {"accuracy": accuracy, "seconds": seconds})
            log(
                f"{row.name}, {row.method}, {row.shots or 'full'}, {row.head}, {row.seed}: {accuracy:.1f}, {seconds:.0f} s"
            )

    def measure(self, row: Row) -> float:
        """Accuracy in percent."""
        split = self.split(row.name)
        drawn = np.arange(len(split.pool[0])) if row.shots == FULL else split.draw(row.shots, row.seed)
        texts, labels = [split.pool[0][index] for index in drawn], split.pool[1][drawn]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of texts that are cut
            if row.method == ICL:
                return self._in_context(row, texts, labels)
            if row.method == LORA:
                return self._lora(row, texts, labels)
            classifier = self.classifier(row).fit(texts, labels)
            return 100 * float(np.mean(classifier.predict(split.test[0]) == split.test[1]))

    def classifier(self, row: Row) -> PALPClassifier:
        """The estimator of a row."""
        source = SETS[row.name]
        return PALPClassifier(
            self._minilm() if row.method == MINILM else self.features,
            template=source.template if row.method in (PALP_T, PALP_D) else PLAIN[source.template],
            demonstrations="per-class" if row.method == PALP_D else "none",
            label_words={label: source.word(label) for label in self.split(row.name).labels},
            permutations=self.budget.permutations,
            head=row.head,
            random_state=row.seed,
        )

    def _minilm(self) -> Remembering:
        if self.encoder is None:
            from benchmarks.sentence_encoder import load_encoder

            model, tokenizer = load_encoder(self.args.encoder)
            self.encoder = Remembering(
                FeatureExtractor(model, tokenizer, pooling="mean", overflow="truncate_start", max_length=128)
            )
        return self.encoder

    def _in_context(self, row: Row, texts: list[Any], labels: np.ndarray) -> float:
        split = self.split(row.name)
        scorer = LabelScorer(
            self.model, self.tokenizer, split.task, normalization="mean", overflow="drop_then_truncate"
        )
        order = np.random.default_rng(row.seed).permutation(len(texts))
        shown = [(texts[index], str(labels[index])) for index in order]
        found = scorer.score(split.test[0], shown).predictions()
        return 100 * float(np.mean(np.array(found) == split.test[1]))

    def _epochs(self, row: Row) -> int:
        return self.budget.lora_epochs if row.shots == FULL else self.budget.lora_epochs_few

    def _lora(self, row: Row, texts: list[Any], labels: np.ndarray) -> float:
        from benchmarks.palp_lora import lora_accuracy

        split = self.split(row.name)
        task = split.task
        model = load(self.args.model, dtype=torch.bfloat16)
        backbone: Any = model.get_decoder()
        training = [task.text(text) for text in texts], labels
        test = [task.text(text) for text in split.test[0]], split.test[1]
        return lora_accuracy(backbone, self.tokenizer, training, test, self._epochs(row), row.seed)

    # ---- the prefix

    def time_prefix(self) -> None:
        """Seconds of 64 texts behind 8 demonstrations of about 40 tokens, encoded once and with every text, in turn."""
        key = {"model": self.args.model, "timing": "prefix", "threads": torch.get_num_threads()}
        if self.results.find(key) is not None:
            return
        split, source = self.split(self.args.sets[0]), SETS[self.args.sets[0]]
        texts = [split.task.text(text) for text in split.pool[0][:64]]
        words = " ".join(str(text) for text in split.pool[0]).split()
        shown = [" ".join(words[30 * i : 30 * i + 30]) for i in range(8)]
        prefix = "".join(f"Sentence 1: {text}\nLabel:{source.word(split.labels[0])}\n" for text in shown)
        extractor = FeatureExtractor(self.model, self.tokenizer)
        found: dict[str, list[float]] = {"once": [], "with every text": []}
        extractor.extract(texts[:2], prefix)
        for _ in range(1 if self.args.smoke else 3):
            start = time.perf_counter()
            shared = extractor.extract(texts, prefix)
            found["once"].append(time.perf_counter() - start)
            start = time.perf_counter()
            plain = self._without_sharing([prefix + text for text in texts])
            found["with every text"].append(time.perf_counter() - start)
        error = float(np.abs(shared - plain).max() / np.abs(plain).max())
        seconds = {name: statistics.median(each) for name, each in found.items()}
        tokens = len(self.tokenizer(prefix).input_ids)
        self.results.add(key, {"seconds": seconds, "prefix_tokens": tokens, "texts": len(texts), "difference": error})

    @torch.inference_mode()
    def _without_sharing(self, texts: list[str]) -> np.ndarray:
        """Whole texts, sorted by length, in batches of 16."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        rows: dict[int, np.ndarray] = {}
        backbone: Any = self.model.get_decoder()
        for start in range(0, len(order), 16):
            part = order[start : start + 16]
            batch = self.tokenizer([texts[index] for index in part], return_tensors="pt", padding=True)
            states = backbone(**batch).last_hidden_state[:, -1].float().numpy()
            rows.update(zip(part, states))
        return np.stack([rows[index] for index in range(len(texts))])


def choose(study: Study) -> None:
    """Accuracy of each regularisation on pool texts that a draw of 16 a class leaves over."""
    grids = {"logistic": ("C", (1e-4, 1e-3, 1e-2, 1e-1, 1.0)), "svm": ("C", (1e-6, 1e-5, 1e-4, 1e-3, 1e-2))}
    grids["mlp"] = ("alpha", (0.01, 0.1, 1.0, 10.0))
    for head, (name, values) in grids.items():
        for value in values:
            found = []
            for source in study.args.sets:
                split = study.split(source)
                for seed in SEEDS[:3]:
                    drawn = split.draw(16, seed)
                    others = np.setdiff1d(np.arange(len(split.pool[0])), drawn)[:200]
                    row = Row(source, PALP_T, 16, seed, head)
                    classifier = study.classifier(row).set_params(head_params={name: value})
                    classifier.fit([split.pool[0][i] for i in drawn], split.pool[1][drawn])
                    right = classifier.predict([split.pool[0][i] for i in others]) == split.pool[1][others]
                    found.append(100 * float(right.mean()))
            print(f"{head}, {name} = {value:g}: {statistics.mean(found):.1f}", flush=True)


# ---- tables


def accuracies(study: Study, name: str, method: str, shots: int, seeds: Sequence[int]) -> list[float]:
    """Of the draws that are measured."""
    rows = [Row(name, method, shots, seed) for seed in seeds]
    found = [study.results.find(study.settings(row)) for row in rows]
    return [result["accuracy"] for result in found if result is not None]


def table(study: Study, methods: Sequence[str], names: Sequence[str], seeds: Sequence[int]) -> str:
    """Mean and deviation over draws by set, and the average of the sets."""
    lines = []
    for shots in (*SHOTS, FULL):
        for method in methods:
            found = [accuracies(study, name, method, shots, seeds) for name in names]
            if not any(found):
                continue
            average = statistics.mean(map(statistics.mean, found)) if all(found) else None
            cells = [_spread(each) for each in found]
            title = f"{method}, {shots} shots" if shots else f"{method}, full"
            lines.append([title, *cells, "" if average is None else f"{average:.1f}"])
    return markdown_table(["Accuracy, %", *names, "Average"], lines)


def average(study: Study, method: str, shots: int, names: Sequence[str], seeds: Sequence[int]) -> Optional[float]:
    """Over sets, of the means over draws; None if a set is missing."""
    found = [accuracies(study, name, method, shots, seeds) for name in names]
    return statistics.mean(map(statistics.mean, found)) if found and all(found) else None


def verdicts(study: Study, seeds: Sequence[int]) -> list[str]:
    """What was wanted, against what came out."""
    shown = [name for name in study.args.sets if SETS[name].demonstrations]
    lines = []
    for shots in (*SHOTS, FULL):
        for method, names in ((PALP_T, study.args.sets), (PALP_D, shown)):
            ours, plain = (average(study, each, shots, names, seeds) for each in (method, LP))
            gain = None if ours is None or plain is None else ours - plain
            what = f"{shots} shots" if shots else "full"
            lines.append(verdict(f"{method} above linear probing, {what}", gain, 0.0, " points", at_least=True))
    ours, theirs = (average(study, each, SHOTS[0], shown, seeds) for each in (PALP_D, ICL))
    gain = None if ours is None or theirs is None else ours - theirs
    lines.append(verdict(f"PALP-D above in-context learning, {SHOTS[0]} shots", gain, 0.0, " points", at_least=True))
    lines += _against_lora(study, seeds)
    timing = study.results.find({"model": study.args.model, "timing": "prefix", "threads": torch.get_num_threads()})
    if timing is not None:
        ratio = timing["seconds"]["with every text"] / timing["seconds"]["once"]
        lines.append(verdict("demonstrations encoded once, over with every text", ratio, 5.0, "x", at_least=True))
    return lines


def _against_lora(study: Study, seeds: Sequence[int]) -> list[str]:
    names = [name for name in study.args.lora_sets if accuracies(study, name, LORA, FULL, seeds[:1])]
    if not names:
        return ["- LoRA: not measured"]
    lines = []
    for method in (PALP_T, PALP_D):
        ours, theirs = (average(study, each, FULL, names, seeds[:1]) for each in (method, LORA))
        if ours is None or theirs is None:
            continue
        seconds = []
        for each in (method, LORA):
            found = [study.results.find(study.settings(Row(name, each, FULL, seeds[0]))) for name in names]
            seconds.append(sum(result["seconds"] for result in found if result))
        lines.append(verdict(f"LoRA above full {method}", theirs - ours, 3.0, " points"))
        lines.append(verdict(f"CPU time of full {method} over LoRA's", seconds[0] / seconds[1], 0.1))
    return lines


def heads_table(study: Study) -> str:
    """PALP-T's heads at 16 shots."""
    lines = []
    for head in ("logistic", "svm", "gda", "knn", "mlp"):
        found = [study.results.find(study.settings(Row(name, PALP_T, 16, SEEDS[0], head))) for name in HEAD_SETS]
        lines.append([head, *("" if each is None else f"{each['accuracy']:.1f}" for each in found)])
    return markdown_table(["Head, PALP-T, 16 shots, one draw", *HEAD_SETS], lines)


def plot(study: Study, seeds: Sequence[int], path: Path) -> None:
    """Average accuracy against shots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in study.args.sets if SETS[name].demonstrations]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    places = {**{shots: index for index, shots in enumerate(SHOTS)}, FULL: len(SHOTS)}
    for method in (LP, PALP_T, PALP_D, ICL, MINILM):
        points = [(places[s], average(study, method, s, names, seeds)) for s in places]
        known = [(place, value) for place, value in points if value is not None]
        if known:
            axes.plot(*zip(*known), marker="o", label=method)
    axes.set_xticks(list(places.values()), [str(s) if s else "full" for s in places])
    axes.set(xlabel="training texts of each class", ylabel="accuracy, %", title=f"average of {', '.join(names)}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.pstdev(values):.1f}"


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="default, hub id, folder or .gguf file")
    add("--encoder", help="the encoder for reference; MiniLM by default")
    add("--data-dir", type=Path, default=data_folder(), help="holds the sets' folders")
    add("--sets", nargs="+", choices=tuple(SETS), default=list(SETS))
    add("--lora-sets", nargs="*", choices=tuple(SETS), default=["sst2", "ag_news", "snips"])
    add("--methods", nargs="+", help="only these; all by default")
    add("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the draws")
    add("--pool", type=int, default=Budget().pool)
    add("--test", type=int, default=Budget().test)
    add("--permutations", type=int, default=Budget().permutations, help="most orders of PALP-D's demonstrations")
    add("--max-length", type=int, default=1024, help="most tokens of demonstrations and text")
    add("--no-full-demonstrations", action="store_true", help="leave PALP-D on the full pool out: its dearest rows")
    add("--timing", action="store_true", help="time the shared prefix, and nothing else")
    add("--choose", action="store_true", help="print what regularisation does on texts of the pool")
    add("--table", action="store_true", help="print what is stored")
    add("--smoke", action="store_true", help="a few texts: checks that the script runs")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=RESULTS / "palp.json")
    args = parser.parse_args(argv)
    if args.data_dir is None:
        parser.error("no data: pass --data-dir (or PEFT_EXT_CLASSIFICATION_DATA), a folder with a folder for each set")
    args.lora_sets = [name for name in args.lora_sets if name in args.sets]
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure what isn't stored yet, and print the tables."""
    args = parse(argv)
    study = Study(args)
    if args.choose:
        choose(study)
        return
    if args.timing:
        study.time_prefix()
    elif not args.table:
        for row in rows_of(args.sets, args.seeds, args.lora_sets, not args.no_full_demonstrations):
            if not args.methods or row.method in args.methods:
                study.fill(row)
        plot(study, args.seeds, args.output.with_suffix(".png"))
    print("\n" + table(study, (LP, PALP_T, PALP_D, ICL, LORA, MINILM), args.sets, args.seeds) + "\n")
    print(heads_table(study) + "\n")
    print("\n".join(verdicts(study, args.seeds)))
    if study.results.rows:
        print("\n" + describe(study.results.rows[-1]["environment"]))


if __name__ == "__main__":
    main()
