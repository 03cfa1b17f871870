# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the commands share: flags that name a language model, critics and prompts, and how those are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from generation_ext.critic.processor import CriticLogitsProcessor
from generation_ext.critic.rollouts import prompt_rows
from generation_ext.critic.value import Critic
from peft_ext.command_line import ModelArguments
from peft_ext.hub import fetched
from peft_ext.rows import read_json_lines, read_lines
from peft_ext.runs import read_settings


# as they were called before all commands had one word for one thing
OLD_FLAGS = {"prompts": "data"}


@dataclass
class NamedCriticArguments(ModelArguments):
    """Which critic."""

    critic: list[str] = field(
        default_factory=list,
        metadata={"help": "Folder or hub id of a critic, or of a run (or the first argument); or several."},
    )

    def load(self, kind: str = "causal") -> tuple[Any, Any]:
        """The language model in eval mode, and its tokenizer; the first critic's run's if the flags name none."""
        if self.model is None:
            run = read_settings(Path(self.critic[0], "config.yaml")) or {}
            self.model, self.adapter = run.get("model"), self.adapter or run.get("adapter")
        return super().load(kind)


@dataclass
class CriticArguments(NamedCriticArguments):
    """Which critic, and how it steers."""

    critic_top_k: int = field(default=10, metadata={"help": "Tokens that are re-weighted in each step."})
    mode: str = field(default="exact", metadata={"help": "exact, or action-value (a critic with that head)."})
    mask_others: bool = field(default=False, metadata={"help": "Rule out all other tokens."})

    def processor(
        self, model: Any, critics: Sequence[Critic], strength: Union[float, list[float]], **kwargs: Any
    ) -> CriticLogitsProcessor:
        """What steers `generate`, as the flags say."""
        options: dict[str, Any] = {"top_k": self.critic_top_k, "mode": self.mode, "mask_others": self.mask_others}
        return CriticLogitsProcessor(model, critics, strength=strength, **options, **kwargs)


@dataclass
class PromptArguments:
    """Which prompts to sample from."""

    data: Optional[str] = field(
        default=None, metadata={"help": "A text file with a prompt a line, or JSON lines with a field of that name."}
    )
    prompt_field: str = field(default="prompt", metadata={"help": "Field of JSON lines that holds the prompt."})


def critic_folders(names: Sequence[str]) -> list[Path]:
    """Where the critics lie that folders of critics or of runs name; checked before any model is loaded.

    Raises:
        ValueError: If none is named.
        FileNotFoundError: If a folder holds no critic.
    """
    if not names:
        raise ValueError("critic is missing: pass --critic, the folder of a critic or of a run.")
    folders = []
    for name in names:
        named = fetched(name)
        folder = named / "critic" if (named / "critic" / "config.json").is_file() else named
        if not (folder / "config.json").is_file():
            hint = " The run isn't finished: call train again." if Path(name, "config.yaml").is_file() else ""
            raise FileNotFoundError(f"critic={name!r}: there is no critic in that folder.{hint}")
        folders.append(folder)
    return folders


def load_critics(folders: Sequence[Path], model: Any) -> list[Critic]:
    """Critics in eval mode, checked against the language model.

    Raises:
        ValueError: If one belongs to another language model.
    """
    return [Critic.from_pretrained(folder).eval().attach(model).to(model.device) for folder in folders]


def load_prompts(args: PromptArguments) -> list[dict[str, Any]]:
    """Rows with a `prompt`.

    Raises:
        ValueError, FileNotFoundError: If there is no such file, no such field, or no prompt.
    """
    if args.data is None:
        raise ValueError("data is missing: pass --data, prompts as a text or JSON-lines file.")
    path = Path(args.data).expanduser()
    if path.suffix not in (".jsonl", ".json"):
        return prompt_rows(read_lines(path, "data"))
    rows = read_json_lines(path, "data")
    for row in rows:
        if args.prompt_field not in row:
            raise ValueError(
                f"data={args.data!r}: a line has the fields {sorted(row)}, but no {args.prompt_field!r}; pass "
                "--prompt_field."
            )
        row["prompt"] = row.pop(args.prompt_field)
    return prompt_rows(rows)
