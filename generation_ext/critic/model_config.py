# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a critic is made of, as its config.json says it."""

from __future__ import annotations

import string
from typing import Any, Optional

from transformers import PretrainedConfig

from peft_ext.file_formats import check_fields, list_of, mapping_of, number, text, truth, whole


HEADS = ("linear", "mlp")
AFFINE, LINEAR = ACTION_FORMS = ("affine", "linear")
_PLACEHOLDERS = {"code", "prompt"}
# Of config.json; those of PretrainedConfig are transformers'.
FIELDS = {
    "hidden_size": whole(1).means("width of the language model's last hidden states"),
    "base_model_name_or_path": text().or_null(),
    "base_model_fingerprint": text().or_null().means("which language model it reads"),
    "base_model_adapters": text().or_null().means("which adapters lay on it"),
    "head": text(*HEADS),
    "mlp_size": whole(1),
    "lora_rank": whole(0),
    "lora_alpha": number(above=0),
    "lora_target_modules": list_of(text()).or_null(),
    "lora_layers": mapping_of(list_of(whole(1), length=2)).means("inputs and outputs of each layer with LoRA"),
    "action_values": truth(),
    "action_rank": whole(0),
    "action_form": text(*ACTION_FORMS).means("of the log odds of action values in the hidden state"),
    "embedding_size": whole(1).or_null(),
    "vocab_size": whole(1).or_null(),
    "control_codes": list_of(text()),
    "prompt_template": text(),
    "layers": list_of(whole(1)).or_null().means("layers whose states it reads; null: the last hidden states"),
    "running_mean": truth().means("whether it reads their mean over the text, too"),
    "state_size": whole(1).or_null().means("width of all that it reads; null: hidden_size"),
    "choose_layer": truth().means("whether its training still has to choose the layer"),
}


class CriticModelConfig(PretrainedConfig):
    """What a critic is made of, and the language model that it belongs to.

    Args:
        hidden_size: Width of the language model's last hidden state, which is what its output head reads.
        base_model_name_or_path: Where the language model lies; for messages, it may have moved.
        base_model_fingerprint: What tells language models apart, see [`base_fingerprint`].
        base_model_adapters: What tells the adapters on it apart, see [`adapters_fingerprint`]; None: not known.
        head: `"linear"` (the paper's) or `"mlp"` (one hidden layer).
        mlp_size: Width of the MLP's hidden layer.
        lora_rank: 0, or the rank of the critic's own LoRA: the critic then reads hidden states that the language model
            computes *with* it, and the language model itself stays as it is. It costs a forward pass of the text of
            its own.
        lora_alpha: The LoRA's output is scaled by `lora_alpha / lora_rank`.
        lora_target_modules: Endings of the names of the linear layers with a LoRA; None: PEFT's choice for this kind of
            model, else all linear layers.
        lora_layers: Filled by [`Critic.for_model`]: name (in the backbone) -> inputs and outputs of a layer with LoRA.
        action_values: Also have the head that scores tokens from the state before them.
        action_rank: Rank of that head's map from hidden states to token embeddings; 0: a dense one.
        action_form: `"affine"`: it also has a bias for each token and each state, and steers by the value ratio
            `Q / V` as the exact mode does. `"linear"`: the log odds of Q over V are linear in the hidden state, and are
            what it steers by; a change of low rank of the language model's output head, which
            [`Critic.to_lora`] writes as a LoRA.
        embedding_size: Width of the language model's token embeddings; None: `hidden_size`.
        vocab_size: Number of token embeddings; for messages.
        control_codes: The attributes that one critic was trained for, by their names in the prompt; empty: one
            attribute, and nothing is put into the prompt.
        prompt_template: How a control code is put before a prompt.
        layers: The layers whose hidden states the critic reads: n, the states after layer n. None: the last hidden
            states, behind the model's final normalisation.
        running_mean: Also read the mean of these states over the text so far, prompt and continuation.
        state_size: Width of all that is read; None: `hidden_size`.
        choose_layer: The layer is still to be chosen, by [`CriticTrainer`] on its first roll-outs.

    Raises:
        ValueError: If an argument is out of its range; the message says which are possible.
    """

    model_type = "critic"

    hidden_size: int = 768
    base_model_name_or_path: Optional[str] = None
    base_model_fingerprint: Optional[str] = None
    base_model_adapters: Optional[str] = None
    head: str = "linear"
    mlp_size: int = 256
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_target_modules: Optional[list[str]] = None
    lora_layers: Any = None
    action_values: bool = False
    action_rank: int = 0
    action_form: str = AFFINE
    embedding_size: Optional[int] = None
    vocab_size: Optional[int] = None
    control_codes: Any = None
    prompt_template: str = "{code}: {prompt}"
    layers: Optional[list[int]] = None
    running_mean: bool = False
    state_size: Optional[int] = None
    choose_layer: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.lora_layers = self.lora_layers or {}
        if not isinstance(self.control_codes, str):
            self.control_codes = list(self.control_codes or [])
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        check_fields({name: getattr(self, name) for name in FIELDS}, FIELDS, "a critic's config", "Mend it.")
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(self.prompt_template) if field is not None}
        except ValueError as error:
            raise ValueError(f"prompt_template={self.prompt_template!r} is no template: {error}.") from error
        if fields != _PLACEHOLDERS:
            raise ValueError(
                f"prompt_template={self.prompt_template!r} must have the places {{code}} and {{prompt}}, and no other."
            )
