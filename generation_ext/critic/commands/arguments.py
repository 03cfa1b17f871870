# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the commands share: flags that name a language model, critics, prompts and a reward, and how those are loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from transformers import PreTrainedTokenizerBase

from generation_ext.critic.rollouts import prompt_rows
from generation_ext.critic.value import Critic
from peft_ext import command_line, models
from peft_ext.files import written_whole


@dataclass
class ModelArguments:
    """Which language model."""

    model: Optional[str] = field(
        default=None,
        metadata={
            "help": "Hub id, folder or .gguf file of the language model; a run's own, or SmolLM2-135M-Instruct."
        },
    )
    adapter: Optional[str] = field(default=None, metadata={"help": "Folder of a PEFT adapter for it."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})


@dataclass
class CriticArguments(ModelArguments):
    """Which critic, and how it steers."""

    critic: list[str] = field(
        default_factory=list, metadata={"help": "Folder of a critic or of a run (or the first argument); or several."}
    )
    critic_top_k: int = field(default=10, metadata={"help": "Tokens that are re-weighted in each step."})
    mode: str = field(default="exact", metadata={"help": "exact, or action-value (a critic with that head)."})
    mask_others: bool = field(default=False, metadata={"help": "Rule out all other tokens."})


@dataclass
class PromptArguments:
    """Which prompts to sample from."""

    prompts: Optional[str] = field(
        default=None, metadata={"help": "A text file with a prompt a line, or JSON lines with a field of that name."}
    )
    prompt_field: str = field(default="prompt", metadata={"help": "Field of JSON lines that holds the prompt."})


def parse(argv: Sequence[str], *kinds: type, positional: Optional[str] = None) -> tuple[Any, ...]:
    """Dataclasses from flags and a YAML file, see `peft_ext.command_line.parse`."""
    return command_line.parse(argv, *kinds, positional=positional, program="python -m generation_ext.critic")


def load_model(args: ModelArguments, run: Optional[str] = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """The language model in eval mode, and its tokenizer.

    Args:
        args: What names it.
        run: A run whose language model is taken if the arguments name none.

    Raises:
        FileNotFoundError, ImportError: If there is no such model or adapter.
    """
    if args.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={args.dtype!r} is unknown; choose one of auto, float32, bfloat16, float16.")
    name, adapter = args.model, args.adapter
    if name is None and run is not None:
        settings = read_run(run)
        name, adapter = settings.get("model"), adapter or settings.get("adapter")
    if adapter is not None and not Path(adapter, "adapter_config.json").is_file():
        raise FileNotFoundError(f"adapter={adapter!r} has no adapter_config.json, as save_pretrained writes it.")
    model: Any = models.load_model(name, dtype=args.dtype)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), models.load_tokenizer(name)


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
        folder = Path(name, "critic") if Path(name, "critic", "config.json").is_file() else Path(name)
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


def read_run(folder: str) -> dict[str, Any]:
    """The arguments that a run was started with; nothing for a critic's bare folder."""
    file = Path(folder, "config.yaml")
    if not file.is_file():
        return {}
    import yaml

    return yaml.safe_load(file.read_text(encoding="utf-8"))


def load_prompts(args: PromptArguments) -> list[dict[str, Any]]:
    """Rows with a `prompt`.

    Raises:
        ValueError, FileNotFoundError: If there is no such file, no such field, or no prompt.
    """
    if args.prompts is None:
        raise ValueError("prompts is missing: pass --prompts, a text or JSON-lines file.")
    path = Path(args.prompts).expanduser()
    if path.suffix not in (".jsonl", ".json"):
        return prompt_rows([line for line in read_lines(path, "prompts") if line.strip()])
    rows = read_json_lines(path, "prompts")
    for row in rows:
        if args.prompt_field not in row:
            raise ValueError(
                f"prompts={args.prompts!r}: a line has the fields {sorted(row)}, but no {args.prompt_field!r}; pass "
                "--prompt_field."
            )
        row["prompt"] = row.pop(args.prompt_field)
    return prompt_rows(rows)


def read_lines(path: Path, argument: str) -> list[str]:
    """The lines of a text file, without their ends.

    Raises:
        FileNotFoundError: Names the argument.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{argument}={str(path)!r}: there is no such file.")
    return path.read_text(encoding="utf-8").splitlines()


def read_json_lines(path: Path, argument: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.

    Raises:
        ValueError, FileNotFoundError: Names the argument, and the line that is none.
    """
    rows = []
    for number, line in enumerate(read_lines(path, argument), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{argument}={str(path)!r}: line {number} is not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise ValueError(f"{argument}={str(path)!r}: line {number} is {row!r}, not an object with fields.")
        rows.append(row)
    return rows


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def as_json(value: Any) -> str:
    """JSON text; NaN, which JSON doesn't have, becomes null."""
    return json.dumps(_plain(value), indent=2) + "\n"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def figure(value: Optional[float], digits: int = 3) -> str:
    """A number in a table."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
