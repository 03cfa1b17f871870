# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Settings of the stages that write texts, as dataclasses for TrlParser and for a recipe's blocks."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Optional

from generation_ext.shared_prefix.sampling import Sampling
from peft_ext import devices
from peft_ext.models import DTYPES
from trl_ext.almost.prompts.roles import AUTO, FORMATS, OWN, PLAIN, load_style


# What settings were called in earlier versions, whose recipes and runs are read; old name -> new.
RENAMED = {"ladder": "generators"}
# Settings that came later, with what earlier versions did: a file or folder that was begun without them goes on under these.
LATER: dict[str, Any] = {
    "repetition_weight": 0.0,
    "heuristic_filter": False,
    "whole_sentences": False,
    "length_control": False,
    "max_length_ratio": None,
}
# Settings that say where something is computed, not what is made.
WHERE = ("device",)


@dataclass
class WritingConfig:
    """What all stages that write texts share."""

    model_name_or_path: Optional[str] = field(
        default=None, metadata={"help": "Who writes: a hub id, a folder (an adapter's too); default: SmolLM2-135M."}
    )
    backend: str = field(default="transformers", metadata={"help": "transformers, or vllm where it is installed."})
    batch_size: int = field(default=32, metadata={"help": "Texts that are written side by side."})
    dtype: str = field(default="auto", metadata={"help": "Float type of the weights."})
    chat_format: str = field(
        default=AUTO,
        metadata={"help": "chat: the tokenizer's template; plain: Human/Assistant; auto: the former if there is one."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Logits are divided by it."})
    top_p: float = field(default=0.9, metadata={"help": "The nucleus that tokens are drawn from."})
    top_k: int = field(default=0, metadata={"help": "Only so many of the most probable tokens; 0: all."})
    max_new_tokens: int = field(default=384, metadata={"help": "Most tokens of a text."})
    seed: int = field(default=0, metadata={"help": "Seed of all that is drawn."})
    device: Optional[str] = field(default=None, metadata={"help": devices.HELP})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be positive.")
        check_dtype("dtype", self.dtype)
        if self.chat_format not in FORMATS:
            raise ValueError(f"chat_format={self.chat_format!r} is unknown; choose one of {FORMATS}.")
        self.sampling()

    def sampling(self, **changes: Any) -> Sampling:
        """How texts are drawn."""
        names = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
        return Sampling(**{**{name: getattr(self, name) for name in names}, **changes})


@dataclass
class QueriesConfig(WritingConfig):
    """Mining of queries."""

    temperature: float = field(default=1.2, metadata={"help": "Logits are divided by it."})
    max_new_tokens: int = field(default=64, metadata={"help": "Most tokens of a query."})
    count: int = field(default=1000, metadata={"help": "How many queries to mine."})
    seeds: str = field(
        default="",
        metadata={"help": "JSON lines with `query` or `instruction` to begin with; default: the package's."},
    )
    shots: int = field(default=10, metadata={"help": "Queries that are shown before a new one."})
    samples: int = field(
        default=1,
        metadata={"help": "Texts for each list; more cost less, since the list runs through the model once."},
    )
    rouge_threshold: float = field(
        default=0.5, metadata={"help": "A query with ROUGE-L of at least this with any earlier one is dropped."}
    )
    min_chars: int = field(default=30, metadata={"help": "A shorter query is dropped if no punctuation ends it."})
    max_chars: int = field(default=250, metadata={"help": "A longer query is dropped."})
    patience: int = field(
        default=20, metadata={"help": "Stop with an error after so many batches without a new query."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.count, self.shots, self.patience, self.samples) < 1:
            raise ValueError(
                f"count={self.count}, shots={self.shots}, patience={self.patience} and samples={self.samples} must all be "
                "positive."
            )
        if not 0 <= self.min_chars <= self.max_chars:
            raise ValueError(f"min_chars={self.min_chars} must be between 0 and max_chars={self.max_chars}.")


@dataclass
class ResponsesConfig(WritingConfig):
    """Answers of every generator."""

    generators: list[str] = field(
        default_factory=lambda: [
            "prompt=faithful,shots=3",
            "prompt=hhh,shots=5",
            "prompt=hhh,shots=1",
            "prompt=hhh,shots=1,bits=3",
        ],
        metadata={
            "help": "Who answers, best first, such as prompt=hhh,shots=3,bits=2,model=owner/name; in YAML mappings, too."
        },
    )
    ladder: Optional[list[str]] = field(default=None, metadata={"help": "What --generators was called before."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ladder is not None:
            self.generators, self.ladder = self.ladder, None


@dataclass
class ComparisonsConfig:
    """From answers to pairs."""

    heuristic_filter: bool = field(default=True, metadata={"help": "Drop answers that are bad by their looks."})
    length_aware: bool = field(
        default=True, metadata={"help": "The better answer must not be short; otherwise neighbours are paired."}
    )
    max_length_ratio: Optional[float] = field(
        default=None,
        metadata={
            "help": "Answers of which one is more than so many times as long as the other aren't compared; 2, say."
        },
    )
    as_is_reward_model: Optional[str] = field(
        default=None, metadata={"help": "A reward model that must agree with a pair; default: none is asked."}
    )
    reward_batch_size: int = field(default=32, metadata={"help": "Answers that it scores side by side."})
    heldout_share: float = field(default=0.1, metadata={"help": "Share of the queries whose pairs are held out."})
    conversational: bool = field(default=True, metadata={"help": "Write messages; otherwise plain texts."})
    seed: int = field(default=0, metadata={"help": "Seed of the split."})
    device: Optional[str] = field(default=None, metadata={"help": devices.HELP})

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_share < 1:
            raise ValueError(f"heldout_share={self.heldout_share} must be at least 0 and below 1.")
        if self.max_length_ratio is not None and not 1 <= self.max_length_ratio < math.inf:
            raise ValueError(
                f"max_length_ratio={self.max_length_ratio} must be a number of at least 1, or not be given."
            )


@dataclass
class SelfPlayConfig(WritingConfig):
    """Conversations of a person and an assistant, the best of N answers at each turn."""

    samples: int = field(default=4, metadata={"help": "Answers that the reward model chooses from; 1: none is asked."})
    max_turns: int = field(default=2, metadata={"help": "Most answers of a conversation."})
    prompt: str = field(
        default=AUTO,
        metadata={
            "help": "The assistant's prompt: own (the model's chat template and nothing before it, as it is asked in use), hhh, "
            "faithful or a JSON file; auto: own where there is a chat template and no --shots, else faithful."
        },
    )
    shots: Optional[int] = field(default=None, metadata={"help": "Its demonstrations; default: 3, of own none."})
    user_max_new_tokens: int = field(default=64, metadata={"help": "Most tokens of what the person says."})
    count: Optional[int] = field(default=None, metadata={"help": "Conversations; default: one for each query."})
    reward_batch_size: int = field(default=32, metadata={"help": "Answers that are scored side by side."})
    reward_dtype: str = field(default="float32", metadata={"help": "Float type of the reward model."})
    repetition_weight: float = field(
        default=0.0,
        metadata={"help": "The share of an answer's repeated word 3-grams, times this, is taken off its reward."},
    )
    heuristic_filter: bool = field(
        default=False,
        metadata={"help": "An answer that is bad by its looks, as in comparisons, is chosen only if all are."},
    )
    whole_sentences: bool = field(
        default=False,
        metadata={"help": "An answer that breaks off, as at max_new_tokens, loses its unfinished last sentence."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or self.max_turns < 1 or self.user_max_new_tokens < 1:
            raise ValueError(
                f"samples={self.samples}, max_turns={self.max_turns} and user_max_new_tokens="
                f"{self.user_max_new_tokens} must all be positive."
            )
        if self.count is not None and self.count < 1:
            raise ValueError(f"count={self.count} must be positive, or not be given.")
        check_dtype("reward_dtype", self.reward_dtype)
        check_repetition_weight(self.repetition_weight)
        if self.prompt != AUTO:
            load_style(self.prompt)
        if self.prompt == OWN and self.shots:
            raise ValueError(
                f"shots={self.shots}: prompt={OWN!r} is the model's chat template and nothing before it; leave shots out, or "
                "name another prompt."
            )
        if self.prompt == OWN and self.chat_format == PLAIN:
            raise ValueError(
                f"chat_format={PLAIN!r}: prompt={OWN!r} is the model's chat template; leave one of them out."
            )


def check_repetition_weight(weight: float) -> None:
    """Refuse a weight that would reward repetition.

    Raises:
        ValueError: If it is negative or no number.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"repetition_weight={weight} must be a number of at least 0; 0: repetition doesn't matter.")


def recorded(config: Any) -> dict[str, Any]:
    """A stage's settings as they stand beside what it wrote: without where it ran, and without settings that came later where
    they are what earlier versions did."""
    values = dataclasses.asdict(config)
    same = {name for name, value in LATER.items() if values.get(name) == value}
    return {name: value for name, value in values.items() if name not in same and name not in WHERE}


def check_dtype(argument: str, name: str) -> None:
    """Refuse what models can't be loaded in, before hours of a run lead to it.

    Raises:
        ValueError: Names the argument.
    """
    if name not in DTYPES:
        raise ValueError(f"{argument}={name!r} is no float type; choose one of {DTYPES}.")
