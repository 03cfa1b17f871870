# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext tune`: quantise, tune, compare; writes a run folder and goes on after a kill.

With `--recipe adapt-pack-heal`, LoRA is trained on the float model first and merged (`adapted/`); that is packed, and its
scales are tuned towards it.

The packed base is written first, then tuned: whatever happens later, `base/` is a checkpoint that stock transformers
loads. Started again with the same arguments, a run continues from its last checkpoint, and a finished one only prints
its table.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Optional, Union

from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTTrainer

from peft_ext import AlphaTuningConfig, PeqaConfig, trainer_checkpoints
from peft_ext.command_line import BATCH_SIZE, note, parse, show
from peft_ext.commands.packed_base import (
    BASE,
    MIXED,
    PackedBaseArguments,
    file_bytes,
    load_checked,
    perplexity_of,
    write_base,
)
from peft_ext.commands.sft import TuneTrainingArguments, check_packing, keep_product_where_needed, sft_trainer
from peft_ext.commands.teaching import TeacherArguments, distilled_in_words, distilled_record
from peft_ext.commands.training_data import TrainingData, training_data
from peft_ext.commands.tune_report import plot_losses, plot_widths, table
from peft_ext.data import PYTHON_DOCS
from peft_ext.distillation.trainer import check_no_other_loss
from peft_ext.files import write_json, written_whole
from peft_ext.model_card import note_fact, note_measured, write_card
from peft_ext.models import copy_processor, load, load_tokenizer
from peft_ext.packed_cards import adapter_card
from peft_ext.peqa.config import TRAINED
from peft_ext.perplexity import example_perplexity
from peft_ext.quant.conversion import packed_layers
from peft_ext.runs import RunFolder, read_settings
from peft_ext.scale_tuning.bit_budget import write_widths
from peft_ext.scale_tuning.config import ScaleTuningConfig
from peft_ext.scale_tuning.model import check_targets
from peft_ext.tables import mebibytes


METHODS = ("peqa", "alphatuning", "lora")
LEARNING_RATES = {"peqa": 1e-2, "alphatuning": 1e-2, "lora": 2e-4}
ADAPT_PACK_HEAL = "adapt-pack-heal"
RECIPES = (ADAPT_PACK_HEAL,)
# Folders in a run's, until it is complete.
CHECKPOINTS, ADAPT_CHECKPOINTS = "checkpoints", "adapt_checkpoints"
# Weight of the divergence under a recipe that heals, unless one is named.
_HEALING = 0.5


