# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""SG-ICL's `"recommended"` against zero-shot and gold demonstrations, all with and without the same calibration.

The preset was chosen on the inputs that `benchmarks.sgicl` calls development; here are those of its main table. All
methods see the same inputs; which were right is stored, so that differences have intervals over inputs and seeds (a
paired bootstrap).
"""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from benchmarks.core.claims import Claim, Headline, markdown_table, minus, spread, unless
from benchmarks.core.run import Run, log
from benchmarks.in_context import TITLES, Example, demonstrations
from generation_ext.in_context import LabelScorer, SelfGeneratedICL
from generation_ext.in_context.presets import PRESETS


ZERO_SHOT, GOLD, TWO, OWN = METHODS = (
    "Zero-shot",
    "Gold demonstrations, k = 8",
    'SG-ICL, "recommended" of two draws',  # as it was at first
    'SG-ICL, "recommended"',
)
SHOTS, WORTH = 8, 0.5
_OVERFLOW = "drop_then_truncate"
_RESAMPLES = 2000


class Treatment(NamedTuple):
    """Whether labels were compared with their prior, and how that is called in a table and in a result."""

    calibrated: bool

    @property
    def field(self) -> str:
        """Where a result has which inputs were right."""
        return "right_calibrated" if self.calibrated else "right"


PLAIN, CALIBRATED = Treatment(False), Treatment(True)


class Line(NamedTuple):
    """A row of the table."""

    method: str
    treatment: Treatment

    @property
    def title(self) -> str:
        """The first column."""
        own = self.method in (TWO, OWN)
        return (
            self.method
            + (", calibrated" if self.treatment.calibrated and not own else "")
            + (" without calibration" if own and not self.treatment.calibrated else "")
        )


LINES = [Line(method, treatment) for method in METHODS for treatment in (PLAIN, CALIBRATED)]


def seeds_of(method: str, seeds: Sequence[int]) -> Sequence[int]:
    """Nothing is random without demonstrations."""
    return seeds[:1] if method == ZERO_SHOT else seeds


def key_of(method: str, name: str, seed: int) -> dict[str, Any]:
    """What identifies a result."""
    return {"set": name, "seed": seed, "method": method}


def measure(run: Run, start: Callable[[], Any]) -> None:
    """Every method, set and seed that isn't stored.

    Args:
        run: Of this experiment.
        start: Gives what has `model`, `tokenizer`, `task(name)` and `data[name]`; called if anything is missing.
    """
    setting, usable = None, {}
    # seed by seed, so that a run that was stopped has a comparison
    for seed in run.seeds:
        for name in run.sets:
            for method in METHODS:
                key = key_of(method, name, seed)
                if seed not in seeds_of(method, run.seeds) or run.find(key) is not None:
                    continue
                setting = setting or start()
                begun = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # inputs that are cut are counted
                    result = _measure(run, setting, method, name, seed, usable)
                result["seconds"] = time.perf_counter() - begun
                run.add(key, result)
                log(f"{name}: {method}, seed {seed}: {result['accuracy']:.1f} %, {result['seconds']:.0f} s")


def _measure(run: Run, setting: Any, method: str, name: str, seed: int, usable: dict[str, Any]) -> dict[str, Any]:
    task, data = setting.task(name), setting.data[name]
    examples: list[Example] = data["main"][: run.inputs[name]]
    fields = [example.fields for example in examples]
    preset = PRESETS["recommended"]
    if method in (TWO, OWN):
        draws = 2 if method == TWO else preset["draws"]
        options = {
            "preset": "recommended",
            "shots": SHOTS,
            "overflow": _OVERFLOW,
            "seed": run.seeds[0],
            "draws": draws,
        }
        if name not in usable:  # the seeds are of the draws
            ours = SelfGeneratedICL(setting.model, setting.tokenizer, task, progressbar=not run.smoke, **options)
            pools = ours.generate(ours.sources(fields), run.work / f"{name}-{run.seeds[0]}-{len(fields)}.jsonl")
            usable[name] = ours.surest(pools)
        drawing = SelfGeneratedICL(setting.model, setting.tokenizer, task, **{**options, "keep": 1.0})
        scores = drawing.score_pools(usable[name], seed, fields)
    else:
        shown = [] if method == ZERO_SHOT else random.Random(seed).sample(data["train"], SHOTS)
        scorer = LabelScorer(setting.model, setting.tokenizer, task, normalization="mean", overflow=_OVERFLOW)
        scores = scorer.score(fields, demonstrations(shown), preset["calibrate"], strength=preset["strength"])
    labels = [scores.labels.index(example.label) for example in examples]
    result: dict[str, Any] = {"dropped": int(scores.dropped.sum())}
    for treatment, of in ((PLAIN, scores.log_probs), (CALIBRATED, scores.scores)):
        right = of.argmax(axis=1) == labels
        result[treatment.field] = "".join(map(str, right.astype(int)))
        result["accuracy"] = 100 * float(right.mean())  # at last of the calibrated ones
    return result


def found(run: Run, line: Line, name: str) -> Optional[np.ndarray]:
    """Which inputs were right, bool `[seeds, inputs]`; None if a seed is missing: fewer would look steadier."""
    results = [run.find(key_of(line.method, name, seed)) for seed in seeds_of(line.method, run.seeds)]
    if any(each is None for each in results):
        return None
    return np.array([[mark == "1" for mark in each[line.treatment.field]] for each in results])


def own_of(run: Optional[Run]) -> str:
    """The method that the claims are about: the preset as it is, or as it was, while the former isn't measured."""
    whole = run is not None and accuracies(run, Line(OWN, CALIBRATED)) is not None
    return OWN if whole or run is None or accuracies(run, Line(TWO, CALIBRATED)) is None else TWO


