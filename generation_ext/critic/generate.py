# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""CriticControl as a decoding loop: the forward pass that tells the candidates' values is also the next step's."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, Optional, Union

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput, logits_process
from transformers.modeling_outputs import BaseModelOutputWithPast

from generation_ext.critic.processor import CriticLogitsProcessor
from generation_ext.critic.value import Critic
from generation_ext.shared_prefix.candidates import Branches, PreallocatedCache, Prefix, branch, unrecorded
from peft_ext.language_model import CACHE_NAMES, backbone


# What generate appends after a user's own processors.
_APPENDED = (
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "WatermarkLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "LogitNormalization",
)
_head_lock = threading.Lock()


def critic_generate(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: Optional[LogitsProcessorList] = None,
    stopping_criteria: Optional[StoppingCriteriaList] = None,
    generation_config: Optional[GenerationConfig] = None,
    streamer: Any = None,
    critic: Optional[Union[Critic, Sequence[Critic]]] = None,
    strength: Union[float, Sequence[float]] = 1.0,
    critic_top_k: int = 10,
    mask_others: bool = False,
    **model_kwargs: Any,
) -> Any:
    """Greedy search or sampling with a critic, at about one forward pass of `critic_top_k` tokens per step.

    It gives what `generate` gives with a [`CriticLogitsProcessor`], up to rounding, and takes about half of its time:
    the chosen candidate's hidden state and its keys and values are the next step's. A step in which sampling chose
    another token for some row costs a forward pass more, so `mask_others=True` or a `top_k` of `generate` of at most
    `critic_top_k` is fastest.

    ```python
    model.generate(**inputs, custom_generate=critic_generate, critic=critic, strength=4.0)
    model.generate(**inputs, custom_generate=critic_generate, logits_processor=[processor])
    ```

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: `generate` passes them.
            A `CriticLogitsProcessor` among the processors is taken as it is, at its place.
        streamer: Gets the tokens of each step; None: `generate`'s own `streamer`.
        critic: The critic, or several; where no `CriticLogitsProcessor` is passed. It comes before temperature,
            `top_k` and the like, as a processor does.
        strength, mask_others: As in [`CriticLogitsProcessor`].
        critic_top_k: Its `top_k` (under another name, since `top_k` is `generate`'s own).

    Returns:
        What `generate` returns.

    Raises:
        ValueError: For beams and other ways of decoding that this isn't, without a cache, or without a critic.
    """
    if generation_config is None:
        raise ValueError(
            "critic_generate is no function to call: pass it to generate as custom_generate=critic_generate."
        )
    _check(generation_config)
    processors = list(logits_processor or [])
    if streamer is None:
        streamer = _streamer_of_generate()
    with contextlib.ExitStack() as stack:
        index = _index_of_processor(processors, critic)
        if critic is not None:
            own = CriticLogitsProcessor(model, critic, critic_top_k, strength, mask_others=mask_others)
            processors.insert(index, stack.enter_context(own))
        steps = _Steps(model, processors, index, generation_config, model_kwargs)
        return _decode(steps, input_ids, stopping_criteria or StoppingCriteriaList(), streamer)


def _streamer_of_generate() -> Any:
    """The streamer that `generate` was given. It shows it the prompt and doesn't hand it on to a custom loop, so that its
    reader would wait for ever."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is inspect.unwrap(GenerationMixin.generate).__code__:
            return frame.f_locals.get("streamer")
        frame = frame.f_back
    return None


def _decode(steps: _Steps, input_ids: torch.Tensor, stopping_criteria: StoppingCriteriaList, streamer: Any) -> Any:
    """The loop of transformers' `_sample`."""
    config: Any = steps.generation_config
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    all_scores: tuple[torch.Tensor, ...] = ()
    all_logits: tuple[torch.Tensor, ...] = ()
    steps.prefill(input_ids)
    while True:
        logits = steps.logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        scores = steps.scores(input_ids, logits)
        if config.return_dict_in_generate and config.output_scores:
            all_scores += (scores,)
        if config.return_dict_in_generate and config.output_logits:
            all_logits += (logits,)
        if config.do_sample:
            tokens = torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(scores, dim=-1)
        if pads:
            tokens = tokens * unfinished + config._pad_token_tensor.to(tokens.device) * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, all_scores or None)
        if unfinished.max() == 0:
            break
        steps.go_on(input_ids, unfinished)
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    return steps.output(
        input_ids, all_scores if config.output_scores else None, all_logits if config.output_logits else None
    )


