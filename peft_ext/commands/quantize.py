# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext quantize`: write a packed checkpoint of a model, calibrated on a text, and compare before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from peft_ext import AlphaTuningConfig, PeqaConfig, devices
from peft_ext.command_line import note, parse, show
from peft_ext.commands.packed_base import (
    BASE,
    PackedBaseArguments,
    file_bytes,
    load_checked,
    number,
    write_base,
)
from peft_ext.commands.run_folder import new_folder
from peft_ext.commands.training_data import ExampleArguments, training_data
from peft_ext.models import load_tokenizer
from peft_ext.scale_tuning.config import ScaleTuningConfig
from peft_ext.tables import mebibytes, pairs


# The tuner's config whose format a checkpoint holds.
FORMATS = {"pack-quantized": PeqaConfig, "bcq": AlphaTuningConfig}


@dataclass
class QuantizeArguments(PackedBaseArguments, ExampleArguments):
    """What to quantise, to which checkpoint."""

    format: str = field(
        default="pack-quantized",
        metadata={
            "help": "pack-quantized (integers, for stock transformers and vLLM) or bcq (binary codings; with --zero "
            "float integers)."
        },
    )
    output_dir: Optional[str] = field(default=None, metadata={"help": "The folder to write the checkpoint to."})
    device: Optional[str] = field(
        default=None, metadata={"help": "Where it is quantised: cpu (the default), cuda, cuda:1, ..."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the choice of calibration blocks."})


def main(argv: Sequence[str]) -> None:
    """Check everything, then quantise, write and compare."""
    (args,) = parse(argv, QuantizeArguments)
    devices.usable(args.device or "cpu")
    config = _config(args)
    folder = new_folder(args.output_dir)
    args.check_counts()
    tokenizer = load_tokenizer(args.model)
    data = training_data(
        args, args, tokenizer, args.held_out, args.seed, args.calibration_blocks, args.held_out_blocks
    )
    for line in data.lines():
        note(line)
    model = load_checked(args, config, args.format)
    folder.parent.mkdir(parents=True, exist_ok=True)
    measured = write_base(model, args, config, folder, data, tokenizer, args.format)
    rows = [
        ("perplexity, float model", number(measured["perplexity"]["float"])),
        (f"perplexity, {config.bits} bits", number(measured["perplexity"]["quantized"])),
        ("float model", mebibytes(measured["bytes"]["float_model"])),
        ("packed checkpoint", mebibytes(file_bytes(folder))),
        ("time to quantise", f"{measured['seconds']['quantize']:.0f} s"),
    ]
    show({**measured, "output_dir": str(folder), "packed_bytes": file_bytes(folder)}, pairs(rows))
    note(f"\nThe checkpoint is in {folder}. Next: peft-ext generate --model {folder} --prompt '...'")


def _config(args: QuantizeArguments) -> ScaleTuningConfig:
    if args.format not in FORMATS:
        raise ValueError(f"format={args.format!r} is unknown; choose one of {tuple(FORMATS)}.")
    if args.sym and args.format == "bcq":
        raise ValueError("sym=True is for integers (format='pack-quantized'); a binary coding is symmetric anyway.")
    if args.zero not in (None, "int") and args.format == "pack-quantized":
        raise ValueError(
            f"zero={args.zero!r}: format='pack-quantized' has no room for float zero points; pass --format bcq, or --zero int."
        )
    bits = args.width()
    if bits == BASE:
        raise ValueError(f"model={args.model!r} is packed already; name a float model, or its width with --bits.")
    common: dict[str, Any] = {"bits": bits, "group_size": args.group_size, "init_method": args.init_method}
    if args.format == "pack-quantized" or args.zero not in (None, "int"):
        return PeqaConfig(**common, sym=args.sym, zero=args.zero)
    return AlphaTuningConfig(**common)
