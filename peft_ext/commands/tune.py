# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext tune`: quantise, tune, compare; writes a run folder and goes on after a kill.

The packed base is written first, then tuned: whatever happens later, `base/` is a checkpoint that stock transformers
loads. Started again with
the same arguments, a run continues from its last checkpoint, and a finished one only prints its table.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from peft import get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import get_last_checkpoint

from peft_ext import PeqaConfig, calibrate
from peft_ext.commands.run_folder import parse, write_json, written_whole
from peft_ext.models import DEFAULT_MODEL, load_model, load_tokenizer
from peft_ext.perplexity import perplexity
from peft_ext.quant.linear import PackedLinear
from peft_ext.scale_tuning.model import check_targets
from peft_ext.scale_tuning.quantization import is_packed
from peft_ext.text import load_text, token_blocks


@dataclass
class TuneArguments:
    """What to tune, on which text, in which format."""

    model: str = field(
        default=DEFAULT_MODEL, metadata={"help": "Default model, hub id, folder (also a packed base) or .gguf file."}
    )
    data: str = field(
        default="python-docs", metadata={"help": "Text or JSON-lines file, folder, hub data set id, or python-docs."}
    )
    text_field: str = field(
        default="text", metadata={"help": "Field that holds the text in JSON lines and data sets."}
    )
    data_config: Optional[str] = field(default=None, metadata={"help": "Configuration of the hub data set."})
    bits: int = field(default=4, metadata={"help": "Width of an integer weight: 2, 3, 4 or 8."})
    group_size: int = field(default=-1, metadata={"help": "Inputs that share a scale; -1: one scale per channel."})
    sym: bool = field(default=False, metadata={"help": "Keep every zero point in the middle of the range."})
    init_method: str = field(
        default="calibrated", metadata={"help": "Where the integers come from: calibrated, minmax or mse."}
    )
    calibration_blocks: int = field(default=32, metadata={"help": "Blocks of the training text to calibrate on."})
    block_size: int = field(default=256, metadata={"help": "Tokens per block."})
    held_out: float = field(
        default=0.1, metadata={"help": "Share of the text that is held out, where it has no validation split."}
    )
    held_out_blocks: int = field(default=64, metadata={"help": "Held-out blocks to measure perplexity on."})


