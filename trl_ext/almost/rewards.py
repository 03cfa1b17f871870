# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Scores answers with a reward model: for best-of-N, as a reward function of TRL, for accuracy on pairs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from generation_ext.shared_prefix.token_tree import padded
from peft_ext.language_model import device_of, inference
from trl_ext.almost.data.preferences import preference_pairs
from trl_ext.almost.models import Dtype, chosen_device, load_chat_tokenizer, load_classifier, with_padding
from trl_ext.almost.prompts.chat import Messages, Prompt, as_messages, chat_text, with_chat_template


logger = logging.getLogger(__name__)
# An answer, or the assistant's messages as TRL passes them.
Response = Union[str, Messages]
# Prompts (texts or messages) and answers -> a number for each, higher is better.
AnswerScorer = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]


class PairScores(NamedTuple):
    """Scores of n pairs.

    Attributes:
        chosen: Rewards of the better answers.
        rejected: Rewards of the worse ones.
    """

    chosen: list[float]
    rejected: list[float]

    @property
    def hits(self) -> list[float]:
        """For each pair, 1 if the better answer has the higher reward, 0.5 for a tie."""
        return [float((a > b) + 0.5 * (a == b)) for a, b in zip(self.chosen, self.rejected)]

    @property
    def accuracy(self) -> float:
        """Mean of the hits."""
        return sum(self.hits) / len(self.hits)


