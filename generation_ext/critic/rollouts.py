# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Roll-outs: texts that the frozen language model samples, with what the critic reads after every token, and a reward.

The hidden states are those that `generate` computes anyway; saved roll-outs get theirs from one forward pass.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from generation_ext.critic.model_config import CriticModelConfig
from generation_ext.critic.reading import Reading, read, reading_of
from generation_ext.critic.rewards import RewardFunc, score
from generation_ext.critic.value import Critic
from generation_ext.shared_prefix.encoded_text import LastStates
from generation_ext.shared_prefix.encoding import TextEncoder
from generation_ext.shared_prefix.inner_states import decoder_layers, output_state
from generation_ext.shared_prefix.running_states import RunningStates
from generation_ext.shared_prefix.sampling import OwnGenerationConfig, Sampling
from generation_ext.shared_prefix.token_tree import padded
from peft_ext.chat_format import chat_prompt
from peft_ext.language_model import (
    CAUSAL,
    ENCODER_DECODER,
    LanguageModel,
    backbone,
    device_of,
    end_tokens,
    inference,
    padding_token,
    start_token,
    unwrapped,
)
from peft_ext.threads import hooks_of_this_thread


@dataclass
class Rollout:
    """One sampled text.

    Args:
        prompt: The prompt without a control code, which is what the reward function reads.
        completion: What the language model wrote after it.
        prompt_ids: The tokens that the language model read, with the control code.
        completion_ids: The tokens that it wrote, with the end token if it wrote one.
        reward: In [0, 1]; None if the reward function had nothing to say of it.
        control_code: The attribute, where there are several.
        columns: Further columns of the data set, for the reward function.
        hidden: `[len(completion_ids) + 1, state_size]`, what the critic reads after the prompt and after each token, in the
            language model's dtype; None until it is computed.
        reading: What that is.
    """

    prompt: str
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]
    reward: Optional[float] = None
    control_code: Optional[str] = None
    columns: dict[str, Any] = field(default_factory=dict)
    hidden: Optional[torch.Tensor] = field(default=None, repr=False, compare=False)
    reading: Optional[Reading] = field(default=None, repr=False, compare=False)

    @property
    def states(self) -> int:
        """The number of positions that have a value."""
        return len(self.completion_ids) + 1


def prompt_rows(prompts: Iterable[Any]) -> list[dict[str, Any]]:
    """Prompts of any kind as rows with a `prompt`, and perhaps a `control_code` and columns for the reward function.

    Args:
        prompts: Texts, or mappings with a `prompt`, as in a data set for TRL: a text, or messages, of which the
            tokenizer's chat template makes the text that the language model and the reward function read.

    Raises:
        ValueError: If there are none, or one has no `prompt`.
        TypeError: If they are something else.
    """
    rows = [{"prompt": entry} if isinstance(entry, str) else entry for entry in prompts]
    if not rows:
        raise ValueError("there are no prompts; pass at least one.")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"prompt {number} is {row!r}; pass texts, or mappings with a text 'prompt'.")
        if "prompt" not in row:
            raise ValueError(f"prompt {number} has the columns {sorted(row)}, but no 'prompt'; rename the column.")
        if not isinstance(row["prompt"], str) and not _are_messages(row["prompt"]):
            raise TypeError(
                f"prompt {number} is {row['prompt']!r}; it must be a text, or messages with a 'role' and a 'content' each."
            )
    return [dict(row) for row in rows]


def _are_messages(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in prompt)
    )


