# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What this process has in memory. Imports nothing but Python, so that it can measure processes without peft-ext. Linux only."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path


def resident_bytes() -> int:
    """Resident memory of this process."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most that this process had resident since [`reset_peak`] (or since its start)."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Hand freed memory back to the system and start to measure the peak anew. Linux only.

    Raises:
        OSError: If the kernel doesn't let a process reset its peak.
    """
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return _status("MemAvailable", "/proc/meminfo")


def _status(field: str, path: str = "/proc/self/status") -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {field}; this benchmark reads memory figures of Linux.")
