# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What has to be known of a language model, whatever wraps it: its parts, its kind, its attention, and which model it is."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import threading
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


CAUSAL, ENCODER_DECODER, ENCODER = "causal", "encoder-decoder", "encoder"
# What a forward pass calls its cache: since transformers 5.23, and before.
CACHE_NAMES = ("cache", "past_key_values")
FULL, SLIDING = "full_attention", "sliding_attention"
_TAKES_MASKS = ("sdpa", "eager")
# Of the embeddings, for the fingerprint; of every tensor of the base, for the identity.
_SAMPLED_ROWS, _SAMPLED_NUMBERS = 64, 1024
_NO_ADAPTER = "none"
# Modules that are in evaluation mode for the time of some blocks -> how many.
_modes: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_modes_lock = threading.Lock()


def unwrapped(model: Any) -> Any:
    """The model under PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: nn.Module) -> PretrainedConfig:
    """Of a model of several parts, the config of what writes text."""
    return unwrapped(model).config.get_text_config(decoder=True)


def _decoder(base: Any) -> Optional[nn.Module]:
    """What transformers calls the decoder; of a model with a head that it takes for its own decoder (Llama 4's of text
    alone), the model below the head."""
    decoder = base.get_decoder()
    if decoder is base and base.get_output_embeddings() is not None:
        return next((child for child in base.children() if isinstance(child, PreTrainedModel)), base)
    return decoder


def backbone(model: nn.Module) -> nn.Module:
    """The module whose forward gives the last hidden state that the output head reads: of a causal model everything
    below its head, of an encoder-decoder model the decoder. PEFT's wrappers are looked through.

    Raises:
        TypeError: If `model` is not a language model of transformers.
    """
    base = unwrapped(model)
    if not hasattr(base, "get_decoder"):
        raise TypeError(f"model is a {type(base).__name__}; it must be a language model of transformers.")
    decoder = _decoder(base)
    if decoder is None or decoder is base:
        raise TypeError(
            f"model is a {type(base).__name__} without an output head above it; load it as a language model, such as "
            "AutoModelForCausalLM or AutoModelForSeq2SeqLM."
        )
    return decoder


def token_embedding(model: nn.Module) -> nn.Module:
    """What makes vectors of the input's tokens.

    Raises:
        TypeError: If `model` is not a language model of transformers.
    """
    base = unwrapped(model)
    if not hasattr(base, "get_input_embeddings"):
        raise TypeError(f"model is a {type(model).__name__}; it must be a language model of transformers.")
    return base.get_input_embeddings()


def embedding_weight(embedding: nn.Module) -> torch.Tensor:
    """The base model's own weight, under whatever adapter lies on it."""
    for wrapper in ("original_module", "base_layer"):
        embedding = getattr(embedding, wrapper, embedding)
    return embedding.weight  # type: ignore[return-value]


def hidden_size(model: nn.Module) -> int:
    """Width of the output head's input; OPT's differs from its config's hidden size."""
    config = text_config(model)
    for module in (unwrapped(model).get_output_embeddings(), getattr(unwrapped(model), "lm_head", None)):
        features = getattr(module, "in_features", None)
        if isinstance(features, int):
            return features
    return config.hidden_size


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients; every module's own mode comes back afterwards, when the last thread is through."""
    with _modes_lock:
        # also of a model that is in evaluation mode, if another thread's block has put it there
        held = [module for module in model.modules() if module.training or module in _modes]
        for module in held:
            _modes[module] = _modes.get(module, 0) + 1
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        with _modes_lock:
            for module in held:
                _modes[module] -= 1
                if not _modes[module]:
                    del _modes[module]
                    module.training = True


