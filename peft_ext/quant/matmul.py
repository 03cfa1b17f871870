# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The dense matmul under every packed product: oneDNN's where it beats torch's own choice, which is MKL.

In float32 on a CPU torch multiplies with MKL, which holds back on processors that aren't Intel's: on an AMD Zen 5,
oneDNN (in the same torch build) takes a PEQA step from 3.7 to 2.6 s (`benchmarks/peqa_training.py`).
`PEFT_EXT_KERNEL=torch` turns the choice off (see `kernel.py`).
"""

from __future__ import annotations

import functools
import platform

import torch

from peft_ext.quant.kernel import kernel


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x weight^T`: x `[rows, in]`, weight `[out, in]` (of any strides) -> `[rows, out]`.

    Raises:
        ValueError: If PEFT_EXT_KERNEL has an unknown value.
    """
    if _prefers_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.t()


def _prefers_onednn(x: torch.Tensor) -> bool:
    if x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel() or torch.compiler.is_compiling():
        return False  # a compiler makes its own choice
    return kernel() != "torch" and _has_onednn() and bool(torch.backends.mkldnn.enabled)


@functools.cache
def _has_onednn() -> bool:
    machine = platform.machine().lower() in ("x86_64", "amd64")  # elsewhere nobody has measured it
    return machine and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