def accuracies(run: Run, line: Line) -> Optional[list[list[float]]]:
    """For each set the percent of each seed; None if anything is missing."""
    values = [found(run, line, name) for name in run.sets]
    return None if any(each is None for each in values) else [(100 * each.mean(1)).tolist() for each in values]


def average(
    run: Optional[Run], line: Line, of: Callable[[Sequence[float]], float] = statistics.mean
) -> Optional[float]:
    """Over sets, of the means (or deviations) over seeds; None if anything is missing."""
    values = None if run is None else accuracies(run, line)
    return None if values is None else statistics.mean(map(of, values))


def interval(run: Optional[Run], one: Line, other: Line) -> Optional[tuple[float, float]]:
    """95 % of the differences of averages, under inputs and seeds drawn anew (the same inputs for both); None if anything is
    missing."""
    if run is None or accuracies(run, one) is None or accuracies(run, other) is None:
        return None
    generator, differences = np.random.default_rng(0), np.zeros(_RESAMPLES)
    for name in run.sets:
        pair = [found(run, line, name) for line in (one, other)]
        for number in range(_RESAMPLES):
            inputs = generator.integers(pair[0].shape[1], size=pair[0].shape[1])
            means = [each[generator.integers(len(each), size=len(each))][:, inputs].mean() for each in pair]
            differences[number] += 100 * (means[0] - means[1]) / len(run.sets)
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def table(run: Run) -> str:
    """Mean and deviation over seeds for each set, the averages, and how far SG-ICL is from each row."""
    own, lines = Line(own_of(run), CALIBRATED), []
    for line in LINES:
        values = accuracies(run, line)
        if values is not None:
            shown = [spread(each) for each in values]
            averages = [f"{average(run, line):.1f}", f"{average(run, line, statistics.pstdev):.1f}"]
            ahead, reach = minus(average(run, own), average(run, line)), interval(run, own, line)
            known = ahead is not None and reach is not None and line != own
            lines.append(
                [line.title, *shown, *averages, f"{ahead:+.1f} ({reach[0]:+.1f} to {reach[1]:+.1f})" if known else ""]
            )
    columns = ["Accuracy, %", *(TITLES[name] for name in run.sets), "average", "average deviation"]
    return markdown_table([*columns, "SG-ICL is ahead by (95 %)"], lines)


def worth(run: Optional[Run], treatment: Treatment) -> Optional[float]:
    """The share of the gold demonstrations' gain over zero-shot that SG-ICL has, where all but SG-ICL are treated so; 1 where
    gold demonstrations gain nothing and SG-ICL loses nothing."""
    zero, gold = (average(run, Line(method, treatment)) for method in (ZERO_SHOT, GOLD))
    own = average(run, Line(own_of(run), CALIBRATED))
    if zero is None or gold is None or own is None:
        return None
    if gold <= zero:
        return 1.0 if own >= zero else 0.0
    return (own - zero) / (gold - zero)


def claims(run: Optional[Run]) -> list[Claim]:
    """The bars, against plain and against calibrated peers."""
    own, result = Line(own_of(run), CALIBRATED), []
    for treatment, beside in ((PLAIN, ""), (CALIBRATED, ", all calibrated")):
        zero, gold = (Line(method, treatment) for method in (ZERO_SHOT, GOLD))
        ahead = minus(average(run, own), average(run, zero))
        steadier = minus(average(run, own, statistics.pstdev), average(run, gold, statistics.pstdev))
        result += [
            Claim(f"recommended SG-ICL over zero-shot{beside}", ahead, 0.0, " points", at_least=True),
            Claim(
                f"its share of the gain of 8 gold demonstrations{beside}", worth(run, treatment), WORTH, at_least=True
            ),
            Claim(f"its deviation over that of 8 gold demonstrations{beside}", steadier, 0.0, " points"),
        ]
    return result


def headlines(run: Optional[Run], page: str) -> list[Headline]:
    """The averages of the sets, beside peers with the same calibration; met is what is met beside plain ones, too."""
    own, deviation = (average(run, Line(own_of(run), CALIBRATED), of) for of in (statistics.mean, statistics.pstdev))
    zero, gold = (average(run, Line(method, CALIBRATED)) for method in (ZERO_SHOT, GOLD))
    shaky = average(run, Line(GOLD, CALIBRATED), statistics.pstdev)
    if own is None or zero is None or gold is None or deviation is None or shaky is None:
        return []
    shown = f"{own:.1f} ± {deviation:.1f}; zero-shot {zero:.1f}, eight gold demonstrations {gold:.1f} ± {shaky:.1f}"
    bars = claims(run)
    both = [bool(plain.met and calibrated.met) for plain, calibrated in zip(bars[:3], bars[3:])]
    wanted = [
        unless(met, what) for met, what in zip(both, ("above zero-shot", "half of gold's gain", "steadier than gold"))
    ]
    title = 'SG-ICL, `"recommended"`' + " of two draws" * (own_of(run) == TWO) + "; all of them calibrated"
    return [Headline("Reading", title, shown, ", ".join(wanted), page)]
