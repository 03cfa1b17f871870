# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The pages that are built from stored results are up to date, and show nothing that no commit can measure again."""

from __future__ import annotations

import json

import pytest


pytest.importorskip("torch")

from benchmarks import page  # noqa: E402
from benchmarks.__main__ import TASKS  # noqa: E402
from benchmarks.core import experiments  # noqa: E402
from benchmarks.core.run import RESULTS, Run  # noqa: E402


@pytest.fixture(scope="module")
def pages():
    return page.pages()


def test_built_pages_are_up_to_date(pages):
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} isn't; run: python -m benchmarks.page"


def test_every_area_has_rows(pages):
    for area in page.AREAS:
        assert f"## {area}\n\n| | Measured | Wanted | Page |\n|---|---|---|---|\n| " in pages[page.RESULTS_PAGE]


def test_every_task_has_experiments_and_claims():
    for name, entry in TASKS.items():
        assert experiments.names(name), name
        assert entry.title and callable(entry.load().measure)
        for experiment in experiments.names(name):
            for size in experiments.SIZES:
                Run(name, experiment, experiments.settings(name, experiment, size), size, RESULTS / "nowhere")


def test_every_result_has_its_experiment_and_environment():
    environments = set(json.loads((RESULTS / "environments.json").read_text()))
    named = set()
    for path in RESULTS.glob("*/*.json"):
        stored = json.loads(path.read_text())
        assert (stored["task"], stored["experiment"], stored["size"]) == (path.parent.name, path.stem, "full")
        assert stored["task"] in TASKS and path.stem in experiments.names(stored["task"])
        named |= {row["environment"] for row in stored["rows"]}
    assert named == environments


def test_known_dirty_rows_are_dirty_still():
    for task, names in page.KNOWN_DIRTY.items():
        assert [run.experiment for run in page.published(task) if run.dirty] == list(names)


def test_rows_that_no_commit_can_measure_again_are_refused(monkeypatch):
    monkeypatch.setattr(page, "KNOWN_DIRTY", {})
    page.published.cache_clear()
    with pytest.raises(
        ValueError, match=r"30 of \d+ rows .* run them again .*: python -m benchmarks kernels three_shapes"
    ):
        page.published("kernels")
    page.published.cache_clear()


def test_a_table_that_there_is_not():
    with pytest.raises(ValueError, match="experts has no table 'Blocks'"):
        page.filled("<!-- table: experts/Blocks -->\n<!-- end -->")
