# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext quantize`: write a packed checkpoint of a model, calibrated on a text, and compare before and after.

With `--distill`, its scales are then trained towards the float model and folded in; what a kill leaves lies beside the output
(`<output_dir>.healing`), and the same command goes on from there.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

from transformers import PreTrainedTokenizerBase

from peft_ext import AlphaTuningConfig, PeqaConfig, devices
from peft_ext.command_line import note, parse, show
from peft_ext.commands.packed_base import (
    BASE,
    PackedBaseArguments,
    average_label,
    file_bytes,
    load_checked,
    number,
    perplexity_of,
    write_base,
)
from peft_ext.commands.run_folder import new_folder
from peft_ext.commands.teaching import TeacherArguments, distilled_in_words, distilled_record
from peft_ext.commands.training_data import ExampleArguments, TrainingData, training_data
from peft_ext.data import PYTHON_DOCS
from peft_ext.distillation.healing import healed
from peft_ext.distillation.loss import Objective
from peft_ext.files import check_folder_writable, write_json, written_whole
from peft_ext.model_card import note_fact, note_measured
from peft_ext.models import copy_processor, load, load_tokenizer
from peft_ext.perplexity import example_perplexity
from peft_ext.runs import RunFolder, read_settings
from peft_ext.scale_tuning.config import ScaleTuningConfig
from peft_ext.tables import mebibytes, pairs


# The tuner's config whose format a checkpoint holds.
FORMATS = {"pack-quantized": PeqaConfig, "bcq": AlphaTuningConfig}


@dataclass
class QuantizeArguments(TeacherArguments, PackedBaseArguments, ExampleArguments):
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
    distill: bool = field(
        default=False,
        metadata={
            "help": "Heal the packed model: train its scales by KL to the float model on these data, then fold them in."
        },
    )
    distill_steps: int = field(default=100, metadata={"help": "Of distill: steps."})
    distill_batch_size: int = field(default=4, metadata={"help": "Of distill: blocks (or examples) of a step."})
    distill_learning_rate: float = field(default=1e-2, metadata={"help": "Of distill: the peak learning rate."})

    def check_distillation(self) -> Objective:
        """What is minimised.

        Raises:
            ValueError: If a value is out of its range, or there is one although nothing is distilled.
        """
        defaults = {each.name: each.default for each in fields(self)}
        for name in ("distill_steps", "distill_batch_size", "distill_learning_rate"):
            if not self.distill and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)} is for distillation; pass --distill, too.")
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        return self.objective(float(self.distill))


def main(argv: Sequence[str]) -> None:
    """Check everything, then quantise, write and compare."""
    (args,) = parse(argv, QuantizeArguments)
    devices.usable(args.device or "cpu")
    config = _config(args)
    objective = args.check_distillation()
    folder = new_folder(args.output_dir)
    args.check_counts()
    needed = max(args.calibration_blocks, args.distill_steps * args.distill_batch_size * args.distill)
    tokenizer = load_tokenizer(args.model)
    data = training_data(args, args, tokenizer, args.held_out, args.seed, needed, args.held_out_blocks)
    for line in data.lines():
        note(line)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if args.distill:
        measured = _heal(args, config, objective, folder, data, tokenizer)
    else:
        model = load_checked(args, config, args.format)
        measured = write_base(model, args, config, folder, data, tokenizer, args.format)
    perplexities, seconds = measured["perplexity"], measured["seconds"]
    rows = [
        ("perplexity, float model", number(perplexities["float"])),
        (f"perplexity, {average_label(args.bits_budget) or f'{config.bits} bits'}", number(perplexities["quantized"])),
        ("float model", mebibytes(measured["bytes"]["float_model"])),
        ("packed checkpoint", mebibytes(file_bytes(folder))),
        ("time to quantise", f"{seconds['quantize']:.0f} s"),
    ]
    if args.distill:
        rows.insert(2, ("perplexity, healed", number(perplexities["healed"])))
        rows.append(("time to heal", f"{seconds['heal']:.0f} s"))
        rows.append(("distilled from", distilled_in_words(measured["distilled"])))
    show({**measured, "output_dir": str(folder), "packed_bytes": file_bytes(folder)}, pairs(rows))
    note(f"\nThe checkpoint is in {folder}. Next: peft-ext generate --model {folder} --prompt '...'")


