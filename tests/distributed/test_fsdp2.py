# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""FSDP2 over gloo processes: the codes really lie in pieces (each script checks), and the values are one process's."""

from __future__ import annotations

import pytest


pytestmark = pytest.mark.distributed


def test_merging(run_module):
    """`merge_adapter` under FSDP2 was silently the base."""
    run_module("tests.distributed.merging", processes=2, ranks=True)


@pytest.mark.parametrize("processes", [2, 4])
def test_training(processes, run_module):
    """DDP and FSDP2 against one process: losses at every step, and the adapter."""
    run_module("tests.distributed.training", processes=processes, ranks=True)