@dataclass
class TuneArguments(TeacherArguments, PackedBaseArguments):
    """What to tune, on which data, by which method."""

    method: str = field(
        default="peqa",
        metadata={
            "help": "peqa (integers, scales trained), alphatuning (binary codings, alphas) or lora (integers, PEFT's LoRA "
            "beside them)."
        },
    )
    trained: str = field(
        default="scales", metadata={"help": f"Of peqa: train {' or '.join(TRAINED)}, which doubles what is trained."}
    )
    trained_alphas: str = field(
        default="first", metadata={"help": "Of alphatuning: train the first alpha of a channel (group), or all."}
    )
    lora_r: int = field(default=16, metadata={"help": "Of lora and of adapting: the rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Of lora and of adapting: alpha."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Of lora and of adapting: dropout."})
    lora_target_modules: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Of lora and of adapting: names of the layers; all linear ones but the output by default."},
    )
    distill: Optional[float] = field(
        default=None,
        metadata={
            "help": "Weight of KL(teacher || student), from 0 (the default) to 1; the cross-entropy has the rest. The teacher "
            "is the model before packing, unless --teacher names another."
        },
    )
    recipe: Optional[str] = field(
        default=None,
        metadata={
            "help": f"{ADAPT_PACK_HEAL}: LoRA on the float model, merged, calibrated on these data, then the scales tuned "
            f"towards the merged float model (--distill {_HEALING} by default)."
        },
    )
    adapt_steps: Optional[int] = field(
        default=None, metadata={"help": f"Of {ADAPT_PACK_HEAL}: steps of LoRA; as many as max_steps by default."}
    )
    adapt_learning_rate: float = field(
        default=LEARNING_RATES["lora"], metadata={"help": f"Of {ADAPT_PACK_HEAL}: LoRA's peak learning rate."}
    )

    def weight(self) -> float:
        """Of the divergence."""
        if self.distill is None:
            return _HEALING if self.recipe == ADAPT_PACK_HEAL else 0.0
        return self.distill

    def width(self) -> Union[int, str]:
        """As of every packed base; a GGUF's own integers are tuned where no format is asked for, and method and recipe can."""
        takes_integers = self.method != "alphatuning" and self.recipe is None
        return BASE if takes_integers and self.keeps_integers() else super().width()


def main(argv: Sequence[str]) -> None:
    """Check everything, then quantise, tune and compare."""
    args, training = parse(argv, TuneArguments, TuneTrainingArguments, aliases=BATCH_SIZE)
    if training.dataset_text_field != "text":  # TRL's name
        args.text_field = training.dataset_text_field
    run_folder = RunFolder(training.output_dir)
    settings = _settings(args, training, run_folder.settings)
    training.learning_rate, args.bits = settings["learning_rate"], str(settings["bits"])
    _config(args)  # refuses what can't be, before any work
    args.check_base_format()
    _check_recipe(args)
    _check_lora(args)
    objective = args.objective(args.weight())
    if objective.distill:
        check_no_other_loss(training)
    teacher: Optional[str] = None
    # of several processes, the others look at the run folder once the first has written the base
    with training.main_process_first(desc="quantising the base"):
        run = run_folder.folder
        finished = run_folder.check(settings)
        if finished is not None:
            _drop_checkpoints(run)  # a kill right behind the result leaves them
            note(f"{run} is finished already; its figures:")
            show(finished, table(finished))
            return
        args.check_counts()
        if objective.distill and (args.teacher is not None or not args.recipe):
            teacher = args.teacher_of(args.model)
        tokenizer = _tokenizer(args.model, training.eos_token)
        data = training_data(
            args, training, tokenizer, args.held_out, training.seed, _needed(args, training), args.held_out_blocks
        )
        if training.process_index == 0:
            for line in data.lines():
                note(line)
        if args.recipe:
            run_folder.start(settings)
    adapted = None
    if args.recipe:
        adapted = _adapt(args, training, run_folder, data, tokenizer)
        args = replace(args, model=adapted["model"], dtype="auto")
        if objective.distill:
            teacher = args.teacher_of(args.model)
    with training.main_process_first(desc="quantising the base"):
        before = _quantize(args, training, run_folder, None if args.recipe else settings, data, tokenizer)
    distillation = args.options(objective, teacher) if objective.distill else None
    trainer = _train(args, training, run, data, tokenizer, distillation)
    if trainer.is_world_process_zero():
        if adapted is not None:
            before["perplexity"]["untouched"] = adapted["perplexity"]
            before["bytes"]["adapted_model"] = adapted["bytes"]
            before["seconds"]["adapt"] = adapted["seconds"]
        distilled = None
        if objective.distill:
            distilled = distilled_record(objective, teacher, trainer.state.global_step)
            if args.teacher_logits is not None:
                before["bytes"]["teacher_logits"] = file_bytes(Path(args.teacher_logits).expanduser())
        metrics = _finish(trainer, args, run_folder, data, before, distilled, settings["model"])
        show(metrics, table(metrics))
        chat = " --chat" if tokenizer.chat_template and not data.blocks else ""
        note(f"\nThe run is in {run}. Next: peft-ext generate {run}{chat} --prompt '...'")


def _config(args: TuneArguments, base: Optional[PreTrainedModel] = None) -> Optional[ScaleTuningConfig]:
    """What to quantise to; of a packed base that stays as it is, what its layers have (None: that isn't known yet)."""
    if args.method not in METHODS:
        raise ValueError(f"method={args.method!r} is unknown; choose one of {METHODS}.")
    bits: Union[int, str] = args.width()
    if args.sym and args.method == "alphatuning":
        raise ValueError("sym=True is for integers (method='peqa'); a binary coding is symmetric anyway.")
    if args.zero not in (None, "int") and args.method == "alphatuning":
        raise ValueError(f"zero={args.zero!r} is for integers (method='peqa'); a binary coding has no zero points.")
    if args.trained != "scales" and args.method != "peqa":
        raise ValueError(f"trained={args.trained!r} is for method='peqa', not {args.method!r}; leave it out.")
    common: dict[str, Any] = {**args.widths(), "group_size": args.group_size, "init_method": args.init_method}
    integers: dict[str, Any] = {"sym": args.sym, "zero": args.zero}
    if bits == BASE:
        if base is None:
            return None
        common, integers = {"bits": BASE, "target_modules": list(packed_layers(base))}, {}
    if args.method == "alphatuning":
        config: ScaleTuningConfig = AlphaTuningConfig(
            **common, trained_alphas=args.trained_alphas, task_type="CAUSAL_LM"
        )
    else:
        config = PeqaConfig(**common, **integers, trained=args.trained, task_type="CAUSAL_LM")
    widths = {} if base is None else {name: layer.bits for name, layer in packed_layers(base).items()}
    if bits == MIXED and widths and base is not None:  # chosen already
        write_widths(config, widths, base)
    if bits == BASE and base is not None:
        check_targets(config, base)
    return config


def _adapter(args: TuneArguments, base: PreTrainedModel) -> PeftConfig:
    """What to put onto the packed base."""
    if args.method != "lora":
        config = _config(args, base)
        assert config is not None
        return config
    return _lora_config(args, base)


def _lora_config(args: TuneArguments, base: PreTrainedModel) -> LoraConfig:
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=_lora_targets(args, base),
        task_type="CAUSAL_LM",
    )


