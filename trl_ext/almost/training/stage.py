# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the three training stages share: adapters from flags, data, resuming, and a folder that is complete or says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import ModelConfig, ScriptArguments, get_peft_config

from peft_ext import PeqaConfig, trainer_checkpoints
from peft_ext.files import scratch
from peft_ext.rows import ROW_SUFFIXES, read_rows
from peft_ext.runs import RunFolder, digest, drop_checkpoints, last_checkpoint
from trl_ext.almost.config import LATER
from trl_ext.almost.models import save_whole


logger = logging.getLogger(__name__)
SETTINGS, RESULT, ADAPTER = "settings.json", "training.json", "adapter"
# Settings under which a training may go on that was started under others.
_FREE = frozenset(
    "output_dir overwrite_output_dir report_to run_name logging_dir logging_steps logging_strategy push_to_hub "
    "hub_model_id hub_token hub_private_repo hub_strategy hub_revision hub_always_push save_steps save_strategy "
    "save_total_limit disable_tqdm resume_from_checkpoint log_level log_level_replica log_on_each_node "
    "dataloader_num_workers dataloader_pin_memory dataset_num_proc project trackio_space_id local_rank "
    "per_device_eval_batch_size device".split()
)

# The words that all commands share, for TRL's.
TRAINING_FLAGS = {"model": "model_name_or_path", "data": "dataset_name", "batch_size": "per_device_train_batch_size"}

_DEVICE = "Where it is trained: cpu (as --use_cpu), or cuda; by default, Trainer chooses."
# Settings that may be a file's or a folder's path.
_PATHS = frozenset(("dataset_name", "eval_dataset_name", "model_name_or_path", "reward_model"))