def schedule(rows: Sequence[dict[str, Any]], codes: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows: shuffled passes over all of them, each with a control code (its own, or one drawn from `codes`)."""
    generator = random.Random(seed)
    chosen: list[dict[str, Any]] = []
    while len(chosen) < count:
        chosen += generator.sample(list(rows), len(rows))
    if not codes:
        return chosen[:count]
    return [{"control_code": generator.choice(list(codes)), **row} for row in chosen[:count]]


class RolloutSampler:
    """Samples texts from a frozen language model and scores them.

    Args:
        model: A causal or encoder-decoder language model; it isn't changed.
        tokenizer: Its tokenizer.
        reward: In TRL's shape, see `generation_ext.critic.rewards`; None: the texts get no reward.
        critic: Puts control codes before prompts, if it has any, and says what is kept of the states; None: the last
            hidden states.
        max_new_tokens: Tokens to sample at most.
        temperature: Divides the logits; 1 samples from the language model itself, whatever its `generation_config.json`
            says. The paper explores with 2, which
            collects more kinds of text, but fewer like those that the critic will steer.
        top_k: Sample from so many most likely tokens; 0: from all.
        top_p: Sample from the most likely tokens that have this share of the probability.
        max_prompt_length: Tokens of a prompt; of a longer one the last ones are kept.

    Raises:
        ValueError, TypeError: If an argument is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        reward: Optional[RewardFunc] = None,
        critic: Optional[Critic] = None,
        *,
        max_new_tokens: int = 24,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_prompt_length: int = 256,
    ) -> None:
        if max_prompt_length < 1:
            raise ValueError(f"max_prompt_length={max_prompt_length} must be at least 1.")
        Sampling(temperature, top_p, top_k, max_new_tokens)  # refuses numbers out of their range
        self.model: Any = model
        self.tokenizer = tokenizer
        config: Any = model.config
        self.encoder = TextEncoder(tokenizer, ENCODER_DECODER if config.is_encoder_decoder else CAUSAL, model)
        self.reward = reward
        self.critic = critic
        self.max_new_tokens = max_new_tokens
        self.sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.max_prompt_length = max_prompt_length

    def sample(
        self, rows: Sequence[dict[str, Any]], seed: int, with_hidden: bool = True, **generate_kwargs: Any
    ) -> list[Rollout]:
        """One roll-out for each row, in one batch.

        Args:
            rows: See [`prompt_rows`].
            seed: Of sampling; the global random state stays as it was.
            with_hidden: Keep the hidden states. Not with a processor that calls the model itself.
            **generate_kwargs: Passed to `generate`, such as `logits_processor`.

        Raises:
            ValueError: If a prompt has no tokens or a control code is missing, or for the reward function's mistakes.
        """
        prompts = [self._prompt(row) for row in rows]
        inputs, prompt_ids = self.tokenize(prompts)
        # one token more than is kept, so that there is a hidden state after the last one
        extra = 1 if with_hidden else 0
        reading = reading_for(self.model, self.critic)
        mask = None if self.model.config.is_encoder_decoder else inputs["attention_mask"]
        nothing: AbstractContextManager[list[torch.Tensor]] = nullcontext([])
        recording = _recording(self.model, reading, mask) if with_hidden else nothing
        with _sampling_from(seed, self.model), inference(self.model), recording as steps:
            sequences = self.model.generate(
                **inputs,
                generation_config=OwnGenerationConfig(
                    max_new_tokens=self.max_new_tokens + extra,
                    do_sample=True,
                    num_beams=1,
                    num_return_sequences=1,
                    return_dict_in_generate=False,
                    pad_token_id=padding_token(self.tokenizer),
                    **self.sampling,
                ),
                **generate_kwargs,
            )
        start = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        new_tokens = sequences[:, start:].tolist()
        completions = [_up_to_end(row[: self.max_new_tokens], end_tokens(self.model)) for row in new_tokens]
        rollouts = [self._rollout(row, ids, completion) for row, ids, completion in zip(rows, prompt_ids, completions)]
        if with_hidden:
            # a chunked prefill has several calls; the last of them sees the prompt's last token
            hidden = torch.stack(steps[len(steps) - len(new_tokens[0]) :], dim=1)
            _distribute(self.model, rollouts, hidden, reading)
        self._score(rollouts)
        return rollouts

    def _prompt(self, row: dict[str, Any]) -> str:
        codes = self.critic.config.control_codes if self.critic is not None else []
        code, prompt = row.get("control_code"), row["prompt"]
        if not codes:
            return self._as_text(prompt)
        if code is None:
            raise ValueError(f"the prompt {prompt!r} has no control_code; the critic knows {codes}.")
        assert self.critic is not None
        if isinstance(prompt, str):
            return self.critic.control_prompt(prompt, code)
        coded = self.critic.control_prompt(prompt[-1]["content"], code)  # the code is part of what is asked
        return self._as_text([*prompt[:-1], {**prompt[-1], "content": coded}])

    def _as_text(self, prompt: Any) -> str:
        return prompt if isinstance(prompt, str) else chat_prompt(self.tokenizer, prompt)

    def tokenize(self, prompts: Sequence[str]) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
        """A padded batch on the model's device, and each prompt's tokens. Decoders pad to the left, encoders to the
        right."""
        side = "right" if self.model.config.is_encoder_decoder else "left"
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        batch, mask = padded(ids, padding_token(self.tokenizer), side)
        device = device_of(self.model)
        return {"input_ids": batch.to(device), "attention_mask": mask.to(device)}, ids

    def _prompt_ids(self, prompt: str) -> list[int]:
        pieces = self.encoder.pieces([prompt])[0]
        found = bool(pieces or self.encoder.lead)
        tokens = [*self.encoder.begun(pieces, prompt), *self.encoder.tail] if found else []
        if not tokens:
            raise ValueError(
                f"the prompt {prompt!r} has no tokens; start it with a word, or with the tokenizer's bos_token."
            )
        if len(tokens) > self.max_prompt_length and self.critic is not None and self.critic.config.control_codes:
            raise ValueError(
                f"the prompt {prompt!r} has {len(tokens)} tokens, more than max_prompt_length="
                f"{self.max_prompt_length}, and cutting it would cut off its control code; shorten it."
            )
        return tokens[-self.max_prompt_length :]

    def _rollout(self, row: dict[str, Any], prompt_ids: list[int], completion_ids: list[int]) -> Rollout:
        columns = {name: value for name, value in row.items() if name not in ("prompt", "control_code")}
        completion = self._decode(prompt_ids, completion_ids)
        return Rollout(
            self._as_text(row["prompt"]),
            completion,
            prompt_ids,
            completion_ids,
            None,
            row.get("control_code"),
            columns,
        )

    def _decode(self, prompt_ids: list[int], completion_ids: list[int]) -> str:
        """A continuation's text; some tokenizers drop the space before the first word of a text."""
        if not self.model.config.is_encoder_decoder:
            before = self.tokenizer.decode(prompt_ids, skip_special_tokens=True)
            whole = self.tokenizer.decode(prompt_ids + completion_ids, skip_special_tokens=True)
            if whole.startswith(before):
                return whole[len(before) :]
        return self.tokenizer.decode(completion_ids, skip_special_tokens=True)

    def _score(self, rollouts: list[Rollout]) -> None:
        if self.reward is None:
            return
        names = {name for rollout in rollouts for name in rollout.columns}
        columns = {name: [rollout.columns.get(name) for rollout in rollouts] for name in sorted(names)}
        if any(rollout.control_code is not None for rollout in rollouts):
            columns["control_code"] = [rollout.control_code for rollout in rollouts]
        rewards = score(
            self.reward,
            [rollout.prompt for rollout in rollouts],
            [rollout.completion for rollout in rollouts],
            [rollout.completion_ids for rollout in rollouts],
            columns,
        )
        for rollout, reward in zip(rollouts, rewards):
            rollout.reward = reward


