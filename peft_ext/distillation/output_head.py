# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A causal model's forward cut in two: the states that its output head reads, and logits of any of them.

Models do more behind their backbone than a product: they scale logits, cap them, add biases. So logits of a piece are made by
the model's own forward, which finds the piece where its backbone would have computed states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from peft_ext.language_model import backbone, device_of, inference, unwrapped
from peft_ext.threads import hooks_of_this_thread


class _States(BaseModelOutput):
    """What a backbone returns; of everything but the states, None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class OutputHead:
    """Logits of states, by the model's own forward behind its backbone.

    Args:
        model: A causal language model of transformers, wrapped by PEFT or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.base: Any = unwrapped(model)
        self.backbone: Any = backbone(model)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Logits `[n, vocabulary]` of states `[n, hidden]`."""
        tokens = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        with _instead(self.backbone, _States(last_hidden_state=states[None])):
            # not by a call, whose hooks are for whole passes
            return self.base.forward(input_ids=tokens, use_cache=False).logits[0]

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What is trained outside of the backbone."""
        inside = {id(parameter) for parameter in self.backbone.parameters()}
        output = self.base.get_output_embeddings()
        own = () if output is None else output.parameters()
        shared = {id(parameter) for parameter in own}
        return tuple(
            parameter
            for parameter in self.base.parameters()
            if parameter.requires_grad and (id(parameter) not in inside or id(parameter) in shared)
        )

    @contextlib.contextmanager
    def finished_by(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Inside, the model's passes return as their `loss` what the function makes of the states `[batch, tokens, hidden]`.

        It runs within the model's forward, where FSDP and DeepSpeed have its parameters whole and DDP waits for gradients.
        """
        kept: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            kept[:] = [output[0]]

        def finish(module: nn.Module, args: Any, output: Any) -> Any:
            output["loss"] = function(kept.pop())
            return output

        with hooks_of_this_thread([(self.backbone, keep), (self.base, finish)]):
            yield

    def states_of(self, model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The states `[batch, tokens, hidden]` of a pass."""
        found: list[torch.Tensor] = []

        def take(states: torch.Tensor) -> torch.Tensor:
            found.append(states)
            return states.sum()

        with self.finished_by(take):
            model(**inputs, use_cache=False, **self.fewest_logits())
        return found[0]

    def fewest_logits(self) -> dict[str, Any]:
        """What makes a pass compute the logits of one token alone."""
        return {"logits_to_keep": 1} if self.base._supports_logits_to_keep() else {}


def output_head(model: nn.Module) -> Optional[OutputHead]:
    """The model's [`OutputHead`], once its logits have been compared with the model's own; None if they are others (then all
    logits of a batch have to be made at once), or the model makes all logits anyway."""
    try:
        head = OutputHead(model)
        if not head.fewest_logits():
            return None
        if device_of(model).type == "meta":  # nothing to compare
            return head
        tokens = torch.arange(4, device=device_of(model))[None] % max(1, head.base.config.get_text_config().vocab_size)
        with inference(model):
            expected = model(input_ids=tokens, use_cache=False).logits[0].float()
            found = head(head.states_of(model, {"input_ids": tokens})[0]).float()
    except (TypeError, RuntimeError, ValueError, AttributeError, KeyError, IndexError):
        return None
    if found.shape != expected.shape:
        return None
    allowed = 1e-3 if device_dtype(model) == torch.float32 else 5e-2
    return head if (found - expected).abs().max() <= allowed * max(1.0, expected.abs().max().item()) else None


def device_dtype(model: nn.Module) -> torch.dtype:
    """The float type of the model's output layer."""
    output: Any = unwrapped(model).get_output_embeddings()
    return next((p.dtype for p in output.parameters() if p.is_floating_point()), torch.float32)


@contextlib.contextmanager
def _instead(module: Any, result: Any) -> Iterator[None]:
    """Inside, a module returns a result without computing it."""
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: result
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
