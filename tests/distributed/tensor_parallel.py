# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Packed bases under a plan of tensor parallelism, and adapters on models that one has cut. Run by `test_refused.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_ext import AdapterPool, AlphaTuningConfig, PeqaConfig, calibrate, load_packed
from peft_ext.checkpoint.bcq import BcqConfig
from tests.distributed.ranks import group, loss_of, refusal, rows
from tests.tiny.models import tiny


def main(folder: Path) -> None:
    ids = rows(2)
    for name in ("bcq", "pack-quantized"):
        expected = loss_of(AutoModelForCausalLM.from_pretrained(folder / name), ids)
        for load in (AutoModelForCausalLM.from_pretrained, load_packed):
            refusal(lambda load=load, name=name: load(folder / name, tp_plan="auto"), "tp_size=2", "--fsdp_version 2")
        # one that isn't cut is loaded
        assert loss_of(AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto", tp_size=1), ids) == expected
    while_loading = BcqConfig(bits=3, number_format="binary")
    refusal(
        lambda: AutoModelForCausalLM.from_pretrained(
            folder / "float", quantization_config=while_loading, tp_plan="auto"
        ),
        "tp_size=2",
    )
    cut = AutoModelForCausalLM.from_pretrained(folder / "float", tp_plan="auto")
    before = loss_of(cut, ids)
    assert abs(before - loss_of(tiny_float(folder), ids)) < 1e-5
    for config in (PeqaConfig(bits=4), AlphaTuningConfig(bits=3)):
        refusal(lambda config=config: get_peft_model(cut, config), "tensor parallelism", "get_peft_model")
    batches = [{"input_ids": ids}]
    refusal(lambda: calibrate(cut, PeqaConfig(bits=4, init_method="calibrated"), batches), "tensor parallelism")
    refusal(lambda: AdapterPool(cut), "tensor parallelism")
    assert loss_of(cut, ids) == before  # nothing was changed


def tiny_float(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "float")


def write(folder: Path) -> None:
    """The bases, by one process."""
    tiny("llama").save_pretrained(folder / "float")
    for name, config in (("bcq", AlphaTuningConfig(bits=3)), ("pack-quantized", PeqaConfig(bits=4))):
        get_peft_model(tiny("llama"), config).unload().save_pretrained(folder / name)


if __name__ == "__main__":
    with group():
        main(Path(sys.argv[1]))