class RewardModel:
    """A sequence classifier with one output, as a function of prompts and answers.

    It reads text with its own tokenizer and chat format, so it may be of another family than the policy that wrote the
    text. A text that is too long loses its beginning. It is a reward function in TRL's shape, too.

    Args:
        model: The classifier, or a `PeftModel` of one.
        tokenizer: Its tokenizer; without a chat template it gets the paper's format.
        max_length: Most tokens of a prompt with its answer; what is before is cut off.
        batch_size: Texts per forward pass.
        progressbar: Show one.

    Raises:
        ValueError: If the model has more outputs than one, the tokenizer nothing to pad with, or a number is out of its
            range.

    Example:

    ```py
    >>> rewards = RewardModel.from_pretrained("run/reward_model")
    >>> rewards.score(["How do bees make honey?"], ["They collect nectar and let it dry."])
    [0.73]
    ```
    """

    def __init__(
        self,
        model: Union[PreTrainedModel, PeftModel],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        batch_size: int = 16,
        progressbar: bool = False,
    ) -> None:
        if model.config.num_labels != 1:
            raise ValueError(f"model gives {model.config.num_labels} scores; a reward model gives one.")
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.model, self.tokenizer = model, with_padding(with_chat_template(tokenizer))
        self.max_length, self.batch_size, self.progressbar = max_length, batch_size, progressbar
        # transformers finds the last token by it
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.__name__ = "reward_model"  # what TRL calls it in its logs

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        dtype: Dtype = "float32",
        device: Optional[Union[str, torch.device]] = None,
        policy_tokenizer: Optional[PreTrainedTokenizerBase] = None,
        **kwargs: Any,
    ) -> RewardModel:
        """Load a reward model.

        Args:
            name: A folder (with a whole model or an adapter) or a hub id.
            dtype: Float type of the weights.
            device: Where to put it; None: an accelerator if there is one.
            policy_tokenizer: Of the model whose answers are scored; if it is another one than the reward model's, the
                log says that texts are encoded anew.
            **kwargs: As for the class.

        Raises:
            FileNotFoundError: If there is no such model.
            ValueError: If it isn't a reward model, or there is no such device.
        """
        where = chosen_device(device)
        model, tokenizer = load_classifier(name, dtype=dtype, new_head=False), load_chat_tokenizer(name)
        if policy_tokenizer is not None and policy_tokenizer.get_vocab() != tokenizer.get_vocab():
            logger.warning(
                "The reward model %r has another tokenizer than the policy: answers are decoded, and encoded again in "
                "the reward model's own chat format.",
                name,
            )
        return cls(model.to(where), tokenizer, **kwargs)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Response], **columns: Any) -> list[float]:
        """Rewards, as TRL's trainers ask for them; `columns` are ignored."""
        return self.score(prompts, completions)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """The rewards of answers, in their order; batching doesn't change them but for rounding.

        Args:
            prompts: Queries, or conversations that end with one.
            responses: As many answers; each a string, or a list of one message of the assistant.

        Raises:
            TypeError, ValueError: If an argument has another shape.
            ValueError: If a reward is NaN or infinite; names the row.
        """
        if isinstance(prompts, str) or isinstance(responses, str):
            raise TypeError("prompts and responses must be lists, got a single string; pass [text].")
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses.")
        rows = [self.encode(prompt, response) for prompt, response in zip(prompts, responses)]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        scores = [math.nan] * len(rows)
        with tqdm(total=len(rows), desc="Rewards", disable=not self.progressbar) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                for index, score in zip(batch, self._forward([rows[index] for index in batch])):
                    scores[index] = score
                bar.update(len(batch))
        self._check(scores, prompts, responses)
        return scores

    def score_pairs(self, pairs: Iterable[Mapping[str, Any]]) -> PairScores:
        """Rewards of both answers of pairs in TRL's preference format.

        Args:
            pairs: Rows with `chosen` and `rejected`, and perhaps `prompt`, each a string or messages; see
                [`preference_pairs`].

        Raises:
            ValueError: If there are none, or as [`score`].
        """
        pairs = preference_pairs(pairs)
        if not pairs:
            raise ValueError("pairs has no rows.")
        prompts = [pair["prompt"] for pair in pairs]
        scores = self.score(prompts * 2, [pair[key] for key in ("chosen", "rejected") for pair in pairs])
        return PairScores(scores[: len(pairs)], scores[len(pairs) :])

    def encode(self, prompt: Prompt, response: Response) -> list[int]:
        """Token ids of a prompt with its answer, of which the last `max_length` are kept."""
        return encode_answer(self.tokenizer, prompt, response, self.max_length)

    def _forward(self, rows: Sequence[list[int]]) -> list[float]:
        input_ids, mask = padded(rows, self.tokenizer.pad_token_id, "right")
        device = device_of(self.model)
        with inference(self.model):
            logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
        return logits[:, 0].float().tolist()

    def _check(self, scores: Sequence[float], prompts: Sequence[Prompt], responses: Sequence[Response]) -> None:
        for row, score in enumerate(scores):
            if not math.isfinite(score):
                raise ValueError(
                    f"the reward of row {row} is {score}: prompt {str(prompts[row])[:80]!r}, response "
                    f"{str(responses[row])[:80]!r}. The reward model's weights are damaged, or its dtype overflows (load "
                    "it with dtype='float32' or 'bfloat16')."
                )


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: Response, max_length: Optional[int] = None
) -> list[int]:
    """Token ids of a prompt with its answer as a reward model reads them; the beginning is cut off where it is too long.

    Training and scoring both go through this, so that a text is the same tokens in both.
    """
    text = chat_text(tokenizer, [*as_messages(prompt), *_answer(response)])
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids if max_length is None else ids[-max_length:]


def answer_text(response: Response) -> str:
    """What the assistant says in an answer, as a reward model reads it.

    Raises:
        ValueError: If it is neither a string nor one message of the assistant.
    """
    return _answer(response)[0]["content"]


def _answer(response: Response) -> list[dict[str, str]]:
    if isinstance(response, str):
        return [{"role": "assistant", "content": response.strip()}]
    messages = as_messages(response)
    if [message["role"] for message in messages] != ["assistant"]:
        raise ValueError(f"response={response!r} must be a string or one message of the assistant.")
    return [{"role": "assistant", "content": messages[0]["content"].strip()}]
