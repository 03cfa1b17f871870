# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""SG-ICL's options by the names of presets, and what of them goes together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generation_ext.in_context.calibration import BY_BATCH, calibration_named, check_strength


# What the options are where the caller doesn't say: the paper's code, and what did best on validation texts
# (benchmarks/in_context.md).
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "balanced": False,
        "self_consistent": False,
        "keep": 1.0,
        "calibrate": False,
        "strength": 1.0,
        "shared": False,
        "pool_inputs": None,
        "draws": 1,
    },
    "recommended": {
        "balanced": True,
        "self_consistent": False,
        "keep": 0.25,
        "calibrate": BY_BATCH,
        "strength": 0.5,
        "shared": True,
        "pool_inputs": 8,
        "draws": 8,
    },
}


def options_of(preset: str, shots: int, samples: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's options with those that are given in their place, checked before a model is loaded.

    Args:
        preset: Of `PRESETS`.
        shots, samples: Of [`SelfGeneratedICL`].
        given: Options by name; None leaves the preset's.

    Raises:
        ValueError: If the preset is unknown, a number is out of its range, or options don't go together.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown; choose one of {tuple(PRESETS)}.")
    options = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
    if not options["shared"] and given.get("pool_inputs") is None:
        options["pool_inputs"] = None  # the preset's is of no use without it
    for name, value in (("shots", shots), ("samples", samples), ("draws", options["draws"])):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer.")
    calibration_named(options["calibrate"])
    check_strength(options["strength"])
    if not 0 < options["keep"] <= 1:
        raise ValueError(f"keep={options['keep']!r} must be above 0 and at most 1.")
    inputs = options["pool_inputs"]
    if inputs is not None and (not isinstance(inputs, int) or inputs < 0):
        raise ValueError(f"pool_inputs={inputs!r} must be a positive integer, or 0 for all inputs.")
    if inputs and not options["shared"]:
        raise ValueError(
            f"pool_inputs={inputs} needs shared=True: without it, every input stands behind texts of its own."
        )
    return options
