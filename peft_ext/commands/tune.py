# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext tune`: quantise, tune, compare; writes a run folder and goes on after a kill.

The packed base is written first, then tuned: whatever happens later, `base/` is a checkpoint that stock transformers
loads. Started again with the same arguments, a run continues from its last checkpoint, and a finished one only prints
its table.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.command_line import parse
from peft_ext.commands.packed_base import (
    PackedBaseArguments,
    file_bytes,
    load_blocks,
    load_checked,
    number,
    write_base,
)
from peft_ext.files import write_json, written_whole
from peft_ext.models import load
from peft_ext.perplexity import perplexity
from peft_ext.runs import RunFolder, last_checkpoint, read_settings
from peft_ext.scale_tuning.config import ScaleTuningConfig
from peft_ext.tables import mebibytes, pairs


METHODS = {"peqa": PeqaConfig, "alphatuning": AlphaTuningConfig}


@dataclass
class TuneArguments(PackedBaseArguments):
    """What to tune, on which text, by which method."""

    method: str = field(
        default="peqa", metadata={"help": "peqa (integers, scales trained) or alphatuning (binary codings, alphas)."}
    )
    trained_alphas: str = field(
        default="first", metadata={"help": "Of alphatuning: train the first alpha of a channel (group), or all."}
    )


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
        if getattr(self.eval_strategy, "value", self.eval_strategy) != "no":
            raise ValueError(
                f"eval_strategy={self.eval_strategy!r}: tune measures held-out perplexity before and after; leave it out."
            )
        super().__post_init__()


def main(argv: Sequence[str]) -> None:
    """Check everything, then quantise, tune and compare."""
    args, training = parse(argv, TuneArguments, TuneTrainingArguments)
    config = _config(args)
    # of several processes, the others look at the run folder once the first has written the base
    with training.main_process_first(desc="quantising the base"):
        run_folder = RunFolder(training.output_dir)
        run, settings = run_folder.folder, _arguments(args, training)
        finished = run_folder.check(settings)
        if finished is not None:
            print(f"{run} is finished already; its figures:")
            print(table(finished))
            return
        train_blocks, held_out = load_blocks(args, training.seed)
        before = _quantize(args, config, run_folder, settings, train_blocks, held_out)
    trainer = _train(config, training, run, train_blocks)
    if trainer.is_world_process_zero():
        metrics = _finish(trainer, args, run_folder, held_out, before)
        print(table(metrics))
        print(f"\nThe run is in {run}. Next: peft-ext generate {run} --prompt '...'")


def _config(args: TuneArguments) -> ScaleTuningConfig:
    if args.method not in METHODS:
        raise ValueError(f"method={args.method!r} is unknown; choose one of {tuple(METHODS)}.")
    common = {name: getattr(args, name) for name in ("bits", "group_size", "init_method")}
    if args.method == "peqa":
        return PeqaConfig(**common, sym=args.sym, task_type="CAUSAL_LM")
    if args.sym:
        raise ValueError("sym=True is for integers (method='peqa'); a binary coding is symmetric anyway.")
    return AlphaTuningConfig(**common, trained_alphas=args.trained_alphas, task_type="CAUSAL_LM")


def table(metrics: dict[str, Any]) -> str:
    """The figures of a run, as text."""
    perplexities, sizes, seconds = metrics["perplexity"], metrics["bytes"], metrics["seconds"]
    rows = [
        ("perplexity, float model", number(perplexities["float"])),
        (f"perplexity, {metrics['bits']} bits", number(perplexities["quantized"])),
        ("perplexity, tuned", number(perplexities["tuned"])),
        ("float model", mebibytes(sizes["float_model"])),
        ("packed base", mebibytes(sizes["packed_base"])),
        ("adapter", mebibytes(sizes["adapter"])),
        ("trained parameters", f"{metrics['trained_parameters']:,}"),
        ("time to quantise", f"{seconds['quantize']:.0f} s"),
        ("time to tune", f"{seconds['train']:.0f} s, {metrics['steps']} steps"),
    ]
    return pairs(rows)


def _quantize(
    args: TuneArguments,
    config: ScaleTuningConfig,
    run_folder: RunFolder,
    settings: dict[str, Any],
    train_blocks: torch.Tensor,
    held_out: torch.Tensor,
) -> dict[str, Any]:
    """Write the packed base, unless it is there already; returns what was measured before tuning."""
    measured = read_settings(run_folder.path("before.json"))
    if measured is None:
        model = load_checked(args, config)
        run_folder.start(settings)
        measured = write_base(model, args, config, run_folder.path("base"), train_blocks, held_out)
        write_json(run_folder.path("before.json"), measured)
    return measured


def _train(config: ScaleTuningConfig, training: TuneTrainingArguments, run: Path, blocks: torch.Tensor) -> Trainer:
    """Tune the packed base with transformers' Trainer, from the last checkpoint if there is one."""
    base = load(str(run / "base"))
    model = get_peft_model(base, config)
    checkpoints = run / "checkpoints"
    training.output_dir = str(checkpoints)
    trainer = Trainer(model=model, args=training, train_dataset=[{"input_ids": b, "labels": b} for b in blocks])
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    return trainer


def _finish(
    trainer: Trainer, args: TuneArguments, run_folder: RunFolder, held_out: torch.Tensor, before: dict[str, Any]
) -> dict[str, Any]:
    """Measure, and write what makes the run complete: adapter, loss curve, and last the metrics."""
    run = run_folder.folder
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
        "method": args.method,
        "bits": args.bits,
        "group_size": args.group_size,
        "perplexity": {**before["perplexity"], "tuned": tuned},
        "bytes": {
            **before["bytes"],
            "packed_base": file_bytes(run / "base"),
            "adapter": file_bytes(run / "adapter"),
        },
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "losses": history,
        "seconds": {**before["seconds"], "train": runtime},
    }
    run_folder.finish(metrics)
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
    return {**asdict(args), **{name: getattr(training, name) for name in names}}
