# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Codes and numbers in the bytes of GGUF's blocks, out and in."""

from __future__ import annotations

import numpy as np


def halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at a byte of every block as float32, `[n, 1]`."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def spread(part: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Codes whose bytes lie in runs: of each run first the lowest `bits` of all its bytes, then the next.

    Args:
        part: uint8 `[n, bytes]`, a multiple of `run`.

    Returns:
        uint8 `[n, 8 / bits * bytes]`.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    spread = (part.reshape(len(part), -1, 1, run) >> shifts) & np.uint8(2**bits - 1)
    return spread.reshape(len(part), -1)


def gathered(codes: np.ndarray, run: int, bits: int) -> np.ndarray:
    """The inverse of [`spread`]: uint8 codes `[n, weights]` below `2**bits` to uint8 `[n, bits * weights / 8]`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = codes.reshape(len(codes), -1, 8 // bits, run) << shifts
    return np.bitwise_or.reduce(parts, axis=2).reshape(len(codes), -1)
