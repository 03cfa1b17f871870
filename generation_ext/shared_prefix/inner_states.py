# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The hidden states that layers are given, read by hooks of our own; the pass ends where the last of them is.

transformers' `output_hidden_states` keeps the states of all layers, runs the layers that nobody asked for, and leaves hooks
in the model that can't be pickled, so that no worker of joblib can be given the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Optional, TypeVar

import torch
from torch import nn

from peft_ext.language_model import ENCODER_DECODER, LanguageModel
from peft_ext.threads import hooks_of_this_thread


Taken = TypeVar("Taken")


class _Reached(Exception):
    """Ends a forward pass."""


def layers_of(stack: nn.Module, count: int) -> Optional[nn.ModuleList]:
    """The `count` layers that a decoder or an encoder runs in turn; None if it has no such list."""
    lists = (module for module in stack.modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == count), None)


def decoder_layers(model: LanguageModel) -> Optional[nn.ModuleList]:
    """The layers that a language model's backbone runs in turn; None if it has no such list."""
    # the decoder's own config has lost the names of the whole model's, and answers with its class's defaults
    names = ("decoder_layers", "num_decoder_layers") if model.kind == ENCODER_DECODER else ()
    own = (getattr(model.base.config, name, None) for name in names)
    counts = (*own, getattr(model.config, "num_hidden_layers", None))
    count = next((count for count in counts if isinstance(count, int)), None)
    return None if count is None else layers_of(model.backbone, count)


def output_state(output: Any) -> torch.Tensor:
    """The hidden state in what a layer gives."""
    return output if isinstance(output, torch.Tensor) else output[0]


def states_of(
    layers: Optional[nn.ModuleList], indices: Iterable[int], run: Callable[[], torch.Tensor], ends: bool = False
) -> dict[int, torch.Tensor]:
    """Hidden states of several layers of one forward pass, with gradients where there are some.

    Args:
        layers: See [`decoder_layers`].
        indices: From 1, the states after the first layer, to the number of layers, which is what the pass gives: the
            last states, behind the model's final normalisation.
        run: Calls the backbone, and gives that.
        ends: The pass may end at the last of them.

    Returns:
        Index -> `[batch, tokens, hidden]`.
    """
    indices = sorted(set(indices))
    found: dict[int, torch.Tensor] = {}
    inner = [index for index in indices if layers is not None and index < len(layers)]
    last = inner[-1] if ends and len(inner) == len(indices) and inner else None

    def reader(index: int) -> Callable[..., None]:
        def read(layer: nn.Module, args: tuple, output: Any) -> None:
            found[index] = output_state(output)
            if index == last:
                raise _Reached
            # a layer may add to its input in place
            found[index] = found[index].clone()

        return read

    with contextlib.suppress(_Reached), hooks_of_this_thread((layers[i - 1], reader(i)) for i in inner):  # type: ignore[index]
        final = run()
        found.update((index, final) for index in indices if index not in inner)
    return found


def inner_states(
    layers: nn.ModuleList,
    indices: Collection[int],
    run: Callable[[], Any],
    take: Callable[[torch.Tensor], Taken],
    to_the_end: bool = False,
) -> dict[int, Taken]:
    """What layers are given, `[batch, tokens, hidden]`, as `hidden_states[index]` of transformers, read while the pass goes
    on, so that of many layers' states none has to be kept whole (beside [`states_of`], which keeps them).

    Args:
        layers: See [`layers_of`].
        indices: From 0, which is the embeddings, to the number of layers less one.
        run: Calls the model.
        take: Makes of a state what is kept of it: a copy.
        to_the_end: Whether the pass goes on behind the last of these layers.

    Returns:
        What `take` made of each; a layer that is handed its state in a way that isn't seen is missing.
    """
    found: dict[int, Taken] = {}
    last = None if to_the_end else max(indices)

    def reached(index: int, state: torch.Tensor) -> None:
        found[index] = take(state)
        if index == last:
            raise _Reached

    def behind(index: int, layer: nn.Module, args: tuple, output: Any) -> None:
        reached(index, output_state(output))

    def ahead(layer: nn.Module, args: tuple) -> None:
        if args:
            reached(0, args[0])

    before = [(layers[0], ahead)] if 0 in indices else []
    after = [(layers[index - 1], partial(behind, index)) for index in indices if index]
    with contextlib.suppress(_Reached), hooks_of_this_thread(before, before=True), hooks_of_this_thread(after):
        run()
    return found


def without_capturing_hooks(model: nn.Module) -> nn.Module:
    """The model, or, where transformers has left hooks in it (whoever asked it for `output_hidden_states` once), a copy
    without them that shares all tensors. The hooks are local functions, which can't be pickled; transformers installs them
    again when they are needed."""
    if not any(_of_transformers(hook) for module in model.modules() for hook in module._forward_hooks.values()):
        return model
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for module in twin.modules():
        for key, hook in list(module._forward_hooks.items()):
            if _of_transformers(hook):
                del module._forward_hooks[key]
        if "_output_capturing_hooks_installed" in vars(module):
            vars(module)["_output_capturing_hooks_installed"] = False
    return twin


def _of_transformers(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
