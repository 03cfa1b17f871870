# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What `tune` and `quantize` share: which model, which text, which initialisation; and the packed base that they write."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from peft_ext import devices
from peft_ext.checkpoint.gptq import QUANTIZE_CONFIG
from peft_ext.checkpoint.pack_quantized import is_packed
from peft_ext.checkpoint.saving import make_saveable, take_over
from peft_ext.command_line import note
from peft_ext.commands.training_data import DataArguments, TrainingData
from peft_ext.data import PYTHON_DOCS
from peft_ext.files import written_whole
from peft_ext.hub import is_hub_id
from peft_ext.language_model import device_of
from peft_ext.model_card import note_measured
from peft_ext.models import (
    DEFAULT_MODEL,
    copy_processor,
    load,
    load_config,
    locate,
    own_integers,
    resolve_model,
)
from peft_ext.perplexity import example_perplexity, padded
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.formats import CALIBRATED
from peft_ext.quant.packed_module import PackedModule
from peft_ext.scale_tuning.bit_budget import BitAllocation, allocate_bits
from peft_ext.scale_tuning.calibration import calibrate
from peft_ext.scale_tuning.config import BASE, DEFAULT_BITS, EMBEDDING_BITS, ScaleTuningConfig
from peft_ext.scale_tuning.embeddings import check_embeddings, pack_embeddings
from peft_ext.scale_tuning.model import check_targets


# The width where a budget gives each layer its own.
MIXED = "mixed"


@dataclass
class PackedBaseArguments(DataArguments):
    """Which model to quantise, on which data, in which format."""

    model: str = field(
        default=DEFAULT_MODEL, metadata={"help": "Default model, hub id, folder (also a packed base) or .gguf file."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})
    device: Optional[str] = field(default=None, metadata={"help": devices.OF_TRAINING})
    bits: Optional[str] = field(
        default=None,
        metadata={
            "help": "Width of a weight: 2, 3, 4, 5, 6 or 8; of binary codings 1, too. 4 by default; a model that is packed "
            f"already stays as it is ({BASE}), and so does, in tune, a GGUF for which no format is named."
        },
    )
    bits_budget: Optional[float] = field(
        default=None,
        metadata={
            "help": "Instead of bits: an average width, such as 3.0; each layer gets 2, 3, 4 or 8 bits, by what the loss loses "
            "(one backward pass over the calibration blocks)."
        },
    )
    group_size: int = field(default=-1, metadata={"help": "Inputs that share a scale; -1: one scale per channel."})
    sym: bool = field(default=False, metadata={"help": "Of integers: keep every zero point in the middle."})
    zero: Optional[str] = field(
        default=None,
        metadata={
            "help": "Of integers, zero points: int (whole, for stock transformers and vLLM; the default) or float (a group "
            "keeps its own minimum; written as bcq). A packed base keeps its own."
        },
    )
    init_method: str = field(
        default=CALIBRATED,
        metadata={
            "help": "Where the codes come from: calibrated, of integers gptq (faster, further off), or without data: of "
            "integers minmax, mse or lattice (exact where weights lie on one of this format), of binary codings alternating "
            "or greedy."
        },
    )
    embeddings: Optional[int] = field(
        default=None,
        metadata={
            "help": "Pack the token embedding and the output head, too: 8 or 4 bits (written as bcq). They stay as they are by "
            "default."
        },
    )
    calibration_blocks: int = field(
        default=32, metadata={"help": "Blocks (or examples) of the training data to calibrate on."}
    )
    held_out: float = field(
        default=0.1, metadata={"help": "Share of the data that is held out, where they have no validation split."}
    )
    held_out_blocks: int = field(
        default=64, metadata={"help": "Held-out blocks (or examples) to measure perplexity on."}
    )

    def width(self) -> Union[int, str]:
        """The width of a weight; `"base"`: by default, of a model that is packed already; `"mixed"` under a budget.

        Raises:
            ValueError: If it is no number, or there is a budget as well, or for a model that is packed already.
        """
        if self.bits_budget is not None:
            return self._budgeted()
        if self.bits is None:
            return BASE if is_packed_model(self.model) else DEFAULT_BITS
        if self.bits == BASE:
            return BASE
        try:
            return int(self.bits)
        except ValueError:
            raise ValueError(
                f"bits={self.bits!r} is no width of a weight; pass 2, 3, 4, 5, 6 or 8, or {BASE}"
                f"{', or as an average --bits_budget' if _is_fraction(self.bits) else ''}."
            ) from None

    def _budgeted(self) -> str:
        if self.bits not in (None, MIXED):
            raise ValueError(
                f"bits_budget={self.bits_budget:g} chooses the widths of all layers, and bits={self.bits!r} names one; leave out "
                "one of the two."
            )
        if is_packed_model(self.model):
            raise ValueError(
                f"bits_budget={self.bits_budget:g} chooses widths of float layers, and model={self.model!r} is packed already; "
                "name the float model, or leave it out."
            )
        return MIXED

    def widths(self) -> dict[str, Any]:
        """What a tuner's config is told of widths."""
        return {"bits": self.width()} if self.bits_budget is None else {"bits_budget": self.bits_budget}

    def keeps_integers(self) -> bool:
        """Whether the model is a GGUF whose integers are tuned as they are, since nothing is said of another format."""
        default = (self.bits, self.bits_budget, self.group_size, self.sym, self.zero, self.init_method) == (
            None,
            None,
            -1,
            False,
            None,
            CALIBRATED,
        )
        return default and is_gguf(self.model) and bool(own_integers(self.model))

    def check_base_format(self) -> None:
        """Refuse a group size, symmetry or kind of zero points beside a base that keeps its own."""
        for name, default in (("group_size", -1), ("sym", False), ("zero", None)):
            if getattr(self, name) != default and self.width() == BASE:
                raise ValueError(
                    f"{name}={getattr(self, name)}: model={self.model!r} is packed already and keeps its own format; leave "
                    "it out, or name the base's width with --bits to have it checked."
                )

    def check_counts(self) -> None:
        """Refuse counts that leave nothing to calibrate or to measure on, and widths that embeddings don't have."""
        if self.embeddings not in (None, *EMBEDDING_BITS):
            raise ValueError(
                f"embeddings={self.embeddings} is not supported; choose one of {EMBEDDING_BITS}, or leave it out."
            )
        for name in ("calibration_blocks", "held_out_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")


