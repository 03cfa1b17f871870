# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Models under a critic, critics with random weights, and the slow reference: it encodes the whole text of every
candidate, one by one, without a cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Optional

import peft
import torch
import transformers
from torch import nn

from generation_ext.critic import Critic
from peft_ext import PeqaConfig
from tests.tiny.models import tiny


TREES = ("llama", "gpt2", "opt", "gpt_neox", "mistral", "gemma3")
EXPANDED = ("lfm2", "bloom", "gpt_neo")
ENCODER_DECODERS = ("t5", "bart")


def build(name: str) -> nn.Module:
    """A fresh model; `"lora"` and `"peqa"` are Llama models wrapped by PEFT."""
    if name == "lora":
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return peft.get_peft_model(tiny("llama"), config).eval()
    if name == "peqa":
        return peft.get_peft_model(tiny("llama"), PeqaConfig(bits=4, task_type="CAUSAL_LM")).eval()
    return tiny(name)


@functools.cache
def shared(name: str) -> nn.Module:
    """One model of this name for all tests that leave it as it is."""
    return build(name)


def random_critic(model: nn.Module, seed: int = 5, **kwargs) -> Critic:
    """A critic whose values differ much between states."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        critic = Critic.for_model(model, **kwargs)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        critic.fit_standardisation(torch.randn(50, critic.state_size, generator=generator) * 2 + 1)
    return critic


PLAIN = {"layer": -1, "running_mean": False}  # the paper's critic: reads the last hidden state
# Of these, transformers' hidden states begin after the first layer, and not with the embeddings.
WITHOUT_EMBEDDINGS = ("mamba", "falcon_mamba", "mamba2")


def read_slowly(model: nn.Module, critic: Critic, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a critic reads of one text `[state_size]`, from all of transformers' hidden states `[1, tokens, hidden]`."""
    skipped = int(model.config.model_type in WITHOUT_EMBEDDINGS)
    parts = []
    for index in critic.config.layers or [-1]:
        states = hidden_states[index - skipped if index > 0 else -1][0].float()
        parts += [states[-1], states.mean(dim=0)] if critic.config.running_mean else [states[-1]]
    return torch.cat(parts)


class SlowProcessor(transformers.LogitsProcessor):
    """What `CriticLogitsProcessor` must give, in the slowest and most obvious way.

    Args:
        prompts: An encoder-decoder's inputs; padding (0) at either end of a row is taken off.
    """

    def __init__(
        self,
        model: nn.Module,
        critics: list[Critic],
        strengths: list[float],
        top_k: int,
        mask_others: bool = False,
        prompts: Optional[torch.Tensor] = None,
    ) -> None:
        self.model, self.critics, self.strengths = model, critics, strengths
        self.top_k, self.mask_others, self.prompts = top_k, mask_others, prompts
        self._known: dict[tuple, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        result = scores.clone()
        for row, (ids, own) in enumerate(zip(input_ids.tolist(), scores)):
            best = sorted(range(len(own)), key=lambda token: float(own[token]), reverse=True)[: self.top_k]
            best = [token for token in best if float(own[token]) != float("-inf")]
            if not best:
                continue
            if self.mask_others:
                result[row] = float("-inf")
            for token in best:
                result[row, token] = own[token]
                for critic, strength in zip(self.critics, self.strengths):
                    after = self._log_value(critic, ids + [token], row, len(input_ids))
                    result[row, token] += strength * (after - self._log_value(critic, ids, row, len(input_ids)))
        return result

    def _log_value(self, critic: Critic, ids: list[int], row: int, rows: int) -> torch.Tensor:
        """Each text once: a candidate of one step is the text of the next."""
        prompt = None if self.prompts is None else row // (rows // len(self.prompts))
        key = (id(critic), prompt, *ids)
        if key not in self._known:
            self._known[key] = self._encode(critic, ids, prompt)
        return self._known[key]

    def _encode(self, critic: Critic, ids: list[int], prompt: Optional[int]) -> torch.Tensor:
        with critic.adapted(self.model):
            if self.prompts is not None:
                source = self.prompts[prompt]
                output = self.model(
                    input_ids=source[source != 0][None],
                    decoder_input_ids=torch.tensor([ids]),
                    output_hidden_states=True,
                    use_cache=False,
                )
                return critic.log_value(read_slowly(self.model, critic, output.decoder_hidden_states))
            start = next((place for place, token in enumerate(ids) if token != 0), len(ids) - 1)
            output = self.model(input_ids=torch.tensor([ids[start:]]), output_hidden_states=True, use_cache=False)
            return critic.log_value(read_slowly(self.model, critic, output.hidden_states))
