# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`train`: a critic from prompts and a reward, in a run folder.

config.yaml    the arguments
rollouts/      the texts that were sampled, with their rewards
critic/        the critic, for `Critic.from_pretrained`
metrics.json   what was measured; there once the run is complete

Started again with the same arguments, a run goes on where it was stopped, and a finished one only prints its table.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Optional, Union

from transformers import set_seed

from generation_ext.critic.commands.arguments import OLD_FLAGS, PromptArguments, load_prompts
from generation_ext.critic.commands.evaluate import positions_table
from generation_ext.critic.commands.reward_arguments import RewardArguments, load_reward
from generation_ext.critic.diagnostics import finite
from generation_ext.critic.reading import AUTO
from generation_ext.critic.rollouts import schedule
from generation_ext.critic.training import CriticConfig, CriticTrainer
from generation_ext.critic.value import Critic
from peft_ext.command_line import BATCH_SIZE, ModelArguments, note, parse, show
from peft_ext.files import written_whole
from peft_ext.model_card import note_measured
from peft_ext.runs import RunFolder, drop_checkpoints, last_checkpoint


_OF_CRITIC = (
    "running_mean",
    "head",
    "mlp_size",
    "lora_rank",
    "action_values",
    "action_form",
    "action_rank",
    "control_codes",
    "prompt_template",
)


@dataclass
class TrainArguments(ModelArguments, PromptArguments, RewardArguments):
    """What to train, on which prompts and which reward."""

    held_out: float = field(
        default=0.2, metadata={"help": "Share of the prompts that the critic is evaluated on instead of trained."}
    )
    layer: str = field(
        default="auto",
        metadata={
            "help": "The layer that the critic reads, or several ('12,18'); -1 is the last; auto: one that training chooses."
        },
    )
    running_mean: bool = field(default=True, metadata={"help": "Read the layer's mean over the text so far, too."})
    head: str = field(default="linear", metadata={"help": "The critic's head: linear or mlp."})
    mlp_size: int = field(default=256, metadata={"help": "Width of an MLP head."})
    lora_rank: int = field(default=0, metadata={"help": "Rank of the critic's own LoRA; 0: none."})
    action_values: bool = field(default=False, metadata={"help": "Train the action-value head, too."})
    action_form: str = field(
        default="affine",
        metadata={"help": "Of the action-value head: affine, or linear, which `critic export` can write as a LoRA."},
    )
    action_rank: int = field(default=0, metadata={"help": "Rank of the action-value head's map; 0: a dense one."})
    control_codes: list[str] = field(
        default_factory=list, metadata={"help": "Attributes, by the names that come before the prompt."}
    )
    prompt_template: str = field(
        default="{code}: {prompt}", metadata={"help": "How a control code comes before a prompt."}
    )


def main(argv: Sequence[str]) -> None:
    """Check everything, then train and evaluate."""
    args, training = parse(argv, TrainArguments, CriticConfig, aliases={**OLD_FLAGS, **BATCH_SIZE})
    run_folder = RunFolder(training.output_dir)
    settings, run = _settings(args, training, run_folder.settings), run_folder.folder
    finished = run_folder.check(settings)
    if finished is not None:
        note(f"{run} is finished already; its figures:")
        show(finished, table(finished))
        return
    prompts, held_out = _split(load_prompts(args), args.held_out, training.seed)
    reward, layer = load_reward(args), layer_of(args.layer)
    args.device = args.device or str(training.device)  # not where Trainer would take it away from again
    model, tokenizer = args.load()
    set_seed(training.seed)
    critic = Critic.for_model(model, layer=layer, **{name: getattr(args, name) for name in _OF_CRITIC})
    training.output_dir = str(run)
    trainer = CriticTrainer(critic, training, model, reward, prompts, held_out, tokenizer)
    with training.main_process_first(desc="writing the arguments"):
        if trainer.is_world_process_zero():
            run_folder.start(settings)
    goes_on = (run / "rollouts" / "settings.json").is_file() or last_checkpoint(run) is not None
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=True if goes_on else None)
    seconds = time.perf_counter() - start
    metrics = _measure(trainer, args, seconds)
    if trainer.is_world_process_zero():
        names = ("explained_variance", "calibration_error")
        figures = {name: metrics["evaluation"].get(f"eval_{name}") for name in names}
        figures = {name.replace("_", " "): value for name, value in figures.items() if value is not None}
        note_measured(critic, "V on roll-outs of held-out prompts", **figures)
        with written_whole(run / "critic") as folder:
            critic.save_pretrained(folder)
        run_folder.finish(finite(metrics))
        drop_checkpoints(run)
        show(finite(metrics), table(metrics))
        note(f"\nThe run is in {run}. Next: peft-ext critic generate {run} --prompt '...' --strength 2")