def _is_fraction(bits: str) -> bool:
    try:
        return math.isfinite(float(bits))
    except ValueError:
        return False


def is_packed_model(model: str) -> bool:
    """Whether a model's config says that its weights are packed; of a GGUF no."""
    if model.lower().endswith(".gguf") or model == DEFAULT_MODEL:
        return False
    stored = getattr(load_config(model), "quantization_config", None)
    return stored is not None or Path(model, QUANTIZE_CONFIG).is_file()


def is_gguf(model: str) -> bool:
    """Whether a model argument names a GGUF; an adapter on one doesn't."""
    name, adapter = locate(model)
    return adapter is None and resolve_model(name).gguf_file is not None


def load_checked(
    args: PackedBaseArguments, config: Optional[ScaleTuningConfig], checkpoint_format: Optional[str] = None
) -> PreTrainedModel:
    """The model, once it is known that every layer can be packed, and stored in the format where one is asked for.

    Args:
        args: Which model.
        config: What to quantise to; None: the model is packed already, and stays as it is.
        checkpoint_format: As of `make_saveable`.
    """
    try:
        kept = own_integers(args.model) if is_gguf(args.model) else {}
        if kept and config is not None:
            listed = ", ".join(f"{kind} x{count}" for kind, count in kept.items())
            note(
                f"{args.model} holds integers already ({listed}); they become floats and are rounded to "
                f"{'other' if config.bits is None else config.bits} bits again."
            )
        model = load(args.model, dtype=args.dtype, merge=True, packed=bool(kept) and config is None)
        model = model.to(args.device or "cpu")
    except TypeError as error:  # packed codes are never rounded again
        raise ValueError(
            f"model={args.model!r} has an adapter that can't be merged into its base, so nothing can be tuned on top of "
            f"it ({error})"
        ) from error
    if args.embeddings is not None:
        check_embeddings(model, args.embeddings)
    if config is None:
        take_over(model)
        if not packed_layers(model):
            raise ValueError(
                f"bits={BASE!r}: model={args.model!r} has no packed layers; pass a width, such as --bits 4."
            )
        return model
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
    config: Optional[ScaleTuningConfig],
    folder: Path,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint_format: Optional[str] = None,
) -> dict[str, Any]:
    """Quantise a model, write it and its tokenizer to a folder, whole or not at all; returns what was measured.

    Without a config it is packed already and written as it is.
    """
    float_bytes, held_out = _float_bytes(model), data.held_out.examples
    before, base, start = None, model, time.perf_counter()
    allocation: Optional[BitAllocation] = None
    if config is not None:
        config = copy.deepcopy(config)
        config.target_modules = "all-linear"
        targets = check_targets(copy.copy(config), model)
        packed = all(is_packed(module) for module in targets.values())
        if not packed:
            before = example_perplexity(model, held_out, progressbar=True)
        start = time.perf_counter()
        batches = []
        if not packed and (config.needs_data or config.bits_budget is not None):
            batches = _calibration_batches(data, args.calibration_blocks, device_of(model))
        if not packed and config.bits_budget is not None:
            allocation = allocate_bits(model, config, batches)
            note(str(allocation))
        if not packed and config.needs_data:
            model = calibrate(model, config, batches)
        base = get_peft_model(model, config).unload()
    if args.embeddings is not None:
        pack_embeddings(base, args.embeddings)
    seconds = time.perf_counter() - start
    if allocation is not None and checkpoint_format == "pack-quantized":
        checkpoint_format = None  # which has room for several widths only where they are symmetric
        if not args.sym:
            note(
                "Layers of several widths with zero points are written as bcq, which loads where peft_ext is imported; with "
                "--sym as compressed-tensors, which stock transformers loads."
            )
    if args.embeddings is not None and checkpoint_format == "pack-quantized":
        checkpoint_format = None
        note(
            "A packed embedding is written as bcq, which loads where peft_ext is imported; compressed-tensors has no room "
            "for one."
        )
    make_saveable(base, checkpoint_format)
    quantized = example_perplexity(base, held_out, progressbar=True)
    figures = {"packed": quantized} if before is None else {"float": before, "packed": quantized}
    note_measured(base, perplexity_of(args, held_out), **figures)
    with written_whole(folder) as partial:
        tokenizer.save_pretrained(partial)  # first: the model's card then loads it from there
        base.save_pretrained(partial)
        copy_processor(args.model, partial)
    return {
        "perplexity": {"float": before, "quantized": quantized},
        "bytes": {"float_model": float_bytes},
        "seconds": {"quantize": seconds},
        **({} if allocation is None else {"widths": dict(allocation.widths)}),
    }