def _heal(
    args: QuantizeArguments,
    config: ScaleTuningConfig,
    objective: Objective,
    folder: Path,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Quantise, train the scales towards the teacher, write; each part is kept beside the folder until all is done.

    Returns:
        What was measured.
    """
    teacher = args.teacher_of(args.model)
    work = folder.with_name(f"{folder.name}.healing")
    check_folder_writable(work, "output_dir")
    run = RunFolder(work, "settings.json", "complete.json")
    settings = {**asdict(args), "data": args.data or PYTHON_DOCS, "bits": args.width()}
    for name in ("device", "teacher_device", "teacher_logits", "output_dir"):
        del settings[name]
    run.open(settings)
    measured = read_settings(run.path("before.json"))
    if measured is None:
        model = load_checked(args, config, args.format)
        measured = write_base(model, args, config, run.path("base"), data, tokenizer, args.format)
        del model
        write_json(run.path("before.json"), measured)
    examples = data.train.examples[: args.distill_steps * args.distill_batch_size]
    student, seconds = healed(
        load(str(run.path("base"))),
        type(config),
        examples,
        run.path("checkpoints"),
        tokenizer=tokenizer,
        steps=args.distill_steps,
        batch_size=args.distill_batch_size,
        learning_rate=args.distill_learning_rate,
        seed=args.seed,
        device=args.device,
        distillation=args.options(objective, teacher),
    )
    held_out = data.held_out.examples
    value = example_perplexity(student, held_out, progressbar=True)
    figures = {
        "float": measured["perplexity"]["float"],
        "packed": measured["perplexity"]["quantized"],
        "healed": value,
    }
    record = distilled_record(objective, teacher, args.distill_steps)
    student.name_or_path = student.config._name_or_path = args.model  # what it was made from, as of the packed one
    # a folder's place is its owner's business
    student.config.distilled = {**record, "teacher": None if teacher is None else Path(teacher).name}
    note_measured(
        student, perplexity_of(args, held_out), **{name: each for name, each in figures.items() if each is not None}
    )
    note_fact(student, "distilled from", distilled_in_words(record))
    with written_whole(folder) as partial:
        tokenizer.save_pretrained(partial)
        student.save_pretrained(partial)
        copy_processor(args.model, partial)
    run.finish({"output_dir": str(folder)})
    shutil.rmtree(work, ignore_errors=True)
    return {
        "perplexity": {**measured["perplexity"], "healed": value},
        "bytes": measured["bytes"],
        "seconds": {**measured["seconds"], "heal": seconds},
        "distilled": record,
    }


def _config(args: QuantizeArguments) -> ScaleTuningConfig:
    if args.format not in FORMATS:
        raise ValueError(f"format={args.format!r} is unknown; choose one of {tuple(FORMATS)}.")
    if args.sym and args.format == "bcq":
        raise ValueError("sym=True is for integers (format='pack-quantized'); a binary coding is symmetric anyway.")
    if args.zero == "float" and args.format == "pack-quantized":
        raise ValueError(
            f"zero={args.zero!r}: format='pack-quantized' has no room for float zero points; pass --format bcq, or --zero int."
        )
    bits = args.width()
    if bits == BASE:
        raise ValueError(f"model={args.model!r} is packed already; name a float model, or its width with --bits.")
    common: dict[str, Any] = {**args.widths(), "group_size": args.group_size, "init_method": args.init_method}
    if args.format == "pack-quantized" or args.zero not in (None, "int"):
        return PeqaConfig(**common, sym=args.sym, zero=args.zero)
    return AlphaTuningConfig(**common)
