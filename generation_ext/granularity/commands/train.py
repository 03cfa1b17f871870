# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`train`: a paraphrase model from pairs of texts, in a run folder.

config.yaml    the arguments
tokenizer/     trained on the pairs
checkpoint-*   Trainer's, while it runs
model/         model and tokenizer, for `from_pretrained`
metrics.json   what was measured; there once the run is complete

Started again with the same arguments, a run goes on where it was stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from transformers import AutoTokenizer, Seq2SeqTrainingArguments, set_seed

from generation_ext.columns import DataArguments
from generation_ext.granularity.commands.arguments import read_texts
from generation_ext.granularity.modeling import CDNPGConfig, CDNPGForConditionalGeneration
from generation_ext.granularity.tokenizer import train_tokenizer
from generation_ext.granularity.training import paraphrase_trainer
from peft_ext import devices, trainer_checkpoints
from peft_ext.command_line import note, parse, show
from peft_ext.files import written_whole
from peft_ext.model_card import note_measured
from peft_ext.runs import RunFolder, drop_checkpoints


PLAIN = "none"


@dataclass
class TrainArguments(DataArguments):
    """Arguments of `train`; the sizes are the paper's."""

    output_dir: Optional[str] = field(default=None, metadata={"help": "Run folder."})
    validation: Optional[str] = field(
        default=None, metadata={"help": "Pairs to measure the loss on; the last twentieth of the data by default."}
    )
    mode: str = field(default="R*S", metadata={"help": "R, S, R*S, R+S, or none: a plain Transformer."})
    placement: str = field(default="before", metadata={"help": "before or after the softmax."})
    hidden_size: int = field(default=450, metadata={"help": "Width."})
    layers: int = field(default=3, metadata={"help": "Of encoder and decoder each."})
    heads: int = field(default=9, metadata={"help": "Of attention."})
    ffn_size: int = field(default=1024, metadata={"help": "Width of the feed-forward layers."})
    dropout: float = field(default=0.1, metadata={"help": "Everywhere."})
    max_length: int = field(default=20, metadata={"help": "Most tokens of a text; longer ones are cut."})
    tokenizer: str = field(default="wordpiece", metadata={"help": "wordpiece or bpe, trained on the pairs."})
    vocab_size: int = field(default=8000, metadata={"help": "Most tokens."})
    max_steps: int = field(default=100_000, metadata={"help": "Steps of training."})
    batch_size: int = field(default=32, metadata={"help": "Pairs per step."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak, after the warm-up; it falls linearly."})
    warmup_steps: int = field(default=5000, metadata={"help": "Steps to the peak."})
    eval_steps: int = field(
        default=5000, metadata={"help": "Steps between checkpoints and validations; the best is kept."}
    )
    device: Optional[str] = field(default=None, metadata={"help": devices.HELP})
    seed: int = field(default=0, metadata={"help": "Of weights and order."})
    report_to: str = field(default="none", metadata={"help": "Where to report to."})


def main(argv: Sequence[str]) -> None:
    """Check everything, train, save."""
    (args,) = parse(argv, TrainArguments)
    run_folder = RunFolder(args.output_dir)
    free = ("output_dir", "device")
    run, settings = run_folder.folder, {name: value for name, value in asdict(args).items() if name not in free}
    finished = run_folder.check(settings)
    if finished is not None:
        note(f"{run} is finished already; its figures:")
        show(finished, json.dumps(finished))
        return
    pairs = read_texts(args.data, "data", ("source", "target"), args)
    if args.validation:
        held_out = read_texts(args.validation, "validation", ("source", "target"), args)
    else:
        count = max(1, len(pairs) // 20)
        pairs, held_out = pairs[:-count], pairs[-count:]
    if not pairs:
        raise ValueError(f"data={args.data!r} has too few pairs; at least two are needed.")
    _config(args, args.vocab_size)  # refuses before anything is written
    training = _training(args, run)
    run_folder.start(settings)
    tokenizer = _tokenizer(args, run, pairs)
    set_seed(args.seed)
    model = CDNPGForConditionalGeneration(_config(args, len(tokenizer)))
    trainer = paraphrase_trainer(model, tokenizer, training, pairs, held_out)
    trainer_checkpoints.train(trainer)
    metrics = {**trainer.evaluate(), "steps": trainer.state.global_step, "parameters": model.num_parameters()}
    note_measured(model, f"loss on {len(held_out)} held-out pairs", trained=metrics["eval_loss"])
    with written_whole(run / "model") as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    run_folder.finish(metrics)
    drop_checkpoints(run)
    show(
        metrics,
        f"validation loss {metrics['eval_loss']:.3f} after {metrics['steps']} steps; the model is in {run / 'model'}",
    )
    note(f"Next: peft-ext paraphrase paraphrase {run} --texts 'how do i learn to swim'")


def _config(args: TrainArguments, vocab_size: int) -> CDNPGConfig:
    config = CDNPGConfig(
        vocab_size=vocab_size,
        max_position_embeddings=args.max_length,
        d_model=args.hidden_size,
        encoder_layers=args.layers,
        decoder_layers=args.layers,
        encoder_attention_heads=args.heads,
        decoder_attention_heads=args.heads,
        encoder_ffn_dim=args.ffn_size,
        decoder_ffn_dim=args.ffn_size,
        dropout=args.dropout,
        attention_dropout=args.dropout,
        granularity_mode=None if args.mode == PLAIN else args.mode,
        granularity_placement=args.placement,
    )
    config.granularity()
    if args.hidden_size % args.heads:
        raise ValueError(f"hidden_size={args.hidden_size} must be a multiple of heads={args.heads}.")
    return config


def _tokenizer(args: TrainArguments, run: Path, pairs: list[dict[str, str]]) -> Any:
    if not (run / "tokenizer").is_dir():
        texts = (pair[name] for pair in pairs for name in ("source", "target"))
        tokenizer = train_tokenizer(texts, args.vocab_size, args.tokenizer, args.max_length)
        with written_whole(run / "tokenizer") as partial:
            tokenizer.save_pretrained(partial)
    return AutoTokenizer.from_pretrained(run / "tokenizer")


def _training(args: TrainArguments, run: Path) -> Seq2SeqTrainingArguments:
    steps = max(1, min(args.eval_steps, args.max_steps))
    training = Seq2SeqTrainingArguments(
        str(run),
        use_cpu=args.device == "cpu",
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=4 * args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=min(args.warmup_steps, args.max_steps // 2),
        weight_decay=0.01,
        eval_strategy="steps",
        eval_steps=steps,
        save_steps=steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        logging_steps=max(1, steps // 10),
        seed=args.seed,
        report_to=args.report_to,
    )
    devices.check_training_device(args.device, training)
    return training
