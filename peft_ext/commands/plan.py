# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext plan`: memory that tuning and serving a model take, from its config alone.

Nothing is loaded: the model is built, trained for a step and made to generate on PyTorch's meta device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Optional

import torch
from peft import LoraConfig, PeftConfig
from transformers import PretrainedConfig

from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.command_line import parse, show
from peft_ext.commands.packed_base import average_label
from peft_ext.distillation.cached_logits import DEFAULT_TOP_K
from peft_ext.memory.estimate import (
    ServingMemory,
    TuningMemory,
    check_length,
    serving_memory,
    tuning_memory,
    vllm_memory,
)
from peft_ext.memory.trace import LIVE, OPTIMIZERS, Generation, TrainingStep, check_positive
from peft_ext.models import DEFAULT_MODEL, DTYPES, load_config
from peft_ext.peqa.config import TRAINED
from peft_ext.tables import aligned, mebibytes


METHODS = ("peqa", "alphatuning", "lora", "full")


@dataclass
class PlanArguments:
    """Arguments of `peft-ext plan`."""

    model: str = field(
        default=DEFAULT_MODEL, metadata={"help": "Default model, hub id, folder, .gguf file or config.json."}
    )
    method: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"What to compare, of {', '.join(METHODS)}; all."}
    )
    bits: int = field(
        default=4, metadata={"help": "Width of a packed weight: 2, 3, 4, 5, 6 or 8; of binary codings 1, too."}
    )
    bits_budget: Optional[float] = field(
        default=None, metadata={"help": "Instead of bits: the average width of layers of 2, 3, 4 or 8 bits."}
    )
    embeddings: Optional[int] = field(
        default=None,
        metadata={"help": "Of peqa and alphatuning: pack embedding and output head, too, to 8 or 4 bits."},
    )
    group_size: int = field(default=-1, metadata={"help": "Inputs that share a scale; -1: one scale per channel."})
    sym: bool = field(default=False, metadata={"help": "Of integers: no zero points in vLLM's checkpoint."})
    zero: str = field(
        default="int", metadata={"help": "Of integers, zero points: int or float (which vLLM doesn't take)."}
    )
    trained: str = field(default="scales", metadata={"help": f"Of peqa: {' or '.join(TRAINED)}."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA, on all linear layers but the output layer."})
    dtype: str = field(
        default="auto",
        metadata={"help": f"Of float weights and activations: {', '.join(DTYPES[1:])}; auto: the config's."},
    )
    gpus: int = field(
        default=1, metadata={"help": "Devices: FSDP divides tuning, vLLM's tensor parallelism serving among them."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows of a training step on each device."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a row in training."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Backwards before an optimiser step."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Keep the inputs of blocks only and compute the rest again."}
    )
    optim: str = field(default="adamw_torch", metadata={"help": f"Optimiser: {' or '.join(OPTIMIZERS)}."})
    distill: Optional[str] = field(
        default=None,
        metadata={
            "help": "Of peqa and alphatuning: towards a teacher whose logits are on disk (cached), or that runs on the same "
            "device (live)."
        },
    )
    teacher_top_k: int = field(default=DEFAULT_TOP_K, metadata={"help": "Of cached: tokens that are kept for each."})
    batch_size: int = field(default=1, metadata={"help": "Sequences served at once."})
    context_length: int = field(default=1024, metadata={"help": "Tokens of a sequence that is served."})


def main(argv: Sequence[str]) -> None:
    """Check everything, then plan and print."""
    (args,) = parse(argv, PlanArguments, positional="model")
    step = TrainingStep(**{name: getattr(args, name) for name in TrainingStep.__dataclass_fields__})
    generation = Generation(args.batch_size, args.context_length)
    methods = {name: _peft_config(args, name) for name in dict.fromkeys(args.method)}
    config = load_config(args.model)
    dtype = _dtype(args.dtype, config)
    for name in ("max_length", "context_length"):
        check_length(config, name, getattr(args, name))
    tuning = {
        name: tuning_memory(config, method, dtype, step if _packs(method) else replace(step, distill=None), args.gpus)
        for name, method in methods.items()
    }
    serving = _serving(args, config, dtype, methods, generation)
    show(_plain(args, dtype, tuning, serving), _text(args, dtype, tuning, serving))


def _peft_config(args: PlanArguments, method: str) -> Optional[PeftConfig]:
    """The method's config; None for full fine-tuning."""
    widths: dict[str, Any] = {"bits": args.bits}
    if args.bits_budget is not None:
        if args.bits != PlanArguments.bits:
            raise ValueError(
                f"bits_budget={args.bits_budget:g} chooses the widths of all layers, and bits={args.bits} names one; leave out "
                "one of the two."
            )
        widths = {"bits_budget": args.bits_budget}
    widths["embedding_bits"] = args.embeddings
    if method == "peqa":
        return PeqaConfig(**widths, group_size=args.group_size, sym=args.sym, zero=args.zero, trained=args.trained)
    if method == "alphatuning":
        return AlphaTuningConfig(**widths, group_size=args.group_size)
    if method == "lora":
        check_positive(lora_r=args.lora_r)
        return LoraConfig(r=args.lora_r, target_modules="all-linear")
    if method == "full":
        return None
    raise ValueError(f"method={method!r} is unknown; choose some of {METHODS}.")


def _packs(peft_config: Optional[PeftConfig]) -> bool:
    return isinstance(peft_config, (PeqaConfig, AlphaTuningConfig))


def _dtype(name: str, config: PretrainedConfig) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} is unknown; choose one of {DTYPES}.")
    stored = getattr(config.get_text_config(), "dtype", None) or config.dtype or torch.float32
    return stored if name == "auto" else getattr(torch, name)


def _serving(
    args: PlanArguments,
    config: PretrainedConfig,
    dtype: torch.dtype,
    methods: dict[str, Optional[PeftConfig]],
    generation: Generation,
) -> dict[str, ServingMemory]:
    """By what is served: the packed models, and the float one that LoRA and full fine-tuning end in."""
    found: dict[str, ServingMemory] = {}
    for method, peft_config in methods.items():
        packs = _packs(peft_config)
        bits = average_label(args.bits_budget) or f"{args.bits} bits"
        name = f"{method}, {bits}" if packs else f"float ({str(dtype).removeprefix('torch.')})"
        if name in found:
            continue
        found[name] = serving_memory(config, peft_config if packs else None, dtype, generation)
        on_vllm = vllm_memory(config, peft_config, dtype, found[name].cache, args.gpus) if packs else None
        if on_vllm is not None:
            found[f"{name}, in vLLM on {_devices(args.gpus)}"] = on_vllm
    return found


def _text(
    args: PlanArguments, dtype: torch.dtype, tuning: dict[str, TuningMemory], serving: dict[str, ServingMemory]
) -> str:
    rows = [["tuning", "trained", "weights", "gradients", "optimizer", "activations", "total"]]
    if args.gpus > 1:
        rows[0].insert(-1, "gathered")
    if args.distill == LIVE:
        rows[0].insert(-1, "teacher")
    for name, memory in tuning.items():
        sizes = [_size(getattr(memory, column)) for column in rows[0][2:]]
        rows.append([name, f"{memory.trained:,}", *sizes])
    served = [["serving", "weights", "cache", "activations", "total"]]
    for name, one in serving.items():
        served.append([name, *[_size(getattr(one, column)) for column in served[0][1:]]])
    heading = (
        f"{args.model}, {str(dtype).removeprefix('torch.')}; {_devices(args.gpus)}"
        f"{', FSDP (full sharding); per device' if args.gpus > 1 else ''}"
    )
    training = (
        f"A step: {args.per_device_train_batch_size} x {args.max_length} tokens per device, {args.optim}"
        f"{', gradient checkpointing' if args.gradient_checkpointing else ''}. total: at its worst moment, less "
        "than the sum, since gradients come as activations go."
    )
    if args.distill is not None:
        where = "on the same device" if args.distill == LIVE else f"on disk, {args.teacher_top_k} tokens of each"
        training += (
            f" peqa and alphatuning towards a teacher {where}, logits in pieces; the others by the model's own loss."
        )
    generating = (
        f"Serving {args.batch_size} x {args.context_length} tokens at once, by transformers on one device, each prompt in "
        "one piece."
    )
    notes = (
        "Not counted: the framework itself, quantising, and what an allocator keeps unused. On a CPU that can be a third: "
        "set MALLOC_MMAP_THRESHOLD_=131072."
    )
    return "\n".join([heading, "", aligned(rows), "", training, "", aligned(served), "", generating, notes])


def _plain(
    args: PlanArguments, dtype: torch.dtype, tuning: dict[str, TuningMemory], serving: dict[str, ServingMemory]
) -> dict[str, Any]:
    """As JSON: the settings, and bytes per device."""
    settings = {name: value for name, value in asdict(args).items() if name not in ("json", "method")}
    return {
        **settings,
        "dtype": str(dtype).removeprefix("torch."),
        "tuning": {name: asdict(memory) for name, memory in tuning.items()},
        "serving": {name: {**asdict(memory), "total": memory.total} for name, memory in serving.items()},
    }


def _size(count: Optional[int]) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else mebibytes(count)


def _devices(gpus: int) -> str:
    return "one device" if gpus == 1 else f"{gpus} devices"
