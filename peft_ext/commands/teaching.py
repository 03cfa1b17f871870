# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The flags of distillation: how much, from which teacher, and where that runs or is kept."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

from peft_ext import devices
from peft_ext.commands.packed_base import is_packed_model
from peft_ext.distillation.cached_logits import DEFAULT_TOP_K
from peft_ext.distillation.loss import Objective
from peft_ext.model_card import DEFAULT_ON_HUB, base_in_card
from peft_ext.models import DEFAULT_MODEL, load_config, load_tokenizer, locate
from peft_ext.runs import read_settings


@dataclass
class TeacherArguments:
    """Of distillation: the teacher and the divergence."""

    teacher: Optional[str] = field(
        default=None,
        metadata={
            "help": "Of distillation: the teacher, whatever --model takes; by default the model before packing."
        },
    )
    teacher_device: Optional[str] = field(
        default=None, metadata={"help": "Of distillation: where the teacher runs; by default beside the student."}
    )
    teacher_logits: Optional[str] = field(
        default=None,
        metadata={
            "help": "Of distillation: a folder for the teacher's logits of the training data; made once, then read instead "
            "of running the teacher."
        },
    )
    teacher_top_k: int = field(
        default=DEFAULT_TOP_K,
        metadata={"help": "Of teacher_logits: the likeliest tokens that are kept for each; the rest as one."},
    )
    distill_temperature: float = field(
        default=1.0, metadata={"help": "Of distillation: divides both models' logits; the divergence has its square."}
    )
    distill_beta: float = field(
        default=0.0,
        metadata={
            "help": "Of distillation, as in TRL: 0 is KL(teacher || student), 1 the reverse, 0.5 Jensen-Shannon."
        },
    )

    def objective(self, distill: float) -> Objective:
        """What is minimised.

        Raises:
            ValueError: If a value is out of its range, or a teacher is named although nothing is distilled.
        """
        for each in fields(TeacherArguments):
            if not distill and getattr(self, each.name) != each.default:
                raise ValueError(f"{each.name}={getattr(self, each.name)!r} is for distillation; pass --distill, too.")
        if self.teacher_device is not None:
            devices.usable(self.teacher_device)
        if self.teacher_top_k < 1:
            raise ValueError(f"teacher_top_k={self.teacher_top_k} must be at least 1.")
        try:
            return Objective(distill, self.distill_temperature, self.distill_beta)
        except ValueError as error:
            name = next((name for name in ("temperature", "beta") if str(error).startswith(name)), None)
            raise (error if name is None else ValueError(f"distill_{error}")) from None

    def teacher_of(self, model: str) -> Optional[str]:
        """The teacher's name, once it is known that its config is there and has the student's vocabulary; None: the logits on
        disk have to do.

        Args:
            model: The student's model, float or packed.

        Raises:
            ValueError: If it isn't named, and can't be found.
        """
        named = self.teacher
        if named is None and not is_packed_model(model):
            return model
        if named is None:
            named = _packed_from(model)
            if named is None or not _is_there(named):
                if self.teacher_logits is not None:
                    return None
                what = (
                    "doesn't say what it was made from"
                    if named is None
                    else f"was made from {named!r}, which isn't here"
                )
                raise ValueError(f"model={model!r} is packed and {what}; name the float model: --teacher.")
        own, other = (_vocabulary(name) for name in (model, named))
        if own != other:
            raise ValueError(
                f"teacher={named!r} has a vocabulary of {other:,} tokens, model={model!r} one of {own:,}; they must be the same."
            )
        tokens = [_tokens(name) for name in (model, named)]
        if None not in tokens and tokens[0] != tokens[1]:
            raise ValueError(
                f"teacher={named!r} has another tokenizer than model={model!r}: its tokens have other numbers, so it can't "
                "teach it."
            )
        return named

    def options(self, objective: Objective, teacher: Optional[str]) -> dict[str, Any]:
        """Arguments of [`DistillationMixin`][peft_ext.distillation.DistillationMixin]."""
        return {
            "teacher_model": teacher,
            "teacher_device": self.teacher_device,
            "teacher_logits": self.teacher_logits,
            "top_k": self.teacher_top_k,
            "distill": objective.distill,
            "temperature": objective.temperature,
            "beta": objective.beta,
        }


def distilled_record(objective: Objective, teacher: Optional[str], steps: int) -> dict[str, Any]:
    """What is kept of a distillation in metrics and in a packed model's config."""
    record: dict[str, Any] = {"teacher": teacher, "distill": objective.distill, "steps": steps}
    if objective.temperature != 1:
        record["temperature"] = objective.temperature
    if objective.beta:
        record["beta"] = objective.beta
    return record


def distilled_in_words(record: dict[str, Any]) -> str:
    """The same as a line."""
    weight = record["distill"]
    what = "KL to it alone" if weight == 1 else f"{1 - weight:g} of cross-entropy and {weight:g} of KL to it"
    more = [f"{name} {record[name]:g}" for name in ("temperature", "beta") if name in record]
    teacher = record["teacher"] or "the teacher of the logits on disk"
    teacher = Path(teacher).name if Path(teacher).is_absolute() else teacher
    return ", ".join([f"{teacher}, by {what}", *more, f"{record['steps']} steps"])


def _packed_from(model: str) -> Optional[str]:
    """What a packed model was made from, by the run or the card that it lies in."""
    settings = read_settings(Path(model).expanduser().resolve().parent / "config.yaml") or {}
    if Path(model).is_dir() and isinstance(settings.get("model"), str) and settings["model"] != model:
        return settings["model"]
    named = base_in_card(model)
    return DEFAULT_MODEL if named == DEFAULT_ON_HUB and not _is_there(named) else named


def _is_there(name: str) -> bool:
    try:
        load_config(name)
    except (OSError, ValueError, ImportError):
        return False
    return True


def _tokens(name: str) -> Optional[dict[str, int]]:
    """The vocabulary of a model's tokenizer; None without one."""
    try:
        return load_tokenizer(name).get_vocab()
    except (OSError, ValueError):
        return None


def _vocabulary(name: str) -> int:
    return load_config(locate(name)[0]).get_text_config().vocab_size