def _check_recipe(args: TuneArguments) -> None:
    """Refuse a recipe that there isn't, what it can't start from, and its flags without it."""
    if args.recipe is None:
        for name in ("adapt_steps", "adapt_learning_rate"):
            if getattr(args, name) != next(each.default for each in fields(args) if each.name == name):
                raise ValueError(f"{name}={getattr(args, name)} is for --recipe {ADAPT_PACK_HEAL}; leave it out.")
        return
    if args.recipe not in RECIPES:
        raise ValueError(f"recipe={args.recipe!r} is unknown; choose {' or '.join(RECIPES)}.")
    if args.method == "lora":
        raise ValueError(f"recipe={args.recipe!r} tunes scales in the end; pass --method peqa or alphatuning.")
    if args.width() == BASE:
        raise ValueError(
            f"recipe={args.recipe!r} starts from a float model, and model={args.model!r} is packed already."
        )
    if args.adapt_steps is not None and args.adapt_steps < 1:
        raise ValueError(f"adapt_steps={args.adapt_steps} must be at least 1.")


def _check_lora(args: TuneArguments, model: Optional[PreTrainedModel] = None) -> None:
    """Refuse settings of LoRA beside another method; and, of a model, targets that it hasn't."""
    lora = [each for each in fields(args) if each.name.startswith("lora_")]
    changed = [each.name for each in lora if getattr(args, each.name) != each.default]
    if changed and args.method != "lora" and args.recipe is None:
        raise ValueError(f"{changed[0]}={getattr(args, changed[0])!r} is for method='lora'; leave it out.")
    trains_lora = args.method == "lora" or args.recipe is not None
    if model is None or not trains_lora or args.lora_target_modules in (None, ["all-linear"]):
        return
    names = [name for name, _ in model.named_modules()]
    for target in args.lora_target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"lora_target_modules={args.lora_target_modules}: the model has no module {target!r}.")


def _lora_targets(args: TuneArguments, base: PreTrainedModel) -> Union[str, list[str]]:
    if args.lora_target_modules == ["all-linear"]:
        return "all-linear"
    # the towers of a multimodal model stay as they are, since the data are texts
    multimodal = base.config.get_text_config() is not base.config
    packed = list(packed_layers(base))
    if multimodal and not packed:
        packed = list(check_targets(PeqaConfig(init_method="minmax"), base))
    return args.lora_target_modules or (packed if multimodal else "all-linear")


def _needed(args: TuneArguments, training: TuneTrainingArguments) -> Optional[int]:
    """How many training examples the steps and the calibration take; None: all, in epochs."""
    if training.max_steps < 1:
        return None
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    return max(max(training.max_steps, args.adapt_steps or 0) * batch, args.calibration_blocks)


