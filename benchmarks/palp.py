# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PALP on eight data sets: accuracy at 4, 8, 16 shots a class and on a full pool; plain linear probing, PALP-T and PALP-D,
each of the last token of the last layer under a logistic regression with C 0.1, and of several layers under the ridge head,
with the model's own scores of the labels (the estimator's default); PALP-T of the one layer that cross-validation chooses;
in-context learning and LoRA; TF-IDF and MiniLM under logistic regression, which everybody would try first; and what a shared
prefix saves.

Training texts are drawn from a pool of at most `pool` texts a set, which "full" is; the test is at most `test` texts.
Nothing was tuned on the test split: what isn't chosen in the fit itself was chosen on texts of the pool that a draw leaves
over (experiment `regularisation`). Seconds are of the CPU, so that what else runs on the machine has no part in them; states
of all layers are read once for all draws, kept in the run's work folder, and what they took counts for each row that uses
them.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch

from benchmarks.core.claims import Claim, Headline, markdown_table, spread, unless
from benchmarks.core.run import Run, data_folder, log
from benchmarks.core.task import Runs, Task, run_named
from benchmarks.in_context import TITLES, smoke_model
from benchmarks.palp_data import PLAIN, SETS, Remembering, Split
from generation_ext.in_context import LabelScorer
from generation_ext.probing import FeatureExtractor, PALPClassifier
from generation_ext.probing.features import POOLING
from generation_ext.probing.heads import HEADS as KINDS
from peft_ext.models import load, load_tokenizer


LP, PALP_T, PALP_D, ICL, LORA = "Linear probing", "PALP-T", "PALP-D", "In-context learning", "LoRA"
CHOSEN = ", chosen"  # layer, pooling and C of a logistic regression by cross-validation
JOINED = ", joined"  # the default: layers together, the labels' own scores, ridge regressions
PALP_T_CHOSEN, LP_JOINED, PALP_T_JOINED, PALP_D_JOINED = PALP_T + CHOSEN, LP + JOINED, PALP_T + JOINED, PALP_D + JOINED
TFIDF, MINILM = "TF-IDF, logistic regression", "MiniLM, linear probing"  # this one is a logistic regression, too
METHODS = (LP, LP_JOINED, PALP_T, PALP_T_CHOSEN, PALP_T_JOINED, PALP_D, PALP_D_JOINED, ICL, LORA, TFIDF, MINILM)
# What is dear, or was the default once, is measured on the first draws alone.
DRAWS = 3
FULL = 0  # in the place of shots
SHOTS = (4, 8, 16)
HEADS = ("logistic", "ridge", "svm", "gda", "knn", "mlp")
# Regularisations that are tried.
GRIDS = {
    "logistic": ("C", (1e-4, 1e-3, 1e-2, 1e-1, 1.0)),
    "svm": ("C", (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)),
    "mlp": ("alpha", (0.01, 0.1, 1.0, 10.0)),
}
# Experiments.
ACCURACY, PREFIX, REGULARISATION = "accuracy", "prefix", "regularisation"


class Row(NamedTuple):
    """One measurement."""

    name: str
    method: str
    shots: int
    seed: int
    head: str = "logistic"


def rows_of(run: Run) -> list[Row]:
    """All rows; what says most comes first."""
    shown = demonstrated(run)
    found = []
    for number, seed in enumerate(run.seeds):
        for name in run.sets:
            for shots in run.shots:
                found += [Row(name, LP, shots, seed), Row(name, PALP_T, shots, seed), Row(name, MINILM, shots, seed)]
                found += [row_of(name, method, shots, seed) for method in (PALP_T_JOINED, TFIDF)]
                if number < DRAWS:
                    found += [row_of(name, method, shots, seed) for method in (PALP_T_CHOSEN, LP_JOINED)]
                    found += [row_of(name, PALP_D_JOINED, shots, seed)] * (name in shown)
                found += [Row(name, PALP_D, shots, seed)] * (name in shown)
                # more shots than these don't fit on most sets
                found += [Row(name, ICL, shots, seed)] * (name in shown and shots == SHOTS[0])
        if not number and run.full:
            full = (LP, PALP_T, TFIDF, MINILM, PALP_T_JOINED, PALP_T_CHOSEN, LP_JOINED)
            found += [row_of(name, method, FULL, seed) for method in full for name in run.sets]
            found += [Row(name, PALP_T, 16, seed, head) for name in run.head_sets for head in HEADS[1:]]
            found += [Row(name, LORA, shots, seed) for shots in (FULL, *SHOTS[::-1]) for name in run.lora_sets]
    if run.full:
        found += [Row(name, PALP_D, FULL, run.seeds[0]) for name in shown]
    return [row for row in found if not run.methods or row.method in run.methods]


