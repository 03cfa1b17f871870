# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Samples texts for every stage: with transformers, many texts behind one prefix, or with vLLM where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from generation_ext.shared_prefix.cache import EMPTY, SharedPrefix, common_prefix
from generation_ext.shared_prefix.decoding import STOP_STEPS, can_share, prefix_of, sample_tokens
from generation_ext.shared_prefix.sampling import Sampling, row_generator
from peft_ext.language_model import CAUSAL, end_tokens, inference, language_model
from trl_ext.almost.prompts.chat import before_marks


# A prefix of fewer tokens isn't worth a pass of its own.
_SHORTEST_PREFIX = 8


class Request(NamedTuple):
    """A text to go on from; texts of one key, seed and model are the same."""

    key: str
    prompt: str


# Indices of the list of requests, and each one's texts.
WrittenTexts = list[tuple[int, list[str]]]


class Backend(Protocol):
    """Something that samples texts."""

    tokenizer: PreTrainedTokenizerBase

    def stream(
        self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int], bool] = ...
    ) -> Iterator[WrittenTexts]:
        """Texts of each request, batch by batch; batches whose requests are all `done` are left out, and what is in a
        batch doesn't depend on it, so that an interrupted run goes on to the same texts."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[str]]:
        """Texts of each request."""
        texts = dict(pair for batch in self.stream(requests, sampling) for pair in batch)
        return [texts[index] for index in range(len(requests))]


def _nothing_done(index: int) -> bool:
    return False


class TransformersBackend(Backend):
    """Samples with a transformers model.

    What all requests of a call begin with (the demonstrations) runs through the model once, and its keys and values are
    read once a step for all rows; a request's own tokens run once for all its samples. Batches are of about equal length,
    and finished texts leave theirs.

    Every text has random numbers of its own. In another batch its logits may still differ by a rounding error, which
    now and then draws another token.

    Args:
        model: A causal language model, or a `PeftModel` of one.
        tokenizer: Its tokenizer.
        batch_size: Texts that are written side by side.

    Raises:
        TypeError: If it is no causal language model.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> None:
        self.language_model = language_model(model, must_share=True)
        if self.language_model.kind != CAUSAL:
            raise TypeError(f"model ({type(self.language_model.base).__name__}) is no causal language model.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be positive.")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.new_tokens = 0
        self.ends = end_tokens(self.language_model.base) | set(tokenizer.all_special_ids)
        self._prefix: SharedPrefix = EMPTY

    def stream(
        self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int], bool] = _nothing_done
    ) -> Iterator[WrittenTexts]:
        """Texts of each request, batch by batch; see [`Backend`].

        Raises:
            ValueError: If a prompt is empty, or leaves no room in the model's context.
        """
        prompts = [tokens_of(self.tokenizer, request.prompt) for request in requests]
        self._check(requests, prompts, sampling)
        if not prompts:
            return
        shared = self._shared(prompts)
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
        size = max(1, self.batch_size // sampling.samples)
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            if all(map(done, indices)):
                continue
            with inference(self.language_model.base):
                prefix = self._run_prefix(shared)
                texts = self._batch([prompts[i][len(shared) :] for i in indices], indices, requests, prefix, sampling)
            yield list(zip(indices, texts))

    def write_tokens(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[str], sampling: Sampling
    ) -> list[list[int]]:
        """New tokens of one text for each prompt, all side by side, with the token that ends it, if the model does.

        Args:
            prompts: Tokens; equal ones beside each other run once.
            keys: Together with the seed, what each text's random numbers depend on.
            sampling: `samples` and `stop` don't matter here.
        """
        shared = self._shared(prompts)
        rests = [tuple(prompt[len(shared) :]) for prompt in prompts]
        groups = [(rest, len(list(same))) for rest, same in groupby(rests)]
        if len({count for _, count in groups}) == 1:
            rests = [rest for rest, _ in groups]
        generators = [row_generator(f"{sampling.seed}/{key}") for key in keys]
        with inference(self.language_model.base):
            written = sample_tokens(
                self.language_model, self._run_prefix(shared), rests, generators, sampling, self.ends
            )
        self.new_tokens += sum(map(len, written))
        return written

    def _shared(self, prompts: Sequence[Sequence[int]]) -> Sequence[int]:
        shared = common_prefix(prompts) if can_share(self.language_model) and len(prompts) > 1 else []
        return shared if len(shared) >= _SHORTEST_PREFIX else []

    def _run_prefix(self, tokens: Sequence[int]) -> SharedPrefix:
        if self._prefix.tokens != tuple(tokens):
            self._prefix = prefix_of(self.language_model, tokens)
        return self._prefix

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        requests: Sequence[Request],
        prefix: SharedPrefix,
        sampling: Sampling,
    ) -> list[list[str]]:
        count = sampling.samples
        generators = [
            row_generator(f"{sampling.seed}/{requests[index].key}/{number}")
            for index in indices
            for number in range(count)
        ]
        over = partial(self._has_stop, stop=sampling.stop) if sampling.stop else None
        written = sample_tokens(self.language_model, prefix, prompts, generators, sampling, self.ends, over)
        written = [tokens[:-1] if tokens[-1] in self.ends else tokens for tokens in written]
        self.new_tokens += sum(map(len, written))
        texts = [before_marks(self._text(tokens), sampling.stop) for tokens in written]
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    def _has_stop(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        # a token is at least a byte, so a stop string has ended within the last tokens if it is there at all
        tail = self._text(tokens[-(max(len(s.encode()) for s in stop) + STOP_STEPS) :])
        return any(text in tail for text in stop)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _check(self, requests: Sequence[Request], prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        limit = self.language_model.max_length
        for request, prompt in zip(requests, prompts):
            if not prompt:
                raise ValueError(f"request {request.key!r} has an empty prompt.")
            if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
                raise ValueError(
                    f"request {request.key!r} has {len(prompt)} tokens, which with max_new_tokens="
                    f"{sampling.max_new_tokens} is more than the model's {limit}; use fewer shots, shorter queries or a "
                    "smaller max_new_tokens."
                )


class VLLMBackend(Backend):
    """Samples with vLLM, which shares prefixes by itself.

    Args:
        model: A hub id or folder.
        batch_size: Requests that are handed over, and come back, together.
        **kwargs: Passed to `vllm.LLM`.

    Raises:
        ImportError: If vLLM isn't installed.
    """

    def __init__(self, model: str, batch_size: int = 512, **kwargs: Any) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ImportError(
                "backend='vllm' needs: pip install vllm; backend='transformers' needs nothing."
            ) from error
        self._llm = LLM(model=model, **{"enable_prefix_caching": True, **kwargs})
        self._params = SamplingParams
        self.tokenizer = self._llm.get_tokenizer()
        self.batch_size, self.new_tokens = batch_size, 0

    def stream(
        self, requests: Sequence[Request], sampling: Sampling, done: Callable[[int], bool] = _nothing_done
    ) -> Iterator[WrittenTexts]:
        """Texts of each request, batch by batch; see [`Backend`]."""
        size = max(1, self.batch_size // sampling.samples)
        for start in range(0, len(requests), size):
            indices = range(start, min(start + size, len(requests)))
            if all(map(done, indices)):
                continue
            prompts = [{"prompt_token_ids": tokens_of(self.tokenizer, requests[i].prompt)} for i in indices]
            outputs = self._llm.generate(
                prompts, [self._params_of(requests[i], sampling) for i in indices], use_tqdm=False
            )
            texts = [[sample.text for sample in output.outputs] for output in outputs]
            self.new_tokens += sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
            yield list(zip(indices, texts))

    def _params_of(self, request: Request, sampling: Sampling) -> Any:
        return self._params(
            n=sampling.samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            max_tokens=sampling.max_new_tokens,
            stop=list(sampling.stop) or None,
            seed=int(row_generator(f"{sampling.seed}/{request.key}").integers(2**31)),
        )


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A prompt's tokens; with the tokenizer's start token, unless a chat template has written it already."""
    start = tokenizer.bos_token
    templated = bool(start) and text.startswith(str(start))
    tokens = list(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"])
    # a tokenizer that ends texts would have the model start another one
    is_ended = tokens[-1:] == [tokenizer.eos_token_id] and not templated
    return tokens[:-1] if is_ended and tokenizer("", verbose=False)["input_ids"] else tokens
