# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The critic: reads the probability that the finished text will have an attribute off a frozen language model's hidden
states."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from generation_ext.critic.card import critic_card
from generation_ext.critic.model_config import AFFINE, LINEAR, CriticModelConfig
from generation_ext.critic.own_lora import adding, lora_layers
from generation_ext.critic.reading import (
    AUTO,
    Layer,
    Reading,
    checked_layers,
    read,
    read_width,
    reading_of,
)
from peft_ext.language_model import (
    adapters_fingerprint,
    base_fingerprint,
    base_name,
    embedding_weight,
    hidden_size,
    other_adapters,
    token_embedding,
)
from peft_ext.model_card import Card
from peft_ext.sealing import OwnFiles


class Critic(OwnFiles, PreTrainedModel):
    """The value head of a frozen language model, `V(s) = P(the finished text has the attribute | the text so far)`.

    It never holds the language model: `save_pretrained` writes the head (and its LoRA) alone. Make one with
    [`for_model`][Critic.for_model], or load one with `from_pretrained` and give it its language model with
    [`attach`][Critic.attach].

    It starts as V = 1/2 everywhere, which steers nothing; training begins at the mean outcome.
    """

    config_class = CriticModelConfig
    base_model_prefix = "critic"
    main_input_name = "hidden"

    def __init__(self, config: CriticModelConfig) -> None:
        super().__init__(config)
        size = self.state_size
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        is_mlp = config.head == "mlp"
        self.hidden_layer: Optional[nn.Linear] = nn.Linear(size, config.mlp_size) if is_mlp else None
        self.head = nn.Linear(config.mlp_size if is_mlp else size, 1)
        if config.action_values:
            embedding_size = config.embedding_size or size
            self.register_buffer("embedding_scale", torch.ones(()))
            is_affine = config.action_form == AFFINE
            self.action_bias = nn.Linear(size, 1) if is_affine else None
            self.action_down = nn.Linear(size, config.action_rank, bias=False) if config.action_rank else None
            self.action_map = nn.Linear(config.action_rank or size, embedding_size, bias=is_affine)
        self.lora_a = nn.ParameterList(
            nn.Parameter(torch.empty(config.lora_rank, inputs)) for inputs, _ in config.lora_layers.values()
        )
        self.lora_b = nn.ParameterList(
            nn.Parameter(torch.empty(outputs, config.lora_rank)) for _, outputs in config.lora_layers.values()
        )
        # in a list, so that neither parameters() nor save_pretrained see the language model's weight
        self._embedding: list[nn.Module] = []
        self.post_init()

    @property
    def state_size(self) -> int:
        """Width of what the critic reads of a text: a state, or several."""
        return self.config.state_size or self.config.hidden_size

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        layer: Layer = AUTO,
        running_mean: bool = True,
        head: str = "linear",
        mlp_size: int = 256,
        action_values: bool = False,
        action_rank: int = 0,
        action_form: str = AFFINE,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        lora_target_modules: Optional[list[str]] = None,
        control_codes: Optional[list[str]] = None,
        prompt_template: str = "{code}: {prompt}",
    ) -> Critic:
        """A fresh critic for a language model, on its device, in float32.

        Args:
            model: A causal or encoder-decoder language model; it may be wrapped by PEFT, or packed.
            layer: The layer whose hidden states are read: n, the states after layer n; negative numbers count from the end,
                -1 is the last. Or several. `"auto"`: the one that explains most of the outcome on held-out roll-outs,
                chosen as [`CriticTrainer`] begins (until then, one above the middle); with a LoRA, the last; with
                `action_form="linear"`, the last alone, without its mean.
            running_mean: Read the mean of these states over the text so far (prompt and continuation), too. With `layer=-1`
                and without it, the critic is the paper's, which earlier versions made.
            head, mlp_size, action_values, action_rank, action_form, lora_rank, lora_alpha, lora_target_modules,
                control_codes, prompt_template: See [`CriticModelConfig`].

        Raises:
            ValueError: If an argument is out of its range, or no layer has one of the LoRA's names.
            TypeError: If `model` is not a language model of transformers.
        """
        embedding = token_embedding(model)
        if action_values and action_form == LINEAR and layer == AUTO:
            layer, running_mean = -1, False  # what the output head reads
        if lora_rank and layer == AUTO:
            layer = -1
        read_layers, state_size = checked_layers(model, layer, running_mean)
        layers: dict[str, list[int]] = {}
        if lora_rank:
            layers = lora_layers(model, lora_target_modules, read_layers)
        config = CriticModelConfig(
            hidden_size=hidden_size(model),
            base_model_name_or_path=base_name(model),
            base_model_fingerprint=base_fingerprint(model),
            base_model_adapters=adapters_fingerprint(model),
            head=head,
            mlp_size=mlp_size,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_target_modules=lora_target_modules,
            lora_layers=layers,
            action_values=action_values,
            action_rank=action_rank,
            action_form=action_form,
            embedding_size=embedding_weight(embedding).shape[1],
            vocab_size=embedding_weight(embedding).shape[0],
            control_codes=control_codes,
            prompt_template=prompt_template,
            layers=read_layers,
            running_mean=running_mean,
            state_size=state_size,
            choose_layer=layer == AUTO,
        )
        critic = cls(config).to(embedding_weight(embedding).device).eval()
        if action_values:
            # embeddings differ in size by orders of magnitude between models
            sample = embedding_weight(embedding)[:4096].detach().float()
            critic.embedding_scale.fill_(1.0 / sample.square().mean().sqrt().clamp(min=1e-6))
        return critic.attach(model)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logit of the value.

        Args:
            hidden: What is read, `[..., state_size]`, see [`read`][Critic.read]; any float type.

        Returns:
            Logits `[...]` in float32.
        """
        return self._value_logit(self._standardised(hidden))

    def value(self, hidden: torch.Tensor) -> torch.Tensor:
        """`V(s)` in [0, 1], float32 `[...]` for what is read, `[..., state_size]`."""
        return torch.sigmoid(self.forward(hidden))

    def log_value(self, hidden: torch.Tensor) -> torch.Tensor:
        """`log V(s)`, float32 `[...]`; finite where V itself would be rounded to 0."""
        return nn.functional.logsigmoid(self.forward(hidden))

    def action_logits(self, hidden: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """The logit of `Q(s, a) = V(s + a)`, guessed from the state before the token.

        Args:
            hidden: What is read of the text so far, `[..., state_size]`.
            candidates: Tokens `[..., k]`.

        Returns:
            Logits `[..., k]` in float32.

        Raises:
            ValueError: If the critic has no such head, or doesn't know its language model yet.
        """
        match = self._match(hidden, candidates)  # says what is missing
        states = self._standardised(hidden)
        own = self._value_logit(states)
        if self.action_bias is not None:
            own = own + self.action_bias(states).squeeze(-1).float()
        return own.unsqueeze(-1) + match

    def action_log_ratio(self, hidden: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """What each token's log-probability gains at strength 1, float32 `[..., k]`: `log Q(s, a) - log V(s)`, or, of a
        critic of `action_form="linear"`, the difference of the log odds; see [`action_logits`][Critic.action_logits]."""
        if self.config.action_values and self.config.action_form == LINEAR:
            return self._match(hidden, candidates)
        return self.action_log_values(hidden, candidates) - self.log_value(hidden).unsqueeze(-1)

    def _match(self, hidden: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """How well tokens go with what the action-value head wants after a state, `[..., k]`."""
        if not self.config.action_values:
            raise ValueError(
                "this critic has no action-value head; train one with action_values=True, or use mode='exact'."
            )
        if not self._embedding:
            raise ValueError("the action-value head reads the language model's embeddings: call attach(model) first.")
        states = self._standardised(hidden)
        if self.config.action_form == LINEAR:
            states = hidden.to(self.mean.dtype) / self.root_mean_square
        tokens = embedding_weight(self._embedding[0])[candidates].to(states.dtype) * self.embedding_scale
        mapped = self.action_map(states if self.action_down is None else self.action_down(states))
        return ((tokens @ mapped.unsqueeze(-1)).squeeze(-1) / math.sqrt(mapped.shape[-1])).float()

    @property
    def root_mean_square(self) -> torch.Tensor:
        """Of each dimension of the hidden states, `[hidden_size]`: what a linear action-value head divides them by, which
        takes no mean off."""
        return (self.mean.square() + self.std.square()).sqrt()

    def action_log_values(self, hidden: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """`log Q(s, a)`, float32 `[..., k]`; see [`action_logits`][Critic.action_logits]."""
        return nn.functional.logsigmoid(self.action_logits(hidden, candidates))

    @torch.no_grad()
    def fit_standardisation(self, hidden: torch.Tensor) -> None:
        """Set the mean and deviation by which hidden states are standardised; the head's weights stay.

        Args:
            hidden: What is read, `[..., state_size]`, of at least two texts.

        Raises:
            ValueError: If there are fewer than two states, or some are not finite.
        """
        states = hidden.reshape(-1, self.state_size).double()
        if len(states) < 2 or not torch.isfinite(states).all():
            raise ValueError(
                f"hidden has {len(states)} states{'' if len(states) < 2 else ', some of them not finite'}; "
                "fit_standardisation needs at least two finite ones."
            )
        std = states.std(dim=0)
        # a dimension that hardly moves would be blown up by what rounding leaves of it
        std = std.clamp(min=1e-3 * float(std.mean())).clamp(min=1e-8)
        self.mean.copy_(states.mean(dim=0))
        self.std.copy_(std)

    @torch.no_grad()
    def start_at(self, value: float) -> None:
        """Let V be `value` everywhere, if the head is still as it was made; a trained head stays.

        The bias moves by about the learning rate per step, and would need hundreds of steps to a rare attribute's value.

        Args:
            value: In [0, 1]; kept 0.001 away from both.
        """
        if not self.head.weight.any() and not self.head.bias.any():
            self.head.bias.fill_(float(torch.logit(torch.tensor(value), eps=1e-3)))

    def check_model(self, model: nn.Module) -> None:
        """Check that the critic belongs to a language model; warns if that has other adapters than it was made on.

        Raises:
            ValueError: If hidden sizes or fingerprints differ (without a fingerprint: the names); names both models.
        """
        config = self.config
        own = f"the critic belongs to {config.base_model_name_or_path or 'a model without a name'!r}"
        other = f"this model is {base_name(model) or 'one without a name'!r}"
        size = hidden_size(model)
        if size != config.hidden_size:
            raise ValueError(
                f"{own} with hidden states of {config.hidden_size}, but {other} with {size}; load that model, or "
                "train a critic for this one."
            )
        width = read_width(config, model)
        if width != self.state_size:
            raise ValueError(
                f"{own} and has weights for states of {self.state_size}, but layers={config.layers} and running_mean="
                f"{config.running_mean} of its config give {width}; mend its config.json, or get its folder anew."
            )
        if config.base_model_fingerprint is not None:
            fingerprint = base_fingerprint(model)
            if fingerprint != config.base_model_fingerprint:
                raise ValueError(
                    f"{own} (fingerprint {config.base_model_fingerprint}), but {other} (fingerprint {fingerprint}): "
                    "its hidden states mean something else; load that model, or train a critic for this one."
                )
        elif config.base_model_name_or_path and base_name(model) not in (None, config.base_model_name_or_path):
            raise ValueError(
                f"{own}, but {other}; if they are the same, set the critic's config.base_model_name_or_path to None."
            )
        others = other_adapters(model, config.base_model_adapters)
        if others is not None:
            warnings.warn(f"{own}; {others}. Load that adapter, or train a critic for this one.", stacklevel=3)

    def attach(self, model: nn.Module) -> Critic:
        """Check a language model and remember its token embeddings, which the action-value head reads.

        The language model isn't changed. Returns the critic itself.

        Raises:
            ValueError: As [`check_model`][Critic.check_model].
        """
        self.check_model(model)
        self._embedding = [token_embedding(model)]
        return self

    def to_lora(self, model: nn.Module, output_dir: Union[str, Path], strength: float = 1.0, to: str = "peft") -> Path:
        """Write a critic of `action_form="linear"` as an ordinary LoRA on the language model's output head, which any
        server that takes LoRAs steers by.

        With it, the model's distribution is that of [`CriticLogitsProcessor`] in the mode `"action-value"` with all tokens
        as its `top_k`, at this strength, up to rounding.

        Args:
            model: The critic's language model.
            output_dir: Where the adapter goes; files of others that lie there stay.
            strength: The exponent of the odds ratio; negative: steers away.
            to: `"peft"`: `adapter_config.json` and `adapter_model.safetensors`, for PEFT, vLLM and the like; `"gguf"`:
                `adapter.gguf` for llama.cpp's `--lora`, of models whose output head isn't tied to the embeddings.

        Returns:
            The folder, or the GGUF file.

        Raises:
            ValueError: If the critic isn't linear in the model's last hidden state, or no LoRA on the head does the same;
                nothing is written then.
        """
        from generation_ext.critic.to_lora import write_lora

        return write_lora(self, model, output_dir, strength, to)

    def model_card(self, token: Any = None, online: bool = False) -> Card:
        """What `save_pretrained` and `push_to_hub` write into README.md; see `peft_ext.model_card`."""
        return critic_card(self, token, online)

    @contextlib.contextmanager
    def adapted(self, model: nn.Module) -> Iterator[None]:
        """Within it, the language model computes the hidden states that this critic reads, in this thread.

        Without a LoRA, these are the language model's own, and nothing happens. With one, its layers add the LoRA's
        output to theirs; afterwards the language model is byte for byte as it was. A backward pass through
        checkpointed activations must lie within it, too.

        Raises:
            ValueError: If the model lacks a layer that the critic has a LoRA for.
        """
        if not self.config.lora_layers:
            yield
            return
        scale = self.config.lora_alpha / self.config.lora_rank
        with adding(dict(zip(self.config.lora_layers, zip(self.lora_a, self.lora_b))), model, scale):
            yield

    def reading(self, model: nn.Module) -> Reading:
        """What this critic reads of the language model's states."""
        return reading_of(self.config, model)

    def read(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """What the critic reads after each token of texts, which [`value`][Critic.value] and others take.

        ```python
        values = critic.value(critic.read(model, **tokenizer("The film was", return_tensors="pt")))  # [1, tokens]
        ```

        Args:
            model: The language model.
            input_ids: Texts `[batch, tokens]`; of an encoder-decoder the decoder's.
            attention_mask: 0 where a token is padding, at either end.
            inputs: What else the language model's backbone takes; of an encoder-decoder `encoder_hidden_states`.

        Returns:
            `[batch, tokens, state_size]`.
        """
        with self.adapted(model):
            return read(model, self.reading(model), input_ids, attention_mask, **inputs)

    def control_prompt(self, prompt: str, code: str) -> str:
        """Put a control code before a prompt, by the config's template; also one that training never saw.

        Raises:
            ValueError: If the code is empty, or the critic was trained for one attribute without a code.
        """
        if not self.config.control_codes:
            raise ValueError(
                f"code={code!r}: this critic was trained for one attribute, without control codes; pass the prompt "
                "as it is."
            )
        if not code.strip():
            raise ValueError(
                f"code={code!r} is empty; the critic knows {self.config.control_codes}, and others like them."
            )
        return self.config.prompt_template.format(code=code, prompt=prompt)

    def _standardised(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[-1] != self.state_size:
            raise ValueError(
                f"hidden has states of size {hidden.shape[-1]}, but this critic reads states of size {self.state_size}; "
                "critic.read(model, input_ids) gives them."
            )
        return (hidden.to(self.mean.dtype) - self.mean) / self.std

    def _value_logit(self, states: torch.Tensor) -> torch.Tensor:
        if self.hidden_layer is not None:
            states = nn.functional.gelu(self.hidden_layer(states))
        return self.head(states).squeeze(-1).float()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.hidden_layer or module is getattr(self, "action_down", None):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.zeros_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif module is self:
            init.zeros_(self.mean)
            init.ones_(self.std)
            if self.config.action_values:
                init.ones_(self.embedding_scale)
            for down, up in zip(self.lora_a, self.lora_b):
                init.kaiming_uniform_(down, a=math.sqrt(5))
                init.zeros_(up)