@dataclass
class AlmostModelConfig(ModelConfig):
    """TRL's ModelConfig, and PEQA: `--use_peft` trains LoRA, `--peqa_bits` the scales of a quantised model, neither the
    whole model."""

    peqa_bits: Optional[int] = field(
        default=None, metadata={"help": "Quantise the model to 2, 3, 4 or 8 bits and train its scales (PEQA)."}
    )
    peqa_group_size: int = field(
        default=-1, metadata={"help": "Inputs that share a scale under PEQA; -1: all of an output channel's."}
    )
    peqa_init_method: str = field(
        default="minmax", metadata={"help": "Where PEQA's integers come from: 'minmax' or 'mse'."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.peqa_bits is not None and self.use_peft:
            raise ValueError(
                f"use_peft=True is LoRA and peqa_bits={self.peqa_bits} is PEQA; a model gets one adapter: leave out one."
            )
        if self.peqa_init_method not in ("minmax", "mse"):
            raise ValueError(
                f"peqa_init_method={self.peqa_init_method!r} must be 'minmax' or 'mse'; for a calibrated initialisation quantise "
                "the model first (peft-ext quantize) and pass that folder as --model_name_or_path."
            )


@dataclass
class StageDefaults:
    """Defaults of every stage's training arguments; goes before TRL's config in the list of bases."""

    output_dir: Optional[str] = field(default=None, metadata={"help": "The folder to write the model to."})
    save_total_limit: Optional[int] = field(default=1, metadata={"help": "Checkpoints to keep while training."})
    report_to: Union[None, str, list[str]] = field(
        default="none", metadata={"help": "Where to report to ('wandb', 'trackio', ...); none by default."}
    )
    bf16: Optional[bool] = field(
        default=None,
        metadata={
            "help": "bfloat16 mixed precision; by default where there is an accelerator, and worth it on newer CPUs."
        },
    )

    def __post_init__(self):
        if not self.output_dir:  # transformers would choose a folder by itself
            raise ValueError("output_dir is missing: pass --output_dir, the folder to write the model to.")
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False  # TRL's own default is True, several times slower on CPUs without bfloat16 products
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # transformers refuses bf16 otherwise
        super().__post_init__()  # type: ignore[misc]


@dataclass
class StageArguments(ScriptArguments):
    """TRL's ScriptArguments; `dataset_name` may be a file of JSON lines, as the earlier stages write it."""

    eval_dataset_name: Optional[str] = field(
        default=None, metadata={"help": "Held-out data: a .jsonl file, or a data set of the hub."}
    )
    merge_adapter: bool = field(
        default=True,
        metadata={"help": "Write LoRA merged, as a model that every tool loads, and the adapter beside it."},
    )
    device: Optional[str] = field(default=None, metadata={"help": _DEVICE})

    def rows(self) -> list[dict]:
        """What is trained on, see [`load_data`]."""
        return load_data(self.dataset_name, "dataset_name", self.dataset_config, self.dataset_train_split)

    def held_out_rows(self) -> list[dict]:
        """What is held out; none if nothing names it."""
        if not self.eval_dataset_name:
            return []
        return load_data(self.eval_dataset_name, "eval_dataset_name", None, self.dataset_test_split)


def adapter_config(model_args: ModelConfig, task_type: str) -> Optional[PeftConfig]:
    """The adapter that the flags ask for; None: the whole model is trained.

    Args:
        model_args: The flags.
        task_type: PEFT's: `"SEQ_CLS"` or `"CAUSAL_LM"`.
    """
    bits = getattr(model_args, "peqa_bits", None)
    if bits is not None:
        return PeqaConfig(
            bits=bits,
            group_size=getattr(model_args, "peqa_group_size", -1),
            init_method=getattr(model_args, "peqa_init_method", "minmax"),
            task_type=task_type,
        )
    model_args.lora_task_type = task_type
    return get_peft_config(model_args)


def load_data(name: Optional[str], argument: str, config: Optional[str] = None, split: str = "train") -> list[dict]:
    """Rows of a file (`.jsonl`, `.json`, `.csv`, `.parquet`) or of a data set of the hub.

    Raises:
        ValueError: If the argument is missing or there are no rows.
        FileNotFoundError: If there is no such file.
    """
    if not name:
        raise ValueError(f"{argument} is missing: pass --{argument}, a .jsonl file or a data set of the hub.")
    if Path(name).suffix in ROW_SUFFIXES:
        return read_rows(Path(name).expanduser())
    from datasets import load_dataset

    return list(load_dataset(name, name=config, split=split))


def start(training_args: TrainingArguments, *others: Any) -> Optional[dict[str, Any]]:
    """Check the output folder before any long work.

    Args:
        training_args: Says the folder.
        *others: The stage's further arguments.

    Returns:
        What a finished training with these very settings has measured; None: train, from the last checkpoint if there is
        one.

    Raises:
        FileExistsError: If the folder holds a training with other settings; names them.
        OSError: If the folder can't be written.
    """
    run_folder = _run_folder(training_args)
    with training_args.main_process_first(desc="checking the output folder"):
        begun = run_folder.result is not None or last_checkpoint(run_folder.folder) is not None
        result = run_folder.open(_settings(training_args, *others), begun)
    if result is not None:
        logger.warning("%s is finished already; nothing is trained.", run_folder.folder)
    return result


def train(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    merge_adapter: bool,
    change: Optional[Callable[[Any], None]] = None,
) -> Any:
    """Train from the last checkpoint, and write the model whole; returns the model as it was written.

    A LoRA is written merged into `output_dir`, and by itself into its folder `adapter`; PEQA's scales, merged, make a
    packed checkpoint. With `merge_adapter=False`, `output_dir` holds the adapter. `change` is done to the trained model
    before it is written.
    """
    folder = Path(str(trainer.args.output_dir))
    trainer_checkpoints.train(trainer)
    trainer.accelerator.wait_for_everyone()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if change is not None:
        change(model)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if hasattr(model, "peft_config") and merge_adapter and sharded:
        logger.warning("The model is sharded, so that the adapter in %s is not merged into it.", folder)
    elif hasattr(model, "peft_config") and merge_adapter:
        if trainer.is_world_process_zero():
            save_whole(model.save_pretrained, tokenizer, folder / ADAPTER)
        model = model.merge_and_unload()
    if sharded:
        trainer.save_model(str(folder))  # gathers the parts
    elif trainer.is_world_process_zero():
        _move_into(folder, model.save_pretrained, tokenizer)
    trainer.accelerator.wait_for_everyone()
    return model


def finish(trainer: Trainer, result: Mapping[str, Any], dataset_name: Optional[str]) -> dict[str, Any]:
    """Push if asked to, write the result, which marks the folder as complete, and drop the checkpoints."""
    result = {**result, "steps": trainer.state.global_step, "history": trainer.state.log_history}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    if trainer.is_world_process_zero():
        _run_folder(trainer.args).finish(result)
        drop_checkpoints(trainer.args.output_dir)
    trainer.end()  # of trackers and the process group
    return result


def _move_into(folder: Path, save: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a model beside the folder's checkpoints: each file is there whole or not at all."""
    with scratch("model", folder) as partial:
        save_whole(save, tokenizer, partial / "model")
        for path in (partial / "model").iterdir():
            path.replace(folder / path.name)


def _run_folder(training_args: TrainingArguments) -> RunFolder:
    return RunFolder(training_args.output_dir, SETTINGS, RESULT)


def _settings(training_args: TrainingArguments, *others: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for arguments in (training_args, *others):
        as_dict = arguments.to_dict() if isinstance(arguments, TrainingArguments) else asdict(arguments)
        values |= {
            name: value
            for name, value in as_dict.items()
            if name not in _FREE and not (name in LATER and value == LATER[name])
        }
    for name in _PATHS & values.keys():
        path = Path(str(values[name])).expanduser()
        if path.exists():  # by what is in it: a run may be moved
            values[name] = f"sha256:{digest(path)}"
    return values