def _tokenizer(model: str, eos_token: Optional[str]) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(model)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token={eos_token!r} isn't in the tokenizer's vocabulary.")
        tokenizer.eos_token = eos_token
    return tokenizer


def _quantize(
    args: TuneArguments,
    training: TuneTrainingArguments,
    run_folder: RunFolder,
    settings: Optional[dict[str, Any]],
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Write the packed base, unless it is there already; returns what was measured before tuning. Without settings, the run has
    been started."""
    measured = read_settings(run_folder.path("before.json"))
    if measured is None:
        config = _config(args)
        model = load_checked(args, config)
        _adapter(args, model)  # a base that it doesn't suit is refused before it is written
        _check_lora(args, model)
        check_packing(model, training, data.train)
        if settings is not None:
            run_folder.start(settings)
        measured = write_base(model, args, config, run_folder.path("base"), data, tokenizer)
        write_json(run_folder.path("before.json"), measured)
    elif settings is not None:
        run_folder.start(settings)
    return measured


def _adapt(
    args: TuneArguments,
    training: TuneTrainingArguments,
    run_folder: RunFolder,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """LoRA on the float model, merged into it and written to `adapted/`, unless that is there already.

    Returns:
        `model`: the folder; `perplexity` of the untouched model on the held-out examples, `bytes`, and `seconds` of training.
    """
    folder, record = run_folder.path("adapted"), run_folder.path("adapted.json")
    measured = read_settings(record)
    if measured is None:
        load_checked(args, _config(args))  # what can't be packed is refused before it is trained
        model = load(args.model, dtype=args.dtype, merge=True).to(args.device or "cpu")
        _check_lora(args, model)
        check_packing(model, training, data.train)
        untouched = example_perplexity(model, data.held_out.examples, progressbar=True)
        set_seed(training.seed)
        own = copy.copy(training)
        own.output_dir = str(run_folder.path(ADAPT_CHECKPOINTS))
        own.learning_rate, own.max_steps = args.adapt_learning_rate, args.adapt_steps or training.max_steps
        start = time.perf_counter()
        trainer = sft_trainer(get_peft_model(model, _lora_config(args, model)), own, data.train, tokenizer)
        trainer_checkpoints.train(trainer)
        seconds = time.perf_counter() - start
        if trainer.is_world_process_zero():
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            with written_whole(folder) as partial:
                tokenizer.save_pretrained(partial)
                merged.save_pretrained(partial)
                copy_processor(args.model, partial)
            measured = {"perplexity": untouched, "bytes": file_bytes(folder), "seconds": seconds}
            write_json(record, measured)
            shutil.rmtree(own.output_dir, ignore_errors=True)
            note(f"LoRA is merged: {folder}, {mebibytes(measured['bytes'])} of floats, which teach; then they may go.")
        trainer.accelerator.wait_for_everyone()
        measured = read_settings(record)
    assert measured is not None
    return {"model": str(folder), **measured}


def _train(
    args: TuneArguments,
    training: TuneTrainingArguments,
    run: Path,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    distillation: Optional[dict[str, Any]],
) -> SFTTrainer:
    """Tune the packed base with TRL's SFTTrainer, from the last checkpoint if there is one."""
    base = load(str(run / "base"))
    set_seed(training.seed)  # LoRA starts from random numbers
    model = get_peft_model(base, _adapter(args, base))
    keep_product_where_needed(model, data.train)
    training.output_dir = str(run / CHECKPOINTS)
    trainer = sft_trainer(model, training, data.train, tokenizer, distillation)
    trainer_checkpoints.train(trainer)
    return trainer


def _finish(
    trainer: SFTTrainer,
    args: TuneArguments,
    run_folder: RunFolder,
    data: TrainingData,
    before: dict[str, Any],
    distilled: Optional[dict[str, Any]],
    named: str,
) -> dict[str, Any]:
    """Measure, and write what makes the run complete: adapter, loss curve, and last the metrics.

    `distilled` is what was distilled from what, if anything was; `named` the model that the user named.
    """
    run = run_folder.folder
    model = trainer.accelerator.unwrap_model(trainer.model)
    held_out = data.held_out.examples
    tuned = example_perplexity(model, held_out, progressbar=True)
    figures = {"float": before["perplexity"]["float"], "packed": before["perplexity"]["quantized"], "tuned": tuned}
    figures = {name: value for name, value in figures.items() if value is not None}
    note_measured(model, perplexity_of(args, held_out), **figures)
    if distilled is not None:
        note_fact(model, "distilled from", distilled_in_words(distilled))
    with written_whole(run / "adapter") as folder:
        model.save_pretrained(folder)
        write_card(adapter_card(model), folder)  # LoRA's, too
    history = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    runtime = next((e["train_runtime"] for e in reversed(trainer.state.log_history) if "train_runtime" in e), 0.0)
    with written_whole(run / "loss.png") as path:
        plot_losses(history, path)
    if "widths" in before:
        with written_whole(run / "bits.png") as path:
            plot_widths(before["widths"], path)
    metrics = {
        "model": named,
        "data": args.data or PYTHON_DOCS,
        "shape": data.held_out.shape,
        "method": args.method,
        "bits": args.width(),
        "group_size": args.group_size,
        "perplexity": {**before["perplexity"], "tuned": tuned},
        "held_out": {"rows": len(held_out), "tokens": sum(example.trained for example in held_out)},
        "bytes": {
            **before["bytes"],
            "packed_base": file_bytes(run / "base"),
            "adapter": file_bytes(run / "adapter"),
        },
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "losses": history,
        "seconds": {**before["seconds"], "train": runtime},
        **({} if distilled is None else {"distilled": distilled}),
        **({"bits_budget": args.bits_budget, "widths": before["widths"]} if "widths" in before else {}),
        **({} if args.recipe is None else {"recipe": args.recipe}),
    }
    run_folder.finish(metrics)
    _drop_checkpoints(run)
    return metrics


def _drop_checkpoints(run: Path) -> None:
    """Of tuning and of adapting."""
    for name in (CHECKPOINTS, ADAPT_CHECKPOINTS):
        shutil.rmtree(run / name, ignore_errors=True)


# Settings of every run; others came later, and a run of an earlier version that lacks one has its default.
_FIRST_SETTINGS = frozenset(
    "bits block_size calibration_blocks data data_config group_size held_out held_out_blocks init_method method model sym "
    "text_field trained_alphas learning_rate per_device_train_batch_size gradient_accumulation_steps max_steps "
    "num_train_epochs lr_scheduler_type warmup_steps weight_decay seed bf16 fp16 gradient_checkpointing".split()
)
_LATER_TRAINING_SETTINGS = (
    "max_length",
    "truncation_mode",
    "packing",
    "packing_strategy",
    "assistant_only_loss",
    "completion_only_loss",
    "chat_template_path",
    "dataset_text_field",
    "eos_token",
    "loss_type",
    "router_aux_loss_coef",
)


def _settings(
    args: TuneArguments, training: TuneTrainingArguments, stored: Optional[dict[str, Any]]
) -> dict[str, Any]:
    """What the run's result depends on, and a second run must repeat.

    Args:
        args: Of the run.
        training: Of the run.
        stored: What the run in the folder was started with, if there is one.
    """
    if args.method not in METHODS:
        raise ValueError(f"method={args.method!r} is unknown; choose one of {METHODS}.")
    settings = asdict(args)
    for name in ("device", "teacher_device"):  # a run may go on elsewhere
        del settings[name]
    settings["teacher_logits"] = None if args.teacher_logits is None else True  # and its folder may move
    settings["data"] = args.data or PYTHON_DOCS
    keeps = args.bits is None and args.bits_budget is None and stored and stored.get("bits", MIXED) != MIXED
    settings["bits"] = stored["bits"] if keeps and stored else args.width()
    names = [field.name for field in fields(training) if field.name in _FIRST_SETTINGS]
    settings.update({name: getattr(training, name) for name in (*names, *_LATER_TRAINING_SETTINGS)})
    if training.learning_rate is None:
        settings["learning_rate"] = LEARNING_RATES[args.method]
    defaults = {each.name: each.default for kind in (type(args), type(training)) for each in fields(kind)}
    return {
        name: value
        for name, value in settings.items()
        if stored is None or name in stored or name in _FIRST_SETTINGS or value != defaults[name]
    }
