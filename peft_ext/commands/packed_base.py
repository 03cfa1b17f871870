# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What `tune` and `quantize` share: which model, which text, which initialisation; and the packed base that they write."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from peft import get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_ext.checkpoint.pack_quantized import is_packed
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.command_line import BlockArguments
from peft_ext.files import written_whole
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer
from peft_ext.perplexity import perplexity
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.formats import CALIBRATED
from peft_ext.scale_tuning.calibration import calibrate
from peft_ext.scale_tuning.config import ScaleTuningConfig
from peft_ext.scale_tuning.model import check_targets
from peft_ext.text import load_text, token_blocks


@dataclass
class PackedBaseArguments(BlockArguments):
    """Which model to quantise, on which text, in which format."""

    model: str = field(
        default=DEFAULT_MODEL, metadata={"help": "Default model, hub id, folder (also a packed base) or .gguf file."}
    )
    bits: int = field(default=4, metadata={"help": "Width of a weight: 2, 3, 4 or 8; of binary codings 1, too."})
    group_size: int = field(default=-1, metadata={"help": "Inputs that share a scale; -1: one scale per channel."})
    sym: bool = field(default=False, metadata={"help": "Of integers: keep every zero point in the middle."})
    init_method: str = field(
        default=CALIBRATED,
        metadata={
            "help": "Where the codes come from: calibrated, or without data: of integers minmax or mse, of binary "
            "codings alternating or greedy."
        },
    )
    calibration_blocks: int = field(default=32, metadata={"help": "Blocks of the training text to calibrate on."})
    held_out: float = field(
        default=0.1, metadata={"help": "Share of the text that is held out, where it has no validation split."}
    )
    held_out_blocks: int = field(default=64, metadata={"help": "Held-out blocks to measure perplexity on."})


def load_blocks(args: PackedBaseArguments, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training blocks in random order, and held-out blocks `[n, block_size]`."""
    for name in ("calibration_blocks", "held_out_blocks"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be at least 1.")
    splits = load_text(args.data, held_out=args.held_out, text_field=args.text_field, data_config=args.data_config)
    tokenizer = load_tokenizer(args.model)
    train = token_blocks(tokenizer, splits.train, args.block_size, name="training text")
    held_out = token_blocks(tokenizer, splits.held_out, args.block_size, name="held-out text")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train[order], held_out[: args.held_out_blocks]


def load_checked(
    args: PackedBaseArguments, config: ScaleTuningConfig, checkpoint_format: Optional[str] = None
) -> PreTrainedModel:
    """The model, once it is known that every layer can be packed, and stored in the format where one is asked for."""
    model = load(args.model)
    every_layer = copy.copy(config)
    every_layer.target_modules = "all-linear"
    targets = check_targets(every_layer, model)
    conv1d = [name for name, module in targets.items() if isinstance(module, Conv1D)]
    if conv1d and checkpoint_format == "pack-quantized":
        raise ValueError(
            f"model={args.model!r} has Conv1D layers ({conv1d[0]!r} and others), which format='pack-quantized' has no "
            "room for; pass --format bcq."
        )
    return model


def write_base(
    model: PreTrainedModel,
    args: PackedBaseArguments,
    config: ScaleTuningConfig,
    folder: Path,
    train_blocks: torch.Tensor,
    held_out: torch.Tensor,
    checkpoint_format: Optional[str] = None,
) -> dict[str, Any]:
    """Quantise a model, write it and its tokenizer to a folder, whole or not at all; returns what was measured."""
    config = copy.deepcopy(config)
    config.target_modules = "all-linear"
    targets = check_targets(config, model)
    packed = all(is_packed(module) for module in targets.values())
    float_bytes = _float_bytes(model)
    before = None if packed else perplexity(model, held_out, progressbar=True)
    start = time.perf_counter()
    if not packed and config.init_method == CALIBRATED:
        model = calibrate(model, config, train_blocks[-args.calibration_blocks :].split(4))
    base = get_peft_model(model, config).unload()
    seconds = time.perf_counter() - start
    make_saveable(base, checkpoint_format)
    quantized = perplexity(base, held_out, progressbar=True)
    with written_whole(folder) as partial:
        base.save_pretrained(partial)
        load_tokenizer(args.model).save_pretrained(partial)
    return {
        "perplexity": {"float": before, "quantized": quantized},
        "bytes": {"float_model": float_bytes},
        "seconds": {"quantize": seconds},
    }


def _float_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model with every packed layer as floats of its scale's dtype."""
    packed = packed_layers(model).values()
    inside = {id(p) for layer in packed for p in layer.parameters()}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    return rest + sum(layer.in_features * layer.out_features * layer.scale.element_size() for layer in packed)


def file_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def number(value: Optional[float]) -> str:
    """A perplexity as text."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 and math.isfinite(value) else f"{value:.2f}"
