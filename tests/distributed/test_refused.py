# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What can't run on several processes says so, in one line and before anything is changed."""

from __future__ import annotations

import pytest

from tests.distributed import tensor_parallel


pytestmark = pytest.mark.distributed


def test_tensor_parallelism(tmp_path, run_module):
    """`tp_plan="auto"` on a packed base ended the process, and a tuner on a model that is cut died in its quantiser."""
    tensor_parallel.write(tmp_path)
    run_module("tests.distributed.tensor_parallel", tmp_path, processes=2, ranks=True)