def reading_for(model: nn.Module, critic: Optional[Critic]) -> Reading:
    """What is kept of a language model's states for a critic; without one, the last hidden states."""
    return reading_of(CriticModelConfig(), model) if critic is None else critic.reading(model)


def without_hidden(rollouts: Iterable[Rollout], reading: Reading) -> list[Rollout]:
    """Those for which it isn't known, or something else, what a critic reads."""
    return [rollout for rollout in rollouts if rollout.hidden is None or rollout.reading != reading]


def fill_hidden(
    model: nn.Module, rollouts: Sequence[Rollout], batch_size: int = 32, critic: Optional[Critic] = None
) -> None:
    """Compute what the critic reads of saved roll-outs, in one forward pass of their texts.

    Args:
        model: The language model that sampled them.
        rollouts: Their `hidden` is set, on the CPU and in the model's dtype.
        batch_size: Texts per forward pass.
        critic: Says what is read, and its LoRA takes part, if it has one; None: the last hidden states.
    """
    reading, dtype = reading_for(model, critic), LanguageModel(model).dtype
    by_length = sorted(rollouts, key=lambda rollout: len(rollout.prompt_ids) + len(rollout.completion_ids))
    with inference(model):
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            for rollout, states in zip(batch, encode(model, batch, critic)):
                rollout.hidden = states[: rollout.states].to("cpu", dtype, copy=True)
                rollout.reading = reading


