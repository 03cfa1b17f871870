# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A model for lm-evaluation-harness that computes what requests share once: `lm_eval --model peft_ext`.

    peft-ext run -- lm_eval --model peft_ext --model_args pretrained=base,peft=adapter --tasks my_task --num_fewshot 8

`peft-ext run` makes its name known to the harness, and so does importing this module.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype
from tqdm import tqdm
from transformers import PreTrainedModel

from generation_ext.in_context.continuations import Continuation, score_continuations
from generation_ext.shared_prefix.batching import check_memory_limit
from peft_ext import models
from peft_ext.language_model import LanguageModel, language_model


logger = logging.getLogger(__name__)

# What of `HFLM`'s arguments only its own loading knows.
_ITS_OWN_LOADING = ("delta", "autogptq", "gptqmodel", "parallelize", "tp_plan", "trust_remote_code", "subfolder")
_ALL = 2**31 - 1  # windows of a text that are handed over at once


@register_model("peft_ext")
class SharedPrefixLM(HFLM):
    """[`HFLM`] whose log-likelihoods share prefixes; tokens, chat templates and generation are `HFLM`'s own.

    Demonstrations and inputs that several requests begin with are computed once, and only tokens that are read go
    through the output head, in float32. How much goes into a forward pass follows from `memory_limit`; `batch_size` is
    for generation alone. Models whose texts can't share a prefix (recurrent layers, prompt tuning, encoder-decoders) are
    scored as `HFLM` scores them, which is said.

    Args:
        pretrained: As of `HFLM`; besides whatever `--model` of `peft-ext` names: a packed folder, a `.gguf` file, the
            folder of an adapter or of a run, `smollm2-135m-instruct`.
        peft: Folder or hub id of an adapter.
        memory_limit: Bytes that a pass may take beside the weights; None: a quarter of what is free.
        **kwargs: As of `HFLM`.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: As `peft_ext.load`; or for `memory_limit`.
    """

    def __init__(
        self,
        pretrained: Union[str, PreTrainedModel],
        peft: Optional[str] = None,
        memory_limit: Optional[int] = None,
        gguf_file: Optional[str] = None,
        **kwargs: Any,
    ) -> None:
        check_memory_limit(memory_limit)
        self.memory_limit = memory_limit
        self._name: Optional[str] = None
        if isinstance(pretrained, str) and gguf_file is None:
            if kwargs.get("tokenizer") is None and models.locate(pretrained, peft)[1] == pretrained:
                kwargs["tokenizer"] = models.load_tokenizer(pretrained)  # an adapter's own comes before its base's
            self._name, peft = models.locate(pretrained, peft)
            pretrained, gguf_file = models.resolve_model(self._name)
        super().__init__(pretrained=pretrained, peft=peft, gguf_file=gguf_file, **kwargs)
        self._shared = self._sharing_model()

    def _create_model(
        self, pretrained: str, revision: Optional[str] = "main", dtype: Any = "auto", **kwargs: Any
    ) -> None:
        """Load what `peft_ext.load` loads as it does, and the rest as `HFLM` does."""
        # beside them, what `from_pretrained` takes
        known = {"gpus", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "peft", "gguf_file"}
        others = [name for name in kwargs if name not in {*known, *_ITS_OWN_LOADING, "quantization_config"}]
        peft = kwargs.get("peft")
        # an adapter with tokens of its own needs them in its base
        grown = peft is not None and len(self.tokenizer) > self.config.get_text_config().vocab_size
        if self._name is None or others or grown or any(kwargs.get(name) for name in _ITS_OWN_LOADING):
            super()._create_model(pretrained=pretrained, revision=revision, dtype=dtype, **kwargs)
            return
        more: dict[str, Any] = {} if revision in (None, "main") else {"revision": revision}
        kind = "seq2seq" if self.backend == "seq2seq" else "causal"
        self._model = models.load(self._name, adapter=peft, kind=kind, dtype=get_dtype(dtype), **more)

    def _sharing_model(self) -> Optional[LanguageModel]:
        """None where `HFLM` has to score by itself."""
        if self.backend != "causal":
            reason = "an encoder-decoder model's labels don't lie behind its text"
        elif self.mixed_precision_dtype is not None:
            reason = "mixed_precision_dtype is set"
        else:
            try:
                return language_model(self.model, must_share=True)
            except ValueError as error:
                reason = str(error)
        logger.warning("--model peft_ext scores as --model hf does, nothing shared: %s", reason)
        return None

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Optional[tuple[str, str]], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: Optional[int] = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation, and whether greedy decoding writes it."""
        if self._shared is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        continuations = [self._fitted(*request) for request in requests]
        cut = sum(len(each.context) < len(request[1]) for each, request in zip(continuations, requests))
        if cut:
            logger.warning(
                "%d of %d requests are longer than max_length=%d; the beginnings of their contexts are cut off.",
                cut,
                len(requests),
                self.max_length,
            )
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=hidden, desc="Running loglikelihood requests") as bar:
            for indices, scores in score_continuations(self._shared, continuations, self.memory_limit):
                for index, score in zip(indices, scores):
                    results[index] = (score.log_prob, score.greedy)
                    text = requests[index][0]
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, results[index])
                bar.update(len(indices))
        return results

    def _fitted(self, text: Optional[tuple[str, str]], context: list[int], tokens: list[int]) -> Continuation:
        """The end of a context that fits the model together with the continuation, as `HFLM` cuts it."""
        if not context or not tokens:
            raise ValueError(f"the request {text!r} has no tokens to {'score' if context else 'go on from'}.")
        if len(tokens) > self.max_length:
            raise ValueError(
                f"a continuation has {len(tokens)} tokens, and max_length={self.max_length}: {str(text)[-200:]!r}"
            )
        return Continuation(context[-(self.max_length + 1 - len(tokens)) :], tokens)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As `HFLM`'s, with all windows handed over at once, for passes of the size that `memory_limit` gives."""
        if self._shared is None:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        size: Any = self.batch_size
        self.batch_size_per_gpu = _ALL
        try:
            with torch.no_grad():
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.batch_size_per_gpu = size
