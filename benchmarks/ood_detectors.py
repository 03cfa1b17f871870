# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Seconds and memory of every out-of-distribution detector: fitted on as many examples as CLINC150 trains on, and scoring
100,000 features of MiniLM's size, drawn around class means.

    python -m benchmarks.ood_detectors

Rows are stored as they finish and not measured again. Memory is what the process takes beyond inputs and detector.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import torch

from benchmarks.common import Results, argument_parser, describe, log, markdown_table, verdict
from benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from peft_ext.ood.detectors import make_detector
from peft_ext.ood.study.grid import DETECTORS


CLASSES = 150
SECONDS = 30.0


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure what isn't stored yet, and print the table."""
    parser = argument_parser(__doc__, "ood_detectors.json")
    parser.add_argument("--train", type=int, default=15_000, help="examples that detectors are fitted on")
    parser.add_argument("--scored", type=int, default=100_000, help="examples that they score")
    parser.add_argument("--size", type=int, default=384, help="of a feature")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--detectors", nargs="+", default=list(DETECTORS))
    args = parser.parse_args(argv)
    if args.smoke:
        args.train, args.scored, args.size, args.rounds = 600, 500, 8, 1
    results = Results(args.output, args.seed)
    rows = {name: _settings(args, name) for name in args.detectors}
    if not args.table:
        inputs = None
        for name, settings in rows.items():
            if results.find(settings) is None:
                inputs = inputs or _inputs(args)
                results.add(settings, measure(name, *inputs, rounds=args.rounds))
                log(f"measured: {name}")
    found = {name: result for name, settings in rows.items() if (result := results.find(settings)) is not None}
    lines = [
        [name, f"{r['fit']:.2f}", f"{r['score']:.2f}", f"{r['bytes'] / 1e6:.0f}", f"{r['single'] * 1e3:.2f}"]
        for name, r in found.items()
    ]
    headers = ["Detector", "fit, s", f"score {args.scored:,}, s", "memory of scoring, MB", "one example, ms"]
    print("\n" + markdown_table(headers, lines) + "\n")
    slowest = max((result["score"] for result in found.values()), default=None)
    print(verdict(f"the slowest detector's seconds for {args.scored:,} examples", slowest, SECONDS, " s"))
    if results.rows:
        print("\n" + describe(results.rows[-1]["environment"]))


def measure(
    name: str, train: tuple[np.ndarray, np.ndarray, np.ndarray], scored: tuple[np.ndarray, np.ndarray], rounds: int
) -> dict[str, float]:
    """Seconds of fitting, of scoring (median of `rounds`) and of scoring one example, bytes that scoring takes."""
    start = time.perf_counter()
    detector = make_detector(name).fit(*train)
    fit = time.perf_counter() - start
    seconds = []
    reset_peak()
    before = resident_bytes()
    for _ in range(rounds):
        start = time.perf_counter()
        detector.score(*scored)
        seconds.append(time.perf_counter() - start)
    taken = peak_resident_bytes() - before
    start = time.perf_counter()
    for row in range(10):
        detector.score(scored[0][row], scored[1][row])
    single = (time.perf_counter() - start) / 10
    return {"fit": fit, "score": statistics.median(seconds), "single": single, "bytes": taken}


def _settings(args: argparse.Namespace, name: str) -> dict[str, Any]:
    sizes = {key: getattr(args, key) for key in ("train", "scored", "size", "rounds")}
    return {"detector": name, **sizes, "threads": torch.get_num_threads()}


def _inputs(args: argparse.Namespace) -> tuple[Any, Any]:
    """Features, logits and labels to fit on; features and logits to score."""
    generator = np.random.default_rng(args.seed)
    means = generator.standard_normal((CLASSES, args.size)).astype(np.float32)
    head = generator.standard_normal((args.size, CLASSES)).astype(np.float32)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        labels = generator.integers(CLASSES, size=count)
        features = means[labels] + generator.standard_normal((count, args.size), dtype=np.float32)
        return features, features @ head, labels

    return drawn(args.train), drawn(args.scored)[:2]


if __name__ == "__main__":
    main()