def layer_of(text: str) -> Union[str, int, list[int]]:
    """`"auto"`, a number or several, as written on the command line.

    Raises:
        ValueError: If it is something else.
    """
    if text == AUTO:
        return text
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"layer={text!r} must be 'auto', a number, or several ('12,18').") from error
    return layers[0] if len(layers) == 1 else layers


def table(metrics: dict[str, Any]) -> str:
    """The figures of a run by position, as text."""
    layers = ", ".join(f"{index}: {explained:.2f}" for index, explained in metrics.get("layers", {}).items())
    chosen = f"\n\nExplained variance by layer, before the fit: {layers}." if layers else ""
    return (
        f"{positions_table(metrics['positions'])}{chosen}\n\n{metrics['steps']} steps in {metrics['seconds']:.0f} s."
    )


def _split(rows: list[dict[str, Any]], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Prompts to train and to evaluate on; both are all of them if there is only one."""
    if not 0 < share < 1:
        raise ValueError(f"held_out={share} must be between 0 and 1.")
    if len(rows) == 1:
        return rows, rows
    mixed = schedule(rows, [], len(rows), seed)
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    return mixed[count:], mixed[:count]


def _measure(trainer: CriticTrainer, args: TrainArguments, seconds: float) -> dict[str, Any]:
    evaluation = trainer.evaluate()
    layers = trainer.layers_explained
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "reward_mean" in entry]
    return {
        "model": args.model,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "evaluation": evaluation,
        "positions": trainer.evaluate_positions(),
        **({"layers": {str(index): explained for index, explained in layers.items()}} if layers else {}),
        "history": history,
    }


def _settings(args: TrainArguments, training: CriticConfig, stored: Optional[dict[str, Any]]) -> dict[str, Any]:
    """The run's settings. One that an earlier version began goes on as that version would have: its critic reads the last
    hidden state."""
    unset = {each.name: each.default for each in fields(TrainArguments) if each.name in ("layer", "running_mean")}
    if stored is None or "layer" in stored or any(getattr(args, name) != value for name, value in unset.items()):
        return _arguments(args, training)
    note(f"{training.output_dir} holds a run of an earlier version, whose critic reads the last hidden state alone.")
    args.layer, args.running_mean, training.closed_form = "-1", False, False
    new = (*unset, "closed_form", "l2", "steered_strength")
    return {name: value for name, value in _arguments(args, training).items() if name not in new}


def _arguments(args: TrainArguments, training: CriticConfig) -> dict[str, Any]:
    """What the run's result depends on, and a second run must repeat."""
    own = [name for name in CriticConfig.__annotations__ if name not in _FREE]
    names = (*own, "seed", "max_steps", "gradient_accumulation_steps", "warmup_steps", "max_grad_norm", "bf16", "fp16")
    of_args = asdict(args)
    of_args["prompts"] = of_args.pop("data")  # its name in the files of earlier versions
    del of_args["device"]
    # a run of a version without them goes on
    of_args = {name: value for name, value in of_args.items() if name not in _LATER or value != _LATER[name]}
    return {**of_args, **{name: getattr(training, name) for name in names}}


# what earlier versions' settings lack, which had this
_LATER = {"action_form": "affine", "action_rank": 0}
# what may differ between the start of a run and its going on
_FREE = ("output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to", "remove_unused_columns")
