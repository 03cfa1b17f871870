# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""One model of `benchmarks.paraphrase`, trained from scratch or from another's weights, in a folder that is written once."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    EarlyStoppingCallback,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)

from benchmarks.core.run import Run
from generation_ext.granularity import CDNPGConfig, CDNPGForConditionalGeneration
from generation_ext.granularity.training import paraphrase_trainer
from peft_ext import trainer_checkpoints
from peft_ext.files import write_json, written_whole


Pairs = Sequence[Mapping[str, str]]
RECORD = "training.json"
SECONDS = "seconds.json"  # CPU seconds up to a checkpoint, beside its weights


def train_model(
    run: Run,
    mode: Optional[str],
    seed: int,
    tokenizer: Any,
    pairs: Mapping[str, Pairs],
    folder: Path,
    start: Optional[Path] = None,
) -> None:
    """Train, and write model and `training.json` (CPU seconds, losses, parameters) into a folder.

    With the setting `eval_every`, training is validated and kept every so many steps: the weights are those of the lowest
    validation loss (as the paper's), and a run that was killed goes on. Without it they are the last ones.

    Args:
        run: Says sizes and steps.
        mode: Of granularity; None: a plain Transformer.
        seed: Of weights and order.
        tokenizer: Of both sides.
        pairs: `train` and `validation`.
        folder: Where to.
        start: A trained model's folder to go on from, for `transfer_steps`; None: from scratch.
    """
    settings = run.settings
    wanted = run.steps if start is None else run.transfer_steps
    steps = max(1, min(wanted, run.epochs * len(pairs["train"]) // run.batch))
    every = settings.get("eval_every")
    working = Path(f"{folder}-training")
    set_seed(seed)
    model = _model(run, mode, len(tokenizer)) if start is None else AutoModelForSeq2SeqLM.from_pretrained(start)
    if settings.get("attention"):
        model.set_attn_implementation(settings["attention"])
    schedule: dict[str, Any] = {"save_strategy": "no"}
    if every:
        every = max(1, min(every, steps))
        schedule = {
            "eval_strategy": "steps",
            "eval_steps": every,
            "save_steps": every,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
        }
    args = Seq2SeqTrainingArguments(
        str(working),
        max_steps=steps,
        per_device_train_batch_size=run.batch,
        per_device_eval_batch_size=128,
        train_sampling_strategy="group_by_length",
        learning_rate=run.learning_rate,
        warmup_steps=settings.get("warmup", steps // 10) if start is None else steps // 10,
        weight_decay=0.01,
        label_smoothing_factor=0.0,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,  # the weights stay in float32
        seed=seed,
        **schedule,
    )
    trainer = paraphrase_trainer(model, tokenizer, args, pairs["train"], pairs["validation"])
    clock = Clock()
    trainer.add_callback(clock)
    if every:
        if settings.get("patience"):
            trainer.add_callback(EarlyStoppingCallback(settings["patience"]))
        trainer_checkpoints.train(trainer)
    else:
        trainer.train()
    record = {
        "seconds": clock.seconds,
        "loss": trainer.evaluate()["eval_loss"],
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
    }
    if every:
        record["losses"] = [
            [entry["step"], entry["eval_loss"]] for entry in trainer.state.log_history if "eval_loss" in entry
        ][:-1]  # the last is the chosen one's
    with written_whole(folder) as partial:
        model.save_pretrained(partial)
        (partial / RECORD).write_text(json.dumps(record), encoding="utf-8")
    shutil.rmtree(working, ignore_errors=True)


def _model(run: Run, mode: Optional[str], vocabulary: int) -> CDNPGForConditionalGeneration:
    return CDNPGForConditionalGeneration(
        CDNPGConfig(
            vocab_size=vocabulary,
            d_model=run.hidden,
            encoder_ffn_dim=run.ffn,
            decoder_ffn_dim=run.ffn,
            encoder_attention_heads=run.settings.get("heads", 9),
            decoder_attention_heads=run.settings.get("heads", 9),
            max_position_embeddings=run.max_length,
            dropout=run.dropout,
            attention_dropout=0.0,
            granularity_mode=mode,
            initial_granularity=run.settings.get("initial", 0.5),
            granularity_cross_attention=run.settings.get("cross_attention", True),
        )
    )


class Clock(TrainerCallback):
    """CPU seconds of a training, those before a kill included.

    Attributes:
        seconds: So far.
    """

    def __init__(self) -> None:
        self.seconds, self.since = 0.0, time.process_time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the checkpoint's."""
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / SECONDS
        self.seconds = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else 0.0
        self.since = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count."""
        now = time.process_time()
        self.seconds, self.since = self.seconds + now - self.since, now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Validation is not training."""
        self.since = time.process_time()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Beside the weights."""
        write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / SECONDS, self.seconds)
        self.since = time.process_time()
