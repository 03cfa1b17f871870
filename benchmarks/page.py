# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The pages that are built from stored results: docs/results.md, and the tables between markers in benchmarks/*.md.

    python -m benchmarks.page            # writes them; tests/benchmarks/test_page.py checks that they are up to date

A table of a task stands in a page between `<!-- table: <task>/<title> -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from benchmarks.__main__ import TASKS
from benchmarks.core.claims import Headline
from benchmarks.core.environment import ROOT
from benchmarks.core.run import Run
from benchmarks.core.runner import PROGRAM, open_runs


RESULTS_PAGE = ROOT / "docs" / "results.md"
AREAS = ("Tuning packed models", "Speed and serving on a CPU", "Steering", "Reading", "Writing")
HEAD = """# Results

SmolLM2-135M (its weights from a Q4_1 file, in floats again) on two cores of an AMD EPYC, where nothing else is said.
Every figure comes from a task of `python -m benchmarks` ([how to run them](../benchmarks/README.md)); the linked pages have the
whole tables, peers and conditions, and `benchmarks/results/` the raw results with machine, versions and seeds. **Bold** in the
third column: what we wanted and did not get. Smaller bars, met or not, are on the pages.

<!-- built by `python -m benchmarks.page` from benchmarks/results: change the tasks' `headlines`, not this page -->
"""
DIRTY = """
† From sources that were not committed (`+` behind the commit in `benchmarks/results/environments.json`), before that was
refused. `python -m benchmarks <task> <experiment> --dirty_again` measures them again: {commands}.
"""
# Experiments with such rows. None may be added: a row from sources that no commit has can't be measured again.
KNOWN_DIRTY: Mapping[str, Sequence[str]] = {
    "peqa_quality": ("wikitext2",),
    "peqa_training": ("billion", "smollm2"),
    "peqa_learning_rate": ("five_models",),
    "decode": ("billion", "billion_compiled", "smollm2", "smollm2_compiled"),
    "harness_speed": ("sentences",),
    "kernels": ("three_shapes",),
    "adapters": ("thousand",),
    "plan_memory": ("gpt2", "smollm2"),
    "experts": ("qwen3_moe",),
    "harness": ("auto",),
    "vllm_reading": ("tiny",),
    "critic_cost": ("smollm2",),
}
_MARKED = re.compile(r"(<!-- table: ([^/\n]+)/(.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


@cache
def published(task: str) -> tuple[Run, ...]:
    """The full-size runs of a task, as they are in the repository.

    Raises:
        ValueError: If rows come from sources that weren't committed; says what to run again.
    """
    runs = tuple(open_runs(task))
    for run in runs:
        if run.dirty and run.experiment not in KNOWN_DIRTY.get(task, ()):
            raise ValueError(
                f"{run.path} has {len(run.dirty)} of {len(run.rows)} rows that were measured on sources that are in no commit; "
                f"run them again from a commit: {PROGRAM} {task} {run.experiment} --dirty_again"
            )
    return runs


def results_page(tasks: Sequence[str] = tuple(TASKS)) -> str:
    """The whole of docs/results.md."""
    rows: dict[str, list[str]] = {area: [] for area in AREAS}
    dirty = []
    for task in tasks:
        marked = " †" if task in KNOWN_DIRTY else ""
        found = TASKS[task].load().headlines(published(task))
        rows_of_task = [_row(headline, marked) for headline in found]
        for headline, row in zip(found, rows_of_task):
            rows[headline.area].append(row)
        if marked and found:
            dirty += [f"`{task} {experiment}`" for experiment in KNOWN_DIRTY[task]]
    parts = [HEAD]
    for area, lines in rows.items():
        parts.append("\n".join([f"\n## {area}\n", "| | Measured | Wanted | Page |", "|---|---|---|---|", *lines, ""]))
    return "".join([*parts, DIRTY.format(commands=", ".join(dirty)) if dirty else ""])


def _row(headline: Headline, mark: str) -> str:
    name = headline.page.rpartition("/")[2].partition(".md")[0]
    return f"| {headline.what} | {headline.measured}{mark} | {headline.wanted} | [{name}]({headline.page}) |"


def filled(text: str) -> str:
    """A page with the tables between its markers as they are stored."""

    def table(match: re.Match[str]) -> str:
        task, title = match[2], match[3]
        tables = TASKS[task].load().tables(published(task))
        if title not in tables:
            raise ValueError(f"{task} has no table {title!r}; it has {', '.join(map(repr, tables))}.")
        return f"{match[1]}{tables[title]}\n{match[4]}"

    return _MARKED.sub(table, text)


def pages() -> dict[Path, str]:
    """All built pages, as they should be."""
    marked = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks").glob("*.md"))}
    return {
        RESULTS_PAGE: results_page(),
        **{path: filled(text) for path, text in marked.items() if _MARKED.search(text)},
    }


def main() -> None:
    """Write what isn't up to date."""
    for path, text in pages().items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