def start_token(model: nn.Module) -> int:
    """The token that an encoder-decoder model's decoder begins with, as `generate` has it.

    Raises:
        ValueError: If neither of its configs names one.
    """
    base = unwrapped(model)
    for config in (getattr(base, "generation_config", None), base.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if token is not None:
                return int(token[0] if isinstance(token, list) else token)
    raise ValueError("the encoder-decoder model has no decoder_start_token_id; set it in its generation_config.")


def start_tokens(model: nn.Module) -> list[int]:
    """The tokens that a decoder has behind it before it writes a text of its own, as in `generate`: [`start_token`], and
    the `forced_bos_token_id` of BART's and the translation models' families."""
    forced = getattr(getattr(unwrapped(model), "generation_config", None), "forced_bos_token_id", None)
    return [start_token(model), *([] if forced is None else [int(forced)])]


def end_tokens(model: Any) -> set[int]:
    """The tokens that end a text, as `generate` has them."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}


def check_tokens(
    model: nn.Module,
    rows: Iterable[Sequence[int]],
    tokenizer: Optional[PreTrainedTokenizerBase] = None,
    what: str = "text",
) -> None:
    """Refuse tokens that a model has no embedding of, as a tokenizer has that belongs to another model or that was given
    tokens without resizing the model.

    Args:
        model: The model.
        rows: Token ids of several texts.
        tokenizer: What made them, if it is at hand.
        what: What a row is, for the message.

    Raises:
        ValueError: Names the row, the token and the ways out.
    """
    base = unwrapped(model)
    embeddings = base.get_input_embeddings() if isinstance(base, PreTrainedModel) else None
    size = getattr(embeddings, "num_embeddings", None)
    if size is None:
        return
    for number, row in enumerate(rows):
        largest = max(row, default=0)
        if largest >= size:
            name = f"{tokenizer.convert_ids_to_tokens(int(largest))!r} ({largest})" if tokenizer else str(largest)
            raise ValueError(
                f"{what} {number} has the token {name}, which the model lacks: it has embeddings of {size} tokens. Use the "
                "tokenizer that belongs to the model, or call model.resize_token_embeddings(len(tokenizer)) and train the "
                "new ones."
            )


def padding_token(tokenizer: Any) -> int:
    """The token that rows of a batch are filled up with; one without a padding token takes its end token, or any."""
    return next(int(token) for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def cache_name(parameters: Collection[str]) -> Optional[str]:
    """What a forward pass with these parameters calls its cache; None if it takes none."""
    return next((name for name in CACHE_NAMES if name in parameters), None)


def takes_masks(config: Any) -> bool:
    """Whether the attention function takes a 4D mask of ours; flash attention doesn't."""
    return attention_implementation(config) in _TAKES_MASKS


def attention_implementation(config: Any) -> str:
    """The name of the attention function; some old models have but one, and don't name it."""
    return getattr(config, "_attn_implementation", None) or "eager"


def _layer_kinds(config: Any) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"]
    names = {DynamicLayer: FULL, DynamicSlidingWindowLayer: SLIDING}
    layers = DynamicCache(config=config).layers
    return [names.get(type(layer), type(layer).__name__) for layer in layers] or [FULL]


class LanguageModel:
    """A language model and what its forward passes take.

    Args:
        model: A transformers model, or a `PeftModel` of one.

    Attributes:
        base: The transformers model, without PEFT's wrapper; tuned layers are inside.
        kind: `"causal"`, `"encoder-decoder"` or `"encoder"`.
        backbone: Its part without the output head, see [`backbone`]; of an encoder-decoder model the decoder.
        config: The config of what writes text, the decoder's own where it has one.
        parameters: What the backbone's `forward` takes, in order.
        cache_argument: What it calls its cache.
        takes_positions: Whether it takes positions.

    Raises:
        TypeError: If it is no transformers model.
    """

    def __init__(self, model: nn.Module) -> None:
        base = unwrapped(model)
        if not isinstance(base, PreTrainedModel):
            raise TypeError(f"model must be a transformers model or a PeftModel of one, got {type(model).__name__}.")
        self.base: PreTrainedModel = base
        self.kind = ENCODER_DECODER if base.config.is_encoder_decoder else CAUSAL if is_causal(base) else ENCODER
        # a model without an output head is its own
        self.backbone: nn.Module = (None if self.kind == ENCODER else _decoder(base)) or base.base_model
        self.config: Any = text_config(self.backbone)
        self.parameters = [
            name for name in inspect.signature(type(self.backbone).forward).parameters if name != "self"
        ]
        self.cache_argument = cache_name(self.parameters) or CACHE_NAMES[-1]
        self.takes_positions = "position_ids" in self.parameters

    @property
    def keeps_state_itself(self) -> bool:
        """Whether the model's own modules keep the state of a text, instead of a cache that can be copied (RecurrentGemma)."""
        states = ("recurrent_states", "conv1d_state")
        return any(name in vars(module) for module in self.backbone.modules() for name in states)

    @property
    def device(self) -> torch.device:
        """Where token ids have to lie."""
        return self.base.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The float type of hidden states."""
        weight = self.base.get_input_embeddings().weight
        return weight.dtype if weight.is_floating_point() else torch.float32

    @property
    def eager(self) -> bool:
        """Whether masks have to be floats to be added."""
        return attention_implementation(self.config) == "eager"

    @cached_property
    def windows(self) -> dict[str, Optional[int]]:
        """Each kind of attention in the model -> how many tokens it sees, itself included; None: all."""
        kinds, window = _layer_kinds(self.config), getattr(self.config, "sliding_window", None)
        return {kind: window if kind == SLIDING else None for kind in (FULL, SLIDING) if kind in kinds}

    @cached_property
    def other_layers(self) -> list[str]:
        """Layers whose past isn't keys and values of single tokens, each of their own, so that no prefix can be shared."""
        kinds = _layer_kinds(self.config)
        others = sorted(set(kinds) - {FULL, SLIDING})
        if getattr(self.config, "kv_sharing_modes", None) is not None:
            others.append("keys shared between layers")
        if SLIDING in kinds and getattr(self.config, "sliding_window", None) is None:
            others.append("sliding attention without a sliding_window")
        return others

    @cached_property
    def unshareable(self) -> Optional[str]:
        """Why texts can't share what a prefix left in the model's layers; None if they can."""
        if self.other_layers:
            return f"it has layers whose past can't be shared as keys and values: {self.other_layers}"
        if self.keeps_state_itself:
            return "it keeps the state of a text in its own modules"
        if not takes_masks(self.config):
            name = attention_implementation(self.config)
            return (
                f"it computes attention with {name!r}, which takes no mask of its own; load it with "
                "attn_implementation='sdpa' (or model.set_attn_implementation('sdpa')) to share"
            )
        if not self._places_texts and SLIDING in self.windows:
            return "it has sliding attention but takes no positions"
        return None

    @cached_property
    def trees(self) -> bool:
        """Whether positions and a 4D mask can be given, so that several texts fit into one row."""
        return self._places_texts and self.unshareable is None

    @cached_property
    def _places_texts(self) -> bool:
        """Not where positions follow from a 2D mask (ALiBi), or the causal mask lies in the layers (GPT-Neo)."""
        own_masks = any(
            buffer.ndim == 4 and buffer.shape[-1] == buffer.shape[-2] > 1 and not buffer.is_floating_point()
            for buffer in self.base.buffers()
        )
        alibi = getattr(self.config, "alibi", False)
        return self.kind == CAUSAL and self.takes_positions and not own_masks and not alibi

    @property
    def max_length(self) -> Optional[int]:
        """Most tokens of a text; None: any number."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            value = getattr(self.config, name, None)
            # T5 has relative positions, and its n_positions is what it was trained on
            if isinstance(value, int) and value > 0 and not hasattr(self.config, "relative_attention_num_buckets"):
                return value
        return None

    def length_limit(self, max_length: Optional[int]) -> Optional[int]:
        """Most tokens of a text: a user's limit, or the model's own if that is less; None: any number.

        Raises:
            ValueError: If `max_length` isn't positive.
        """
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} must be positive, or None for what the model's config says.")
        return min((limit for limit in (max_length, self.max_length) if limit is not None), default=None)

    @cached_property
    def widths(self) -> Widths:
        """What a token costs."""
        # a recurrent model may have none
        hidden, heads = self.config.hidden_size, getattr(self.config, "num_attention_heads", None) or 1
        head = getattr(self.config, "head_dim", None) or getattr(self.config, "d_kv", None) or hidden // heads
        outer = {id(self.base.get_input_embeddings()), id(self.base.get_output_embeddings())}
        matrices = [module.weight for module in self.base.modules() if id(module) not in outer and _is_product(module)]
        widest = max((max(weight.shape) for weight in matrices), default=4 * hidden)
        keys = head * (getattr(self.config, "num_key_value_heads", None) or heads)
        return Widths(hidden, widest, heads * head, keys, heads, self.config.vocab_size)


class Widths(NamedTuple):
    """Numbers per token: of a hidden state, of the widest product, of all queries and all keys of a layer, of logits."""

    hidden: int
    widest: int
    queries: int
    keys: int
    heads: int
    vocabulary: int


def language_model(model: nn.Module, must_share: bool = False) -> LanguageModel:
    """A model as the shared prefixes need it: one whose texts can share a prefix, or one that reads every text by itself
    (an encoder, an encoder-decoder, a causal model with recurrent or chunked layers or with flash attention). A causal one
    that doesn't share says so in a warning.

    Args:
        model: A transformers model, or a `PeftModel` of one.
        must_share: Refuse a causal model that can't share.

    Raises:
        TypeError: If it is no transformers model.
        ValueError: If it has PEFT's prompt learning, or can't share and must; the message names the way out.
    """
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        raise ValueError(
            "model has an adapter of learned prompts (prefix or prompt tuning), which owns the start of the cache; use a "
            "tuner of weights (LoRA, PEQA, ...)."
        )
    inspected = LanguageModel(model)
    if inspected.kind == CAUSAL and inspected.unshareable is not None:
        why = f"model ({type(inspected.base).__name__}) can't share a prefix between texts: {inspected.unshareable}"
        if must_share:
            raise ValueError(f"{why}. Use a model with full or sliding attention.")
        warnings.warn(f"{why}. Every text runs by itself, which is slower.", stacklevel=3)
    return inspected


def _is_product(module: nn.Module) -> bool:
    return not isinstance(module, nn.Embedding) and getattr(getattr(module, "weight", None), "ndim", 0) == 2


def is_causal(model: nn.Module) -> bool:
    """Whether a model's tokens see only those before them, and it keeps a cache.

    Encoders such as BERT take a cache too, for their use as decoders; their attention tells.
    """
    base = unwrapped(model)
    flags = [module.is_causal for module in base.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return cache_name(inspect.signature(base.forward).parameters) is not None and (not flags or any(flags))


def is_causal_config(config: PretrainedConfig) -> bool:
    """Whether a checkpoint's config names a causal language model, which may see or hear beside; one that names no
    architecture counts as one."""
    names = config.architectures
    if config.is_encoder_decoder:
        return False
    causal = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    return names is None or any(name.endswith(causal) for name in names) or getattr(config, "is_decoder", False)


def base_name(model: nn.Module) -> Optional[str]:
    """Where the model was loaded from, if that is known."""
    config = getattr(unwrapped(model), "config", None)
    return getattr(config, "_name_or_path", None) or None


def base_fingerprint(model: nn.Module) -> str:
    """A short name of a language model's architecture and base weights, such as `"llama-30x576-0b1a5c4d2e8f"`.

    It hashes the signs of the first rows of the token embeddings (which quantisation, adapters and a cast to another float
    type leave as they are) and the shape of the model: what belongs to a model belongs to its packed and its tuned
    copies, too. Two fine-tunes of one model have different ones where training moved the embeddings. See [`identity`].
    """
    config = text_config(model)
    shape = [
        str(getattr(config, name, None))
        for name in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    ]
    digest = hashlib.sha256("/".join(shape).encode())
    weight = embedding_weight(token_embedding(model))
    if weight.device.type != "meta":
        # the first rows are the same after the vocabulary was extended
        signs = torch.signbit(weight.detach()[:_SAMPLED_ROWS].float()).to("cpu", torch.uint8)
        digest.update(bytes(signs.flatten().tolist()))
    layers = getattr(config, "num_hidden_layers", None)
    return f"{config.model_type}-{layers}x{hidden_size(model)}-{digest.hexdigest()[:12]}"


def identity(model: nn.Module) -> str:
    """What tells models apart that compute different numbers: [`base_fingerprint`], and a hash of what is computed with.

    Of every tensor of the base 1,024 numbers count, of the adapters that are active all of them: another adapter of the
    same name, a merged one, a quantised or fine-tuned base, and another float type are other models; a loaded adapter
    that isn't active makes no difference.
    """
    active, of_adapters = _adapter_tensors(model)
    digest = hashlib.sha256(_fingerprint(active).encode())
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in of_adapters:
            digest.update(_content(tensor, _SAMPLED_NUMBERS))
    return f"{base_fingerprint(model)}-{digest.hexdigest()[:16]}"


def adapters_fingerprint(model: nn.Module) -> str:
    """A short name of the weights of all active adapters; `"none"` where there is none.

    What is saved with a base's fingerprint compares this, too: packed and cast copies of a base are the same to it.
    """
    return _fingerprint(_adapter_tensors(model)[0])


def other_adapters(model: nn.Module, stored: Optional[str]) -> Optional[str]:
    """In words how a model's active adapters differ from those of a stored [`adapters_fingerprint`]; None if they don't,
    or what was stored doesn't say."""
    if stored in (None, current := adapters_fingerprint(model)):
        return None
    was, now = ("no adapter" if each == _NO_ADAPTER else f"the adapter weights {each}" for each in (stored, current))
    return f"it was made with {was}, but this model has {now}, whose hidden states may mean something else"


def _adapter_tensors(model: nn.Module) -> tuple[list[tuple[str, torch.Tensor]], set[int]]:
    """The tensors of active adapters and their scaling, by kind; and the ids of all tensors of adapters, which are then
    not the base's."""
    active: list[tuple[str, torch.Tensor]] = []
    every: set[int] = set()
    for module in model.modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        used = [] if module.disable_adapters else list(module.active_adapters)
        for kind in module.adapter_layer_names:
            for adapter, part in _by_adapter(getattr(module, kind, None)):
                tensors = [part] if isinstance(part, torch.Tensor) else [*part.parameters(), *part.buffers()]
                every.update(map(id, tensors))
                active += [(kind, tensor) for tensor in tensors if adapter in used]
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            active += [("scaling", torch.tensor(float(scaling[adapter]))) for adapter in used if adapter in scaling]
    return active, every


def _fingerprint(tensors: list[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for kind, tensor in tensors:
        digest.update(f"{kind}/".encode() + _content(tensor))
    return digest.hexdigest()[:16] if tensors else _NO_ADAPTER


def _by_adapter(parts: Any) -> list[tuple[str, Any]]:
    return list(parts.items()) if isinstance(parts, (nn.ModuleDict, nn.ParameterDict, dict)) else []


def _content(tensor: torch.Tensor, most: Optional[int] = None) -> bytes:
    """Shape, type and numbers of a tensor, as bytes; of `most` numbers, evenly spread."""
    head = f"{tuple(tensor.shape)}{tensor.dtype}".encode()
    if tensor.device.type == "meta":
        return head
    numbers = tensor.detach().as_subclass(torch.Tensor).flatten()
    if most is not None and len(numbers) > most:
        numbers = numbers[torch.linspace(0, len(numbers) - 1, most, dtype=torch.float64).long().to(numbers.device)]
    return head + numbers.contiguous().cpu().view(torch.uint8).numpy().tobytes()