def row_of(name: str, method: str, shots: int, seed: int) -> Row:
    """A method's measurement with the head that it has in the table."""
    return Row(name, method, shots, seed, "ridge" if method.endswith(JOINED) else "logistic")


def demonstrated(run: Run) -> list[str]:
    """The sets that demonstrations fit on."""
    return [name for name in run.sets if SETS[name].demonstrations]


def measure(run: Run) -> None:
    """What isn't stored."""
    probing = None
    for row in rows_of(run) if run.kind == ACCURACY else ():
        if run.find(row._asdict()) is None:
            probing = probing or Probing(run)
            result = probing.timed(row)
            run.add(row._asdict(), result)
            log(
                f"{row.name}, {row.method}, {row.shots or 'full'}, {row.head}, {row.seed}: {result['accuracy']:.1f}, "
                f"{result['seconds']:.0f} s"
            )
    if run.kind == PREFIX and run.find({}) is None:
        run.add({}, Probing(run).time_prefix())
    if run.kind == REGULARISATION:
        choose(run)


class Probing:
    """Model and data."""

    def __init__(self, run: Run) -> None:
        self.run = run
        for name in run.sets:
            data_folder(name)  # whether it is there, before anything takes long
        self.tokenizer = smoke_model()[1] if run.smoke else load_tokenizer(run.model)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = self.fresh()
        options: dict[str, Any] = {"overflow": "truncate_start", "max_length": run.max_length}
        self.options = options
        self.features = Remembering(FeatureExtractor(self.model, self.tokenizer, **options))
        every = FeatureExtractor(self.model, self.tokenizer, layer="all", pooling=POOLING, **options)
        self.states = Remembering(every, run.work)
        self.encoder: Optional[Remembering] = None
        self.splits: dict[str, Split] = {}

    def fresh(self) -> Any:
        """The model, loaded anew."""
        return smoke_model()[0] if self.run.smoke else load(self.run.model, dtype=torch.bfloat16)

    def split(self, name: str) -> Split:
        """A set's texts."""
        if name not in self.splits:
            self.splits[name] = Split(SETS[name], self.run.pool, self.run.test)
        return self.splits[name]

    def timed(self, row: Row) -> dict[str, float]:
        """Accuracy in percent, and CPU seconds, with those of features that were known."""
        known = (self.features, self.states)
        start, saved = time.process_time(), sum(each.saved for each in known)
        found = self.measure(row)
        seconds = time.process_time() - start + sum(each.saved for each in known) - saved
        return {**(found if isinstance(found, dict) else {"accuracy": found}), "seconds": seconds}

    def measure(self, row: Row) -> Any:
        """Accuracy in percent, alone or beside what was chosen."""
        split = self.split(row.name)
        drawn = np.arange(len(split.pool[0])) if row.shots == FULL else split.draw(row.shots, row.seed)
        texts, labels = [split.pool[0][index] for index in drawn], split.pool[1][drawn]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of texts that are cut
            if row.method == ICL:
                return self._in_context(row, texts, labels)
            if row.method == LORA:
                return self._lora(row, texts, labels)
            if row.method == TFIDF:
                return self._words(row, texts, labels)
            classifier = self.classifier(row).fit(texts, labels)
            found = {"accuracy": 100 * float(np.mean(classifier.predict(split.test[0]) == split.test[1]))}
            if row.method.endswith(CHOSEN):
                found.update(layer=classifier.layer_, pooling=classifier.pooling_, C=classifier.C_)
            if row.method.endswith(JOINED):
                found.update(blocks=len(classifier.blocks_), label_weight=classifier.label_weight_)
            return found

    def classifier(self, row: Row) -> PALPClassifier:
        """The estimator of a row."""
        source, base = SETS[row.name], row.method.removesuffix(CHOSEN).removesuffix(JOINED)
        plain = base in (LP, MINILM)
        options: dict[str, Any] = {
            "template": PLAIN[source.template] if plain else source.template,
            "demonstrations": "per-class" if base == PALP_D else "none",
            "label_words": {label: source.word(label) for label in self.split(row.name).labels},
            "permutations": self.run.permutations,
            "head": row.head,
            "random_state": row.seed,
        }
        if row.method == PALP_D_JOINED:
            return PALPClassifier(self.model, self.tokenizer, **options, **self.options)
        if row.method.endswith((CHOSEN, JOINED)):
            return PALPClassifier(self.states, **options)
        head = KINDS[row.head]
        extractor = self._minilm() if row.method == MINILM else self.features
        options["label_scores"] = False
        return PALPClassifier(extractor, head_params={"C": head.defaults["C"]} if head.grid else None, **options)

    def _words(self, row: Row, texts: list[Any], labels: np.ndarray) -> float:
        """What needs no language model: TF-IDF of words and pairs of them, under logistic regression."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        split, plain = self.split(row.name), PLAIN[SETS[row.name].template]
        training, test = (
            [plain.format(text=each) if isinstance(each, str) else plain.format(**each) for each in some]
            for some in (texts, split.test[0])
        )
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        fitted = LogisticRegression(C=10.0, max_iter=1000).fit(words.fit_transform(training), labels)
        return 100 * float(np.mean(fitted.predict(words.transform(test)) == split.test[1]))

    def _minilm(self) -> Remembering:
        if self.encoder is None:
            from benchmarks.sentence_encoder import load_encoder

            model, tokenizer = smoke_model() if self.run.smoke else load_encoder(self.run.encoder)
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
        return self.run.lora_epochs if row.shots == FULL else self.run.lora_epochs_few

    def _lora(self, row: Row, texts: list[Any], labels: np.ndarray) -> float:
        from benchmarks.palp_lora import lora_accuracy

        split = self.split(row.name)
        task = split.task
        backbone: Any = self.fresh().get_decoder()
        training = [task.text(text) for text in texts], labels
        test = [task.text(text) for text in split.test[0]], split.test[1]
        return lora_accuracy(backbone, self.tokenizer, training, test, self._epochs(row), row.seed)

    # ---- the prefix

    def time_prefix(self) -> dict[str, Any]:
        """Seconds of 64 texts behind 8 demonstrations of about 40 tokens, encoded once and with every text, in turn."""
        split, source = self.split(self.run.sets[0]), SETS[self.run.sets[0]]
        texts = [split.task.text(text) for text in split.pool[0][: self.run.texts]]
        words = " ".join(str(text) for text in split.pool[0]).split()
        shown = [" ".join(words[30 * i : 30 * i + 30]) for i in range(8)]
        prefix = "".join(f"Sentence 1: {text}\nLabel:{source.word(split.labels[0])}\n" for text in shown)
        extractor = FeatureExtractor(self.model, self.tokenizer)
        found: dict[str, list[float]] = {"once": [], "with every text": []}
        extractor.extract(texts[:2], prefix)
        for _ in range(self.run.rounds):
            start = time.perf_counter()
            shared = extractor.extract(texts, prefix)
            found["once"].append(time.perf_counter() - start)
            start = time.perf_counter()
            plain = self._without_sharing([prefix + text for text in texts])
            found["with every text"].append(time.perf_counter() - start)
        error = float(np.abs(shared - plain).max() / np.abs(plain).max())
        seconds = {name: statistics.median(each) for name, each in found.items()}
        tokens = len(self.tokenizer(prefix).input_ids)
        return {"seconds": seconds, "prefix_tokens": tokens, "texts": len(texts), "difference": error}

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


def choose(run: Run) -> None:
    """Accuracy of each regularisation on pool texts that a draw of 16 a class leaves over."""
    probing = None
    for head, (name, values) in GRIDS.items():
        for value in values:
            key = {"head": head, name: value}
            if run.find(key) is not None:
                continue
            probing, found = probing or Probing(run), []
            for source in run.sets:
                split = probing.split(source)
                for seed in run.seeds:
                    drawn = split.draw(16, seed)
                    others = np.setdiff1d(np.arange(len(split.pool[0])), drawn)[:200]
                    classifier = probing.classifier(Row(source, PALP_T, 16, seed, head))
                    classifier.set_params(head_params={name: value})
                    classifier.fit([split.pool[0][i] for i in drawn], split.pool[1][drawn])
                    right = classifier.predict([split.pool[0][i] for i in others]) == split.pool[1][others]
                    found.append(100 * float(right.mean()))
            run.add(key, {"accuracy": statistics.mean(found)})


# ---- tables


def accuracies(run: Run, name: str, method: str, shots: int) -> list[float]:
    """Of the draws that are measured."""
    found = [run.find(row_of(name, method, shots, seed)._asdict()) for seed in run.seeds]
    return [result["accuracy"] for result in found if result is not None]


def table(run: Run, methods: Sequence[str] = METHODS) -> str:
    """Mean and deviation over draws by set, and the average of the sets that demonstrations fit on."""
    lines, shown = [], demonstrated(run)
    for shots in (*SHOTS, FULL):
        for method in methods:
            found = {name: accuracies(run, name, method, shots) for name in run.sets}
            if not any(found.values()):
                continue
            value = average(run, method, shots, shown)
            title = f"{method}, {shots} a class" if shots else f"{method}, full pool"
            lines.append(
                [
                    title,
                    *(spread(each) if each else "" for each in found.values()),
                    "" if value is None else f"{value:.1f}",
                ]
            )
    return markdown_table(["Accuracy, %", *(TITLES[name] for name in run.sets), f"first {len(shown)}"], lines)


def average(run: Run, method: str, shots: int, names: Sequence[str]) -> Optional[float]:
    """Over sets, of the means over draws; None if a set is missing."""
    found = [accuracies(run, name, method, shots) for name in names]
    return statistics.mean(map(statistics.mean, found)) if found and all(found) else None


def paired(run: Run, one: str, other: str, shots: int, names: Sequence[str]) -> Optional[float]:
    """How far one method is above another on the draws that both have, the mean over the sets that have some; None
    without."""
    found = []
    for name in names:
        both = [
            [run.find(row_of(name, method, shots, seed)._asdict()) for method in (one, other)] for seed in run.seeds
        ]
        gains = [mine["accuracy"] - theirs["accuracy"] for mine, theirs in both if mine and theirs]
        if gains:
            found.append(statistics.mean(gains))
    return statistics.mean(found) if found else None


def leads(run: Run, other: str, shots: int) -> dict[str, float]:
    """By set, how far PALP-T as it is by default is above another method, on the draws that both have."""
    found = {name: paired(run, PALP_T_JOINED, other, shots, [name]) for name in run.sets}
    return {name: lead for name, lead in found.items() if lead is not None}


def tables(runs: Runs) -> dict[str, str]:
    """Accuracies, heads, regularisations."""
    shown = {}
    for run in runs:
        if run.kind == ACCURACY:
            shown["accuracy"] = table(run)
            lines = []
            for head in HEADS:
                rows = [Row(name, PALP_T, 16, run.seeds[0], head) for name in run.head_sets]
                found = [run.find(row._asdict()) for row in rows]
                if any(found):
                    lines.append([head, *(each and f"{each['accuracy']:.1f}" for each in found)])
            if lines:
                titles = [TITLES[name] for name in run.head_sets]
                shown["heads"] = markdown_table(["Head, PALP-T, 16 a class, one draw", *titles], lines)
        elif run.rows and run.kind == REGULARISATION:
            lines = [
                [
                    ", ".join(f"{name} {value}" for name, value in row["key"].items()),
                    f"{row['result']['accuracy']:.1f}",
                ]
                for row in run.rows
            ]
            shown["regularisation"] = markdown_table(["Head", "accuracy on pool texts, %"], lines)
    return shown


def claims(runs: Runs) -> list[Claim]:
    """What was wanted, against what came out."""
    run, lines = run_named(runs, ACCURACY), []
    if run is not None:
        shown = demonstrated(run)

        def gain(one: str, other: str, shots: int, names: Sequence[str]) -> Optional[float]:
            found = [average(run, method, shots, names) for method in (one, other)]
            return None if None in found else found[0] - found[1]

        for shots in (*SHOTS, FULL):
            for method, names in ((PALP_T, run.sets), (PALP_D, shown)):
                what = f"{shots} a class" if shots else "full pool"
                value = gain(method, LP, shots, names)
                lines.append(Claim(f"{method} above linear probing, {what}", value, 0.0, " points", at_least=True))
        for shots in SHOTS:
            for method in (PALP_T, PALP_D, LP):
                names = run.sets if method != PALP_D else shown
                what = f"{method} by default above the last layer's last token, {shots} a class"
                lines.append(
                    Claim(what, paired(run, method + JOINED, method, shots, names), 4.0, " points", at_least=True)
                )
        for other in (TFIDF, MINILM):
            found = [lead for shots in (*SHOTS, FULL) for lead in leads(run, other, shots).values()]
            value = float(sum(lead > 0 for lead in found)) if found else None
            lines.append(
                Claim(
                    f"PALP-T, joined, ahead of {other}, of {len(found)} sets and sizes",
                    value,
                    len(found),
                    "",
                    at_least=True,
                )
            )
        value = gain(PALP_D, ICL, SHOTS[0], shown)
        lines.append(
            Claim(f"PALP-D above in-context learning, {SHOTS[0]} a class", value, 0.0, " points", at_least=True)
        )
        for method in (PALP_T, PALP_T_CHOSEN, PALP_T_JOINED, PALP_D):
            value = gain(LORA, method, FULL, run.lora_sets)
            lines.append(Claim(f"LoRA above {method}, full pool", value, 3.0, " points"))
            seconds = []
            for each in (method, LORA):
                found = [run.find(row_of(name, each, FULL, run.seeds[0])._asdict()) for name in run.lora_sets]
                seconds.append(sum(result["seconds"] for result in found if result))
            share = None if value is None else seconds[0] / seconds[1]
            lines.append(Claim(f"CPU time of {method} over LoRA's, full pool", share, 0.1))
    timing = run_named(runs, PREFIX)
    if timing is not None:
        result = timing.find({})
        ratio = result and result["seconds"]["with every text"] / result["seconds"]["once"]
        lines.append(Claim("demonstrations encoded once, over with every text", ratio, 5.0, "x", at_least=True))
    return lines


def draw(runs: Runs, folder: Path) -> None:
    """Average accuracy against shots."""
    run = run_named(runs, ACCURACY)
    if run is None or not run.rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = demonstrated(run)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    places = {**{shots: index for index, shots in enumerate(SHOTS)}, FULL: len(SHOTS)}
    for method in (LP, PALP_T, PALP_T_JOINED, PALP_D, PALP_D_JOINED, ICL, TFIDF, MINILM):
        points = [(places[s], average(run, method, s, names)) for s in places]
        known = [(place, value) for place, value in points if value is not None]
        if known:
            axes.plot(*zip(*known), marker="o", label=method)
    axes.set_xticks(list(places.values()), [str(s) if s else "full" for s in places])
    axes.set(xlabel="training texts of each class", ylabel="accuracy, %", title=f"average of {', '.join(names)}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "accuracy.png", dpi=120)
    pyplot.close(figure)


def headlines(runs: Runs) -> list[Headline]:
    """Few texts against the earlier default and what one tries first, all texts against LoRA."""
    run = run_named(runs, ACCURACY)
    values = {claim.name: claim.value for claim in claims(runs)}
    area, page, shown = "Reading", "../benchmarks/in_context.md#palp", []
    gains = {
        m: [values.get(f"{m} above linear probing, {shots} a class") for shots in SHOTS] for m in (PALP_T, PALP_D)
    }
    if all(None not in each for each in gains.values()):
        figures = ", ".join(
            f"{m} {min(each):+.1f} to {max(each):+.1f}{' points' * (m == PALP_T)}" for m, each in gains.items()
        )
        wanted = unless(min(map(min, gains.values())) > 0, "above")
        shown.append(
            Headline(area, "PALP against linear probing, 4 to 16 texts for each class", figures, wanted, page)
        )
    joined = {shots: paired(run, PALP_T_JOINED, PALP_T, shots, run.sets) for shots in SHOTS} if run else {}
    known = {shots: value for shots, value in joined.items() if value is not None}
    if known:
        figures = ", ".join(f"{value:+.1f}" for value in known.values())
        sizes = ", ".join(map(str, known))
        title = f"PALP-T of several layers and the labels' own scores against the last layer's last token, {sizes} for each class"
        shown.append(Headline(area, title, f"{figures} points", unless(min(known.values()) >= 4, "4 points"), page))
    for other in (TFIDF, MINILM):
        ahead = [lead > 0 for shots in (*SHOTS, FULL) for lead in leads(run, other, shots).values()] if run else []
        if ahead:
            figures = f"ahead on {sum(ahead)} of {len(ahead)} sets and sizes"
            shown.append(Headline(area, f"PALP-T against {other}", figures, unless(all(ahead), "all"), page))
    for method in (PALP_T_JOINED, PALP_T_CHOSEN, PALP_T):
        what = (f"LoRA above {method}", f"CPU time of {method} over LoRA's")
        below, share = (values.get(f"{each}, full pool") for each in what)
        if below is not None and share is not None:
            break
    if below is not None and share is not None:
        figures = f"{below:.1f} points below, at {share:.2f} of the CPU time"
        wanted = f"{unless(below <= 3, '3 points')}, {unless(share <= 0.1, 'a tenth of the time')}"
        shown.append(Headline(area, "PALP-T on all texts against LoRA", figures, wanted, page))
    return shown


TASK = Task(measure, tables, claims, headlines, draw)
