# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Several sampled continuations of many prompts, the same whatever prompts are sampled beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedTokenizerBase

from generation_ext.shared_prefix.batching import BatchPlanner, check_memory_limit, free_bytes
from generation_ext.shared_prefix.encoding import TextEncoder
from generation_ext.shared_prefix.sampling import OwnGenerationConfig, Sampling, SeededSampling
from generation_ext.shared_prefix.token_tree import padded
from peft_ext.language_model import ENCODER_DECODER, LanguageModel, inference, padding_token, start_token


_CPU_ROWS, _ACCELERATOR_ROWS = 128, 1024


@dataclass(frozen=True)
class Decoding(Sampling):
    """How demonstrations are sampled: [`Sampling`], with the defaults of SG-ICL's code. How many, how long and the seed
    are [`SelfGeneratedICL`]'s own arguments.

    Args:
        top_k: transformers' default of 50 applied in the paper.
        no_repeat_ngram_size: No sequence of so many tokens occurs twice, in prompt and text together; 0: any may.
        ban_commas: No token that is a comma.

    Raises:
        ValueError: If a number is out of its range.
    """

    temperature: float = 0.5
    top_k: int = 50
    top_p: float = 1.0
    no_repeat_ngram_size: int = 2
    ban_commas: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.no_repeat_ngram_size < 0:
            raise ValueError(f"no_repeat_ngram_size={self.no_repeat_ngram_size} must not be negative; 0 turns it off.")


class Sampler:
    """Samples texts with `generate`.

    A prompt goes through a causal model once, however many texts go on from it. Every text has random numbers of its
    own, so that it depends on its key alone, not on the batch.

    Args:
        model, encoder: The model and its tokenizer.
        tokenizer: To turn tokens back into text.
        decoding: How to sample.
        min_new_tokens: Of a text.
        memory_limit: Bytes that a batch may take; None: a quarter of what is free.
    """

    def __init__(
        self,
        model: LanguageModel,
        encoder: TextEncoder,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        min_new_tokens: int,
        memory_limit: Optional[int] = None,
    ) -> None:
        if not model.base.can_generate():
            raise TypeError(f"model ({type(model.base).__name__}) can't generate; load it as a language model.")
        check_memory_limit(memory_limit)
        self.model, self.encoder, self.tokenizer, self.decoding = model, encoder, tokenizer, decoding
        self.memory_limit = memory_limit
        ends = getattr(model.base.generation_config, "eos_token_id", None)
        end = tokenizer.eos_token_id if ends is None else ends
        self.pad = padding_token(tokenizer)
        self.config = OwnGenerationConfig(
            do_sample=False,  # the processor draws
            num_beams=1,
            min_new_tokens=min_new_tokens,
            max_new_tokens=decoding.max_new_tokens,
            no_repeat_ngram_size=decoding.no_repeat_ngram_size or None,
            suppress_tokens=self._banned() or None,
            eos_token_id=end,
            pad_token_id=self.pad,
            bos_token_id=tokenizer.bos_token_id,
            decoder_start_token_id=start_token(model.base) if model.kind == ENCODER_DECODER else None,
        )

    def batches(self, prompts: Sequence[Sequence[int]], samples: int) -> list[list[int]]:
        """Prompts of about the same length, as many as the memory limit has room for; at least one."""
        model, order = self.model, sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        most_rows = _CPU_ROWS if model.device.type == "cpu" else _ACCELERATOR_ROWS
        limit = free_bytes(model.device) // 4 if self.memory_limit is None else self.memory_limit
        planner = BatchPlanner(model, limit)
        size = torch.finfo(model.dtype).bits // 8
        layers = model.config.num_hidden_layers
        batches: list[list[int]] = []
        for index in order:
            longest = len(prompts[batches[-1][0] if batches else index])
            rows = samples * (1 + len(batches[-1])) if batches else samples
            # every step, a layer's grown cache is there beside the one that it replaces
            cache = rows * (longest + self.decoding.max_new_tokens) * 2 * model.widths.keys * (layers + 2) * size
            fits = rows <= most_rows and cache + planner.bytes(rows // samples, longest, rows) <= limit
            if batches and fits:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def sample(self, prompts: Sequence[Sequence[int]], keys: Sequence[str], samples: int) -> list[list[str]]:
        """Texts that go on after prompts of one batch.

        Args:
            prompts: Token ids.
            keys: What a prompt's random numbers depend on.
            samples: Texts for each.

        Returns:
            For each prompt its texts, on one line each, without white space around them; some may be empty.
        """
        try:
            return self._sample(prompts, keys, samples)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
        half = len(prompts) // 2
        return self.sample(prompts[:half], keys[:half], samples) + self.sample(prompts[half:], keys[half:], samples)

    def _sample(self, prompts: Sequence[Sequence[int]], keys: Sequence[str], samples: int) -> list[list[str]]:
        model = self.model
        ids, mask = (part.to(model.device) for part in padded(prompts, self.pad, "left"))
        rows = [f"{key}/{number}" for key in keys for number in range(samples)]
        processors = LogitsProcessorList([SeededSampling(self.decoding, rows)])
        with inference(model.base):
            inputs = self._past(ids, mask, samples)
            output = model.base.generate(
                input_ids=ids.repeat_interleave(samples, dim=0),
                attention_mask=mask.repeat_interleave(samples, dim=0),
                generation_config=self.config,
                logits_processor=processors,
                **inputs,
            )
        start = 0 if model.kind == ENCODER_DECODER else ids.shape[1]
        texts = self.tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
        texts = [" ".join(text.split()) for text in texts]
        return [texts[i : i + samples] for i in range(0, len(texts), samples)]

    def _past(self, ids: torch.Tensor, mask: torch.Tensor, samples: int) -> dict[str, Any]:
        """Keys and values of the prompts but their last tokens, for all samples."""
        if self.model.kind == ENCODER_DECODER or ids.shape[1] < 2 or self.model.unshareable:
            return {}
        cache = DynamicCache(config=self.model.base.config)
        inputs: dict[str, Any] = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "use_cache": True}
        inputs[self.model.cache_argument] = cache
        if self.model.takes_positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, :-1]
        self.model.backbone(**inputs)
        cache.batch_repeat_interleave(samples)
        return {self.model.cache_argument: cache}

    def _banned(self) -> list[int]:
        """Tokens that hold a line break or a tab, and commas (SG-ICL bans the words; here no token slips through)."""
        size = min(len(self.tokenizer), self.model.widths.vocabulary)
        special = set(self.tokenizer.all_special_ids)
        texts = self.tokenizer.batch_decode([[token] for token in range(size)])
        return [
            token
            for token, text in enumerate(texts)
            if token not in special
            and (any(c in text for c in "\n\r\t") or (self.decoding.ban_commas and text.strip() == ","))
        ]