class _Steps:
    """The state between two tokens: logits, the prefix, and the candidates that were tried on it."""

    logits: torch.Tensor

    def __init__(
        self,
        model: Any,
        processors: list[Any],
        index: int,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model = model
        self.before = LogitsProcessorList(processors[:index])
        self.processor: CriticLogitsProcessor = processors[index]
        self.after = LogitsProcessorList(processors[index + 1 :])
        _check_processor(self.processor, model)
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.preallocated = PreallocatedCache()
        self.prefix: Optional[Prefix] = None
        self.branches: Optional[Branches] = None
        self.candidates = torch.empty(0)

    def prefill(self, input_ids: torch.Tensor) -> None:
        """Encode the prompts."""
        self._take(self.model._prefill(input_ids, self.generation_config, self.model_kwargs))

    def scores(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The processed scores of the next token; tries the candidates on the way."""
        processor = self.processor
        scores = self.before(input_ids, logits)
        self.candidates, usable = processor.candidates(scores)
        gain = processor.gain_of_adapted(input_ids, self.candidates)
        self.branches = None
        if processor.reads_model:
            prefix = self.prefix if self.prefix is not None else processor.prefix(input_ids)
            self.branches = branch(
                processor.language_model, prefix, self.candidates, keep=True, preallocated=self.preallocated
            )
            gain += processor.gain_on(prefix, self.branches).to(gain.device)
        processor.recorder.drop()
        return self.after(input_ids, processor.reweighted(scores, self.candidates, usable, gain))

    def go_on(self, input_ids: torch.Tensor, unfinished: torch.Tensor) -> None:
        """Get the logits after the tokens that were chosen: from the candidates' forward pass where all of them were
        among the candidates (of a finished row, any is as good), from an ordinary one otherwise."""
        branches = self.branches
        # of padded texts, chunks begin elsewhere in each row, which a cache that was branched doesn't tell
        chunked = "chunked_attention" in self.processor.language_model.other_layers
        padded_chunks = chunked and branches is not None and branches.prefix.mask is not None
        if branches is not None and branches.prefix.cache is self._cache() and not padded_chunks:
            chosen: torch.Tensor = self.candidates == input_ids[:, -1:]
            if bool((chosen.any(dim=-1) | (unfinished == 0)).all()):
                self.prefix = branches.chosen(chosen.int().argmax(dim=-1))
                self.logits = self._head(input_ids[:, -1:], self.prefix.hidden)
                self._count({})
                return
        known = None if branches is None else branches.prefix
        if known is not None and known.cache is self._cache():
            # its tokens of the last steps were tried, not fed
            self.processor.recorder.went_on(known, input_ids[:, :-1])
        self.prefix = self.branches = None
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self.model_kwargs)
        self._take(self.model(**inputs, return_dict=True))

    def output(self, input_ids: torch.Tensor, scores: Any, logits: Any) -> Any:
        """What generate returns with return_dict_in_generate."""
        kind: Any = GenerateEncoderDecoderOutput if self.is_encoder_decoder else GenerateDecoderOnlyOutput
        name = next(name for name in CACHE_NAMES if name in {field.name for field in fields(kind)})
        return kind(sequences=input_ids, scores=scores, logits=logits, **{name: self._cache()})

    def _take(self, outputs: Any) -> None:
        self.logits = outputs.logits[:, -1]
        self._count(outputs)

    def _count(self, outputs: Any) -> None:
        self.model_kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.model_kwargs, is_encoder_decoder=self.is_encoder_decoder
        )

    def _cache(self) -> Any:
        return next((self.model_kwargs[name] for name in CACHE_NAMES if self.model_kwargs.get(name) is not None), None)

    def _head(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits `[batch, vocabulary]` for last hidden states `[batch, hidden]`, with whatever it does to
        them beside its output head."""
        inputs: dict[str, Any] = {"input_ids": tokens.to(hidden.device)}
        if self.is_encoder_decoder:
            inputs = {
                "decoder_input_ids": inputs["input_ids"],
                "encoder_outputs": self.model_kwargs["encoder_outputs"],
            }
            if self.model_kwargs.get("attention_mask") is not None:
                inputs["attention_mask"] = self.model_kwargs["attention_mask"]
        with _kept_positions(self.model), _answering(self.processor.language_model.backbone, hidden.unsqueeze(1)):
            return self.model(**inputs, use_cache=False, return_dict=True).logits[:, -1]


class _Answer(BaseModelOutputWithPast):
    """An output of a backbone that has last hidden states, and nothing else, whatever a family's has."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextlib.contextmanager
def _kept_positions(model: nn.Module) -> Iterator[None]:
    """Qwen's models that see keep where their text goes on, and would take a call without a cache for a new prompt."""
    kept = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    try:
        yield
    finally:
        for module, deltas in kept:
            module.rope_deltas = deltas


@contextlib.contextmanager
def _answering(module: nn.Module, hidden: torch.Tensor) -> Any:
    """Within it, a module's forward pass in this thread gives these states at once. There is no other way to call what
    a model does after its backbone (scaling, soft caps, biases) without running that."""
    owner = threading.get_ident()
    with _head_lock, unrecorded():
        # asked for here: outside of the lock it could be another thread's, which would come back for good
        usual, has_own = module.forward, "forward" in vars(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return _Answer(last_hidden_state=hidden) if threading.get_ident() == owner else usual(*args, **kwargs)

        module.forward = forward
        try:
            yield
        finally:
            if has_own:
                module.forward = usual
            else:
                del module.forward


def _index_of_processor(processors: list[Callable[..., Any]], critic: Any) -> int:
    indices = [index for index, one in enumerate(processors) if isinstance(one, CriticLogitsProcessor)]
    if critic is None:
        if len(indices) != 1:
            raise ValueError(
                f"logits_processor has {len(indices)} CriticLogitsProcessors and critic is None: pass critic=..., or one "
                "processor (it takes several critics)."
            )
        return indices[0]
    if indices:
        raise ValueError("critic and a CriticLogitsProcessor in logits_processor are both passed; pass one of them.")
    appended = tuple(getattr(logits_process, name) for name in _APPENDED if hasattr(logits_process, name))
    index = len(processors)
    while index and isinstance(processors[index - 1], appended):
        index -= 1
    return index


def _check(config: GenerationConfig) -> None:
    if (config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams={config.num_beams}: critic_generate does greedy search and sampling; for beams, pass a "
            "CriticLogitsProcessor as logits_processor, without custom_generate."
        )
    if config.use_cache is False:
        raise ValueError(
            "use_cache=False: critic_generate goes on from the cache; leave it out, or pass a CriticLogitsProcessor as "
            "logits_processor."
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(
                f"{name}=True: critic_generate has none of the usual forward passes' extra outputs; pass a "
                "CriticLogitsProcessor as logits_processor instead."
            )


def _check_processor(processor: CriticLogitsProcessor, model: nn.Module) -> None:
    if processor.language_model.backbone is not backbone(model):
        raise ValueError("the CriticLogitsProcessor was made for another model than the one that generates.")
    if processor.mode != "exact":
        raise ValueError(
            f"mode={processor.mode!r} needs no forward pass of candidates, so there is none to go on from: pass the "
            "processor as logits_processor, without custom_generate."
        )
