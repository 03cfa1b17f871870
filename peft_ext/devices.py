# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Where a command computes: one flag, `--device`, for what is loaded by us and for what transformers' Trainer places."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, Optional


HELP = "Where it runs: cpu, cuda, cuda:1, ...; by default a GPU if there is one."
OF_TRAINING = (
    "Where it is quantised and trained: cpu (as --use_cpu), or cuda, the first GPU that is seen. By default it is quantised "
    "on the CPU, and trained where transformers' Trainer would."
)


def usable(device: Optional[str] = None) -> str:
    """The device, once a tensor has been put there; by default a GPU if there is one.

    Raises:
        ValueError: If there is no such device.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)  # before a model is loaded
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} can't be used here: {reason}") from error
    return device


def settle(flags: Namespace) -> None:
    """Make `use_cpu` of transformers' TrainingArguments say what `device` says, before they look for a device.

    Raises:
        ValueError: If the two contradict each other.
    """
    device = getattr(flags, "device", None)
    if device is None or not hasattr(flags, "use_cpu"):
        return
    if device == "cpu":
        flags.use_cpu = True
    elif flags.use_cpu:
        raise ValueError(f"device={device!r} and use_cpu=True contradict each other; leave one of them out.")


def check_training_device(device: Optional[str], training: Any) -> None:
    """Refuse a device that transformers' Trainer wouldn't take; with one that it takes, it takes no other GPU beside it.

    Args:
        device: What the user named; None: nothing.
        training: The `TrainingArguments`.

    Raises:
        ValueError: If there is no such device, or Trainer goes elsewhere.
    """
    if device is None:
        return
    import torch

    usable(device)
    named, found = torch.device(device), training.device
    if named.type != found.type or named.index not in (None, found.index):
        way_out = (
            f"start with CUDA_VISIBLE_DEVICES={named.index} and --device cuda"
            if named.type == found.type == "cuda"
            else "leave --device out"
        )
        raise ValueError(f"device={device!r}: transformers' Trainer takes {str(found)!r} here; {way_out}.")
    if training.n_gpu > 1:
        training._n_gpu = 1  # one device was named: no DataParallel over all of them