@dataclass
class TuneTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with defaults for scales: a high learning rate, no weight decay."""

    output_dir: Optional[str] = field(default=None, metadata={"help": "The run folder to write."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate of the relative scales."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Blocks per step and device."})
    max_steps: int = field(default=100, metadata={"help": "Training steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps (or the share of steps) of warm-up."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay: towards the untuned scales."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two losses in the log."})
    save_steps: float = field(default=20, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: Optional[int] = field(default=1, metadata={"help": "Checkpoints to keep."})
    report_to: str = field(default="none", metadata={"help": "Where to report to; none by default."})

    def __post_init__(self):
        if not self.output_dir:  # transformers would choose a folder by itself
            raise ValueError("output_dir is missing: pass --output_dir, the folder to write the run to.")
        if self.per_device_train_batch_size < 1:
            raise ValueError(f"per_device_train_batch_size={self.per_device_train_batch_size} must be at least 1.")
        super().__post_init__()


def main(argv: Sequence[str]) -> None:
    """Check everything, then quantise, tune and compare."""
    args, training = parse(argv, TuneArguments, TuneTrainingArguments)
    config = PeqaConfig(
        bits=args.bits,
        group_size=args.group_size,
        sym=args.sym,
        init_method=args.init_method,
        task_type="CAUSAL_LM",
    )
    # of several processes, the others look at the run folder once the first has written the base
    with training.main_process_first(desc="quantising the base"):
        run = _check_output(args, training)
        if (run / "metrics.json").is_file():
            print(f"{run} is finished already; its figures:")
            print(table(_read_json(run / "metrics.json")))
            return
        train_blocks, held_out = _load_blocks(args, training.seed)
        before = _quantize(args, training, config, run, train_blocks, held_out)
    trainer = _train(config, training, run, train_blocks)
    if trainer.is_world_process_zero():
        metrics = _finish(trainer, args, run, held_out, before)
        print(table(metrics))
        print(f"\nThe run is in {run}. Next: peft-ext generate {run} --prompt '...'")


def table(metrics: dict[str, Any]) -> str:
    """The figures of a run, as text."""
    perplexities, sizes, seconds = metrics["perplexity"], metrics["bytes"], metrics["seconds"]
    rows = [
        ("perplexity, float model", _number(perplexities["float"])),
        (f"perplexity, {metrics['bits']} bits", _number(perplexities["quantized"])),
        ("perplexity, tuned", _number(perplexities["tuned"])),
        ("float model", _mebibytes(sizes["float_model"])),
        ("packed base", _mebibytes(sizes["packed_base"])),
        ("adapter", _mebibytes(sizes["adapter"])),
        ("trained parameters", f"{metrics['trained_parameters']:,}"),
        ("time to quantise", f"{seconds['quantize']:.0f} s"),
        ("time to tune", f"{seconds['train']:.0f} s, {metrics['steps']} steps"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value:>16}" for name, value in rows)


def _check_output(args: TuneArguments, training: TuneTrainingArguments) -> Path:
    """The run folder: new, empty, or of a run with the same arguments.

    Raises:
        ValueError, OSError: If it is something else, or can't be written.
    """
    run = Path(str(training.output_dir)).expanduser().resolve()
    arguments = _arguments(args, training)
    if run.exists() and not run.is_dir():
        raise FileExistsError(f"output_dir={str(run)!r} is a file; pass a folder.")
    if run.is_dir() and any(run.iterdir()):
        config_file = run / "config.yaml"
        if not config_file.is_file() or yaml.safe_load(config_file.read_text(encoding="utf-8")) != arguments:
            raise FileExistsError(
                f"output_dir={str(run)!r} is not empty and not a run with these arguments; pass another folder, or "
                f"the "
                "same arguments to continue that run."
            )
        return run
    parent = next(folder for folder in (run, *run.parents) if folder.exists())
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise PermissionError(f"output_dir={str(run)!r} can't be written: {error}") from error
    return run


def _load_blocks(args: TuneArguments, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def _quantize(
    args: TuneArguments,
    training: TuneTrainingArguments,
    config: PeqaConfig,
    run: Path,
    train_blocks: torch.Tensor,
    held_out: torch.Tensor,
) -> dict[str, Any]:
    """Write the packed base, unless it is there already; returns what was measured before tuning."""
    if (run / "before.json").is_file():
        return _read_json(run / "before.json")
    model = load_model(args.model)
    targets = check_targets(PeqaConfig(**_format(config), target_modules="all-linear"), model)
    conv1d = [name for name, module in targets.items() if isinstance(module, Conv1D)]
    if conv1d:
        raise ValueError(
            f"model={args.model!r} has Conv1D layers ({conv1d[0]!r} and others), whose packed weights compressed-tensors "
            "can't store as a base. Tune it from Python: get_peft_model(model, PeqaConfig(...)) takes them."
        )
    packed = all(is_packed(module) for module in targets.values())
    run.mkdir(parents=True, exist_ok=True)
    with written_whole(run / "config.yaml") as path:
        path.write_text(yaml.safe_dump(_arguments(args, training)), encoding="utf-8")
    float_bytes = _float_bytes(model)
    before = None if packed else perplexity(model, held_out, progressbar=True)
    start = time.perf_counter()
    if not packed and config.init_method == "calibrated":
        model = calibrate(model, config, train_blocks[-args.calibration_blocks :].split(4))
    base = get_peft_model(model, copy.deepcopy(config)).unload()
    seconds = time.perf_counter() - start
    quantized = perplexity(base, held_out, progressbar=True)
    with written_whole(run / "base") as folder:
        base.save_pretrained(folder)
        load_tokenizer(args.model).save_pretrained(folder)
    measured = {
        "perplexity": {"float": before, "quantized": quantized},
        "bytes": {"float_model": float_bytes},
        "seconds": {"quantize": seconds},
    }
    write_json(run / "before.json", measured)
    return measured


def _train(config: PeqaConfig, training: TuneTrainingArguments, run: Path, blocks: torch.Tensor) -> Trainer:
    """Tune the packed base with transformers' Trainer, from the last checkpoint if there is one."""
    base = load_model(str(run / "base"))
    model = get_peft_model(base, config)
    checkpoints = run / "checkpoints"
    training.output_dir = str(checkpoints)
    trainer = Trainer(model=model, args=training, train_dataset=[{"input_ids": b, "labels": b} for b in blocks])
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return trainer


def _finish(
    trainer: Trainer, args: TuneArguments, run: Path, held_out: torch.Tensor, before: dict[str, Any]
) -> dict[str, Any]:
    """Measure, and write what makes the run complete: adapter, loss curve, and last the metrics."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    tuned = perplexity(model, held_out, progressbar=True)
    with written_whole(run / "adapter") as folder:
        model.save_pretrained(folder)
    history = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    runtime = next((e["train_runtime"] for e in reversed(trainer.state.log_history) if "train_runtime" in e), 0.0)
    with written_whole(run / "loss.png") as path:
        _plot(history, path)
    metrics = {
        "model": args.model,
        "data": args.data,
        "bits": args.bits,
        "group_size": args.group_size,
        "perplexity": {**before["perplexity"], "tuned": tuned},
        "bytes": {
            **before["bytes"],
            "packed_base": _file_bytes(run / "base"),
            "adapter": _file_bytes(run / "adapter"),
        },
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "losses": history,
        "seconds": {**before["seconds"], "train": runtime},
    }
    write_json(run / "metrics.json", metrics)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return metrics


def _plot(history: list[tuple[int, float]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the loss curve needs: pip install 'peft-ext[cli]'") from error
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_subplot(xlabel="step", ylabel="training loss")
    axes.plot([step for step, _ in history], [loss for _, loss in history], marker=".")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _arguments(args: TuneArguments, training: TuneTrainingArguments) -> dict[str, Any]:
    """What the run's result depends on, and a second run must repeat."""
    names = (
        "learning_rate",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_steps",
        "num_train_epochs",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "seed",
        "bf16",
        "fp16",
        "gradient_checkpointing",
    )
    values = {name: getattr(training, name) for name in names}
    plain = {name: getattr(value, "value", value) for name, value in values.items()}
    return {**asdict(args), **plain}


def _format(config: PeqaConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("bits", "group_size", "sym")}


def _float_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model with every packed layer as floats of its scale's dtype."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    inside = {id(p) for layer in packed for p in layer.parameters()}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    return rest + sum(layer.in_features * layer.out_features * layer.scale.element_size() for layer in packed)


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _number(value: Optional[float]) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 and math.isfinite(value) else f"{value:.2f}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