def encode(
    model: nn.Module, rollouts: Sequence[Rollout], critic: Optional[Critic] = None, reading: Optional[Reading] = None
) -> torch.Tensor:
    """What a critic reads of roll-outs, `[batch, states, state_size]`, from one forward pass of their texts.

    A row's first `rollout.states` states count, what follows is padding. Gradients go into the critic's LoRA, if it has
    one.

    Args:
        model: The language model.
        rollouts: The texts.
        critic: Whose; None: the last hidden states.
        reading: Read this instead.
    """
    base: Any = unwrapped(model)
    device = device_of(model)
    reading = reading_for(model, critic) if reading is None else reading
    prompts = [rollout.prompt_ids for rollout in rollouts]
    completions = [rollout.completion_ids for rollout in rollouts]
    # padding comes last, where no token of the text sees it; any token will do
    if base.config.is_encoder_decoder:
        tokens, mask = (part.to(device) for part in padded(prompts, 0, "right"))
        encoder: Any = base.get_encoder()
        encoded = encoder(input_ids=tokens, attention_mask=mask)[0]
        inputs, _ = padded([[start_token(base), *completion] for completion in completions], 0, "right")
        with _adapted(critic, model):
            return read(model, reading, inputs.to(device), encoder_hidden_states=encoded, encoder_attention_mask=mask)
    inputs, mask = (part.to(device) for part in padded([p + c for p, c in zip(prompts, completions)], 0, "right"))
    with _adapted(critic, model):
        hidden = read(model, reading, inputs, mask)
    states = max(rollout.states for rollout in rollouts)
    first = torch.tensor([len(prompt) - 1 for prompt in prompts], device=hidden.device)
    index = (first[:, None] + torch.arange(states, device=hidden.device)).clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A graph that is built within it doesn't reach these parameters."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _distribute(model: nn.Module, rollouts: list[Rollout], hidden: torch.Tensor, reading: Reading) -> None:
    """Give each roll-out its part of what was read as it was written, `[batch, steps, state_size]`."""
    hidden = hidden.to("cpu", LanguageModel(model).dtype)
    for rollout, states in zip(rollouts, hidden):
        rollout.hidden, rollout.reading = states[: rollout.states].clone(), reading
    # if all rows of a batch have ended, generate doesn't compute a state after the token that ended the last of them
    short = [rollout for rollout in rollouts if rollout.states > hidden.shape[1]]
    with inference(model):
        for rollout, states in zip(short, encode(model, short, reading=reading) if short else ()):
            rollout.hidden = states[: rollout.states].to("cpu", hidden.dtype, copy=True)


@contextmanager
def _recording(model: nn.Module, reading: Reading, mask: Optional[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """What is read of the text, `[batch, state_size]`, after each forward pass within the block.

    Args:
        model: The language model.
        reading: What.
        mask: 0 where a token of the prompts is padding, `[batch, tokens]`.
    """
    steps: list[torch.Tensor] = []
    states: dict[int, torch.Tensor] = {}
    running = [RunningStates()]
    places = [0]

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[index] = output_state(output).detach().clone()

        return hook

    def end(module: nn.Module, args: Any, output: Any) -> None:
        keep(reading.last)(module, args, output)
        start, places[0] = places[0], places[0] + states[reading.last].shape[1]
        real = None if mask is None else mask[:, start : places[0]]
        if real is not None and real.shape[1] < places[0] - start:  # tokens that were written, or virtual ones before
            more = places[0] - start - real.shape[1]
            real = nn.functional.pad(real, (0, more) if start else (more, 0), value=1)
        running[0] = running[0].after(states, reading.wanted, real)
        steps.append(reading.of(LastStates(states[reading.last][:, -1], running[0])))

    layers = decoder_layers(LanguageModel(model))
    inner = [index for index in reading.layers if index < reading.last]
    hooks = [(layers[index - 1], keep(index)) for index in inner]  # type: ignore[index]
    with hooks_of_this_thread([*hooks, (backbone(model), end)]):
        yield steps


@contextmanager
def _sampling_from(seed: int, model: nn.Module) -> Iterator[None]:
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _adapted(critic: Optional[Critic], model: nn.Module) -> Iterator[None]:
    if critic is None:
        yield
        return
    with critic.adapted(model), frozen(model.parameters()):
        yield


def _up_to_end(tokens: list[int], end: set[int]) -> list[int]:
    for number, token in enumerate(tokens):
        if token in end:
            return tokens[: number + 1]
    return tokens
