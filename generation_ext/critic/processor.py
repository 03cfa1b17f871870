# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""CriticControl as a logits processor: re-weights the likeliest tokens by how much each raises the critic's value."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import nn
from transformers import LogitsProcessor

from generation_ext.critic.reading import Reading, wanted_by
from generation_ext.critic.value import Critic
from generation_ext.shared_prefix.candidates import Branches, Prefix, branch
from generation_ext.shared_prefix.drafts import Draft, draft_of
from generation_ext.shared_prefix.encoded_text import ForwardRecorder, LastStates, PrefixEncoder, is_drafting
from peft_ext.language_model import ENCODER_DECODER, LanguageModel, end_tokens


MODES = ("exact", "action-value")


class _Valued(NamedTuple):
    """A draft, and candidates behind each of its texts with what they gain, both `[drafted + 1, k]`."""

    draft: Draft
    tokens: Optional[torch.Tensor] = None
    gains: Optional[torch.Tensor] = None


class CriticLogitsProcessor(LogitsProcessor):
    """Steers `generate` with one critic or several (Kim et al. 2023, equation 3, with an exponent).

    Of each row's `top_k` likeliest tokens, the log-probability goes from `log p(a | s)` to

        log p(a | s) + strength * (log V(s + a) - log V(s))

    up to the normalisation that `generate` does anyway. All other tokens keep theirs, as in the paper: dividing by
    `V(s)` keeps both kinds on one scale. With `mask_others`, they are ruled out instead.

    It is an ordinary logits processor, right with greedy search, sampling and beams. As an element of
    `logits_processor`, it works on the language model's own distribution, before temperature, `top_k` and `top_p`.
    Strength 0 or a constant critic change nothing; a negative strength steers away from the attribute.

    In `"exact"` mode, `V(s + a)` of all candidates of all rows comes from one forward pass of the language model (up
    to the layer that critics read, without its output head) on the cache that `generate` has just filled, which it
    finds through a hook on the model and only reads. In assisted decoding (an assistant model, prompt lookup), that
    one pass is of the candidates behind all drafted tokens; drafting itself isn't steered. Where the last forward
    pass wasn't the one that led to these scores (`use_cache=False`, a compiled model, a call outside of `generate`),
    or candidates can't be a tree behind several texts (ALiBi, relative positions, a critic with a LoRA), it encodes
    the text by itself, which is slower. In `"action-value"` mode, the critic guesses `V(s + a)` from the state before
    the token, without a forward pass.

    ```python
    with CriticLogitsProcessor(model, critic, strength=4.0) as processor:
        model.generate(**inputs, logits_processor=[processor])
    ```

    Without `with`, the hook stays until [`close`][CriticLogitsProcessor.close] or until the processor is garbage.

    Args:
        model: The language model that `generate` runs; it may be wrapped by PEFT, or packed.
        critic: The critic of this model, or several.
        top_k: How many tokens of each row are re-weighted, the paper's k.
        strength: The exponent of the value ratio; the paper's is 1. One for each critic, or one for all.
        mode: `"exact"` or `"action-value"` (critics that have that head).
        mask_others: Rule out all other tokens.
        attention_mask: The prompts' attention mask, `[prompts, tokens]`. It is needed only where the processor encodes
            left-padded text by itself; by default it then takes leading padding tokens for padding.

    Raises:
        ValueError: If a critic belongs to another model, or an argument is out of its range.
        TypeError: If `critic` is no critic.
    """

    def __init__(
        self,
        model: nn.Module,
        critic: Union[Critic, Sequence[Critic]],
        top_k: int = 10,
        strength: Union[float, Sequence[float]] = 1.0,
        mode: str = "exact",
        mask_others: bool = False,
        attention_mask: Optional[torch.Tensor] = None,
    ) -> None:
        self.model = model
        self.language_model = LanguageModel(model)
        self.critics = _checked_critics(model, critic, mode)
        self.strengths = _checked_strengths(strength, len(self.critics))
        vocabulary = self.language_model.config.vocab_size
        if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= vocabulary:
            raise ValueError(f"top_k={top_k!r} must be an integer from 1 to the vocabulary's {vocabulary} tokens.")
        self.top_k = top_k
        self.mode = mode
        self.mask_others = mask_others
        if self.language_model.keeps_state_itself:
            raise ValueError(
                f"model ({type(self.language_model.base).__name__}) keeps the state of a text in its own modules, where every "
                "forward pass of the critic's would change it; a critic can't steer it."
            )
        self._readings = {critic: critic.reading(model) for critic in self.critics}
        self._local = threading.local()
        # a critic with a LoRA reads its own encoding; all others share the language model's
        pad_token_id = _pad_token_id(model)
        self._adapted = {
            critic: PrefixEncoder(
                self.language_model, attention_mask, pad_token_id, wanted_by([self._readings[critic]])
            )
            for critic in self.critics
            if critic.config.lora_layers
        }
        wanted = wanted_by(reading for critic, reading in self._readings.items() if critic not in self._adapted)
        self.recorder = ForwardRecorder(self.language_model, wanted)
        self._own = PrefixEncoder(self.language_model, attention_mask, pad_token_id, wanted)

    @property
    def reads_model(self) -> bool:
        """Whether some critic reads the language model's own hidden states."""
        return any(critic not in self._adapted for critic in self.critics)

    def __enter__(self) -> CriticLogitsProcessor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the hook off the model and free what was encoded; the processor then encodes every text by itself."""
        self.recorder.close()
        self.recorder.drop()
        self._local = threading.local()
        for encoder in (self._own, *self._adapted.values()):
            encoder.reset()

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Re-weight the likeliest tokens.

        Args:
            input_ids: The text so far, `[batch, tokens]`.
            scores: Log-probabilities of the next token up to a constant, `[batch, vocabulary]`.

        Returns:
            New scores of the same shape and type.
        """
        if is_drafting():
            return scores
        candidates, usable = self.candidates(scores)
        if any(self.strengths):
            gain = self._gain(input_ids, candidates)
        else:
            gain = torch.zeros(candidates.shape, device=scores.device)
        self.recorder.drop()
        return self.reweighted(scores, candidates, usable, gain)

    def candidates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens of each row, `[batch, k]`, and which of them aren't ruled out already."""
        top = torch.topk(scores, min(self.top_k, scores.shape[-1]), dim=-1)
        return top.indices, torch.isfinite(top.values)

    def reweighted(
        self, scores: torch.Tensor, candidates: torch.Tensor, usable: torch.Tensor, gain: torch.Tensor
    ) -> Any:
        """Scores with `gain` (`[batch, k]`) added to those of usable candidates. Rows without any are left alone."""
        own = scores.gather(-1, candidates)
        new = torch.where(usable, own + gain.to(own), own)
        if not self.mask_others:
            return scores.scatter(-1, candidates, new)
        result = torch.full_like(scores, -math.inf).scatter(-1, candidates, new)
        return torch.where(usable.any(dim=-1, keepdim=True), result, scores)

    def gain_on(self, prefix: Prefix, branches: Branches) -> torch.Tensor:
        """`strength * (log V(s + a) - log V(s))` of the critics without a LoRA, from candidates' states, `[batch, k]`."""
        return self._ratios(prefix, branches, branches.candidates)

    def gain_of_adapted(self, input_ids: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """The same of the critics with a LoRA; each reads the text by itself."""

        def ratio(critic: Critic) -> torch.Tensor:
            with critic.adapted(self.model):
                prefix, reading = self._adapted[critic](input_ids, self._cross(input_ids)), self._readings[critic]
                if self.mode != "exact":
                    return _log_action_ratio(critic, reading.of(prefix), candidates)
                branches = branch(self.language_model, prefix, candidates)
                return _log_ratio(critic, reading.of(prefix), reading.of(branches))

        return self._total(ratio, candidates, adapted=True)

    def reading(self, critic: Critic) -> Reading:
        """What one of the critics reads."""
        return self._readings[critic]

    def prefix(self, input_ids: torch.Tensor) -> Prefix:
        """The text so far as the language model has encoded it: in `generate`'s last forward pass, or in one of ours."""
        prefix = self.recorder.prefix(input_ids)
        if prefix is not None:
            self._own.reset()
            return prefix
        return self._own(input_ids, self._cross(input_ids))

    def _gain(self, input_ids: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == 0 and self.recorder.prefix(input_ids) is None:
            raise ValueError("input_ids has no token; a critic reads the state after at least one (such as BOS).")
        gain = self.gain_of_adapted(input_ids, candidates)
        if self.reads_model:
            drafted = self._drafted_gain(input_ids, candidates)
            if drafted is not None:
                gain += drafted.to(gain.device)
            elif self.mode == "exact":
                prefix = self.prefix(input_ids)
                gain += self.gain_on(prefix, branch(self.language_model, prefix, candidates)).to(gain.device)
            else:
                gain += self._action_gain(input_ids, candidates)
        return gain

    def _drafted_gain(self, input_ids: torch.Tensor, candidates: torch.Tensor) -> Optional[torch.Tensor]:
        """The gain where `generate` has read drafted tokens after the text, or after its beginning: all of them are
        valued when the first is asked for. None if this isn't such a text."""
        if self.recorder.recorded is not None:
            self._local.draft = None
            if self.recorder.logits is None or self.recorder.last(input_ids) is not None:
                return None
            draft = draft_of(self.recorder, input_ids)
            if draft is None:
                return None
            tokens = gains = None
            if self.mode == "exact":
                tokens = draft.logits.float().topk(candidates.shape[1], dim=-1).indices[0]
                tokens[0] = candidates[0]
                after = draft.branch(self.language_model, list(range(len(tokens))), tokens)
                gains = None if after is None else self._ratios(draft.states, after, tokens)
            self._local.draft = _Valued(draft, tokens, gains)
        valued: Optional[_Valued] = getattr(self._local, "draft", None)
        place = None if valued is None else valued.draft.place(input_ids)
        if valued is None or place is None:
            return None
        if place == valued.draft.drafted:  # the last one
            self._local.draft = None
        state = valued.draft.at([place])
        if self.mode != "exact":
            return self._action_ratios(state, candidates)
        if valued.gains is None or valued.tokens is None:
            return None
        same = candidates[0, :, None].to(valued.tokens.device) == valued.tokens[place]
        if bool(same.any(dim=-1).all()):
            return valued.gains[place, same.int().argmax(dim=-1)][None]
        # processors before this one have moved other tokens to the front
        found = valued.draft.branch(self.language_model, [place], candidates)
        return None if found is None else self._ratios(state, found, candidates)

    def _ratios(
        self, text: Union[Prefix, LastStates], after: Union[Branches, LastStates], like: torch.Tensor
    ) -> torch.Tensor:
        def ratio(critic: Critic) -> torch.Tensor:
            reading = self._readings[critic]
            return _log_ratio(critic, reading.of(text), reading.of(after))

        return self._total(ratio, like)

    def _action_ratios(self, text: Union[Prefix, LastStates], candidates: torch.Tensor) -> torch.Tensor:
        def ratio(critic: Critic) -> torch.Tensor:
            return _log_action_ratio(critic, self._readings[critic].of(text), candidates)

        return self._total(ratio, candidates)

    def _action_gain(self, input_ids: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        text = self.recorder.last(input_ids) or self._own(input_ids, self._cross(input_ids))
        return self._action_ratios(text, candidates)

    def _total(
        self, ratio: Callable[[Critic], torch.Tensor], like: torch.Tensor, adapted: bool = False
    ) -> torch.Tensor:
        """The sum of `strength * ratio` over the critics with a LoRA, or those without; of the shape of `like`."""
        total = torch.zeros(like.shape, device=like.device)
        for critic, strength in zip(self.critics, self.strengths):
            if strength and (critic in self._adapted) == adapted:
                total += strength * ratio(critic).to(total.device)
        return total

    def _cross(self, input_ids: torch.Tensor) -> dict[str, Any]:
        """An encoder's states, which only `generate`'s own forward pass knows."""
        if self.language_model.kind != ENCODER_DECODER:
            return {}
        cross = self.recorder.cross
        if not cross or len(next(iter(cross.values()))) != len(input_ids):
            raise ValueError(
                "the processor hasn't seen the encoder's states for this text: call an encoder-decoder's processor "
                "within generate, or right after a forward pass of the model."
            )
        return cross


def _log_ratio(critic: Critic, state: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """`log V(s + a) - log V(s)`, `[batch, k]`; finite for all finite logits."""
    device = critic.mean.device
    return critic.log_value(states.to(device)) - critic.log_value(state.to(device)).unsqueeze(-1)


def _log_action_ratio(critic: Critic, state: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    device = critic.mean.device
    return critic.action_log_ratio(state.to(device), candidates.to(device))


def _checked_critics(model: nn.Module, critic: Any, mode: str) -> list[Critic]:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {MODES}.")
    critics = [critic] if isinstance(critic, Critic) else list(critic) if isinstance(critic, Sequence) else [critic]
    if not critics:
        raise ValueError("critic is empty; pass a critic, or a list of some.")
    for one in critics:
        if not isinstance(one, Critic):
            raise TypeError(
                f"critic is a {type(one).__name__}; pass a generation_ext.critic.Critic, or a list of them."
            )
        one.attach(model)
        if mode == "action-value" and not one.config.action_values:
            raise ValueError(
                "mode='action-value' needs a critic with an action-value head; train one with action_values=True, or "
                "use mode='exact'."
            )
    return critics


def _checked_strengths(strength: Any, count: int) -> list[float]:
    strengths = [strength] * count if isinstance(strength, (int, float)) else list(strength)
    if len(strengths) != count:
        raise ValueError(
            f"strength has {len(strengths)} numbers for {count} critics; pass one for each, or one for all."
        )
    for one in strengths:
        if not isinstance(one, (int, float)) or isinstance(one, bool) or not math.isfinite(one):
            raise ValueError(
                f"strength={strength!r} must be a finite number (negative: steers away), or one per critic."
            )
    return [float(one) for one in strengths]


def _pad_token_id(model: nn.Module) -> Optional[int]:
    """What generate takes for padding where it gets no mask: a padding token that isn't an end token, too."""
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    if not isinstance(pad, int) or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    return None if pad in end_tokens(model) else pad