def perplexity_of(args: PackedBaseArguments, held_out: Sequence[Any]) -> str:
    """What a model card calls the perplexity on held-out examples; a file's place is its owner's business."""
    data = args.data or PYTHON_DOCS
    return f"perplexity on {len(held_out)} held-out rows of {data if is_hub_id(data) else Path(data).name}"


def _calibration_batches(data: TrainingData, count: int, device: torch.device) -> list[dict[str, Any]]:
    """The last training examples, four a batch, where the model is."""
    chosen = data.train.examples[-count:]
    batches = [padded(chosen[start : start + 4]) for start in range(0, len(chosen), 4)]
    return [{name: batch[name].to(device) for name in ("input_ids", "attention_mask")} for batch in batches]


def _float_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model with every packed layer as floats of the dtype that it stands for."""
    packed = list({id(each.planes): each for each in model.modules() if isinstance(each, PackedModule)}.values())
    inside = {id(p) for layer in packed for p in layer.parameters()}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    return rest + sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in packed)


def average_label(budget: Optional[float]) -> str:
    """What a width is called that layers have on average; nothing without a budget."""
    return "" if budget is None else f"{budget:g} bits on average"


def file_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def number(value: Optional[float]) -> str:
    """A perplexity as text."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 and math.isfinite(value) else f"{value:.2f}"
