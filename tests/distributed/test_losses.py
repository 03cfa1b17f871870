# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The loss that a trainer logs, and the weights after its step, don't depend on how a batch is divided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import losses


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def steps(tmp_path_factory, run_module) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    losses.main(folder)  # in this process
    run_module("tests.distributed.losses", folder, processes=2, ranks=True)
    return folder


@pytest.mark.parametrize("kind", losses.KINDS)
def test_processes_and_accumulation(kind, steps):
    """C-DNPG's loss, and the classifier's, came out multiplied by both, and its gradients."""
    one = load_file(steps / f"{kind}-1x1.safetensors")
    # what a sibling means by its loss: the model's own, on all of it
    assert 0.1 < one["logged loss"].item() < 20
    for divided in ("1x2", "2x1", "2x2"):
        found = load_file(steps / f"{kind}-{divided}.safetensors")
        for name, expected in one.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=f"{divided}: {name}")
