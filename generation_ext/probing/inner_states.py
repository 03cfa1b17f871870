# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The hidden state that a layer is given, read by a hook of our own, which ends the forward pass there.

transformers' `output_hidden_states` keeps the states of all layers, runs the layers that nobody asked for, and leaves hooks
in the model that can't be pickled, so that no worker of joblib can be given the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import nn


class _Reached(Exception):
    """Ends a forward pass."""


def layers_of(stack: nn.Module, count: int) -> Optional[nn.ModuleList]:
    """The `count` layers that a decoder or an encoder runs in turn; None if it has no such list."""
    lists = (module for module in stack.modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == count), None)


def inner_state(layers: nn.ModuleList, index: int, run: Callable[[], Any]) -> Optional[torch.Tensor]:
    """What layer `index` is given, `[batch, tokens, hidden]`, as `hidden_states[index]` of transformers.

    Args:
        layers: See [`layers_of`].
        index: From 0, which is the embeddings, to the number of layers less one.
        run: Calls the model.

    Returns:
        The state; None if the layer is handed it in a way that isn't seen.
    """
    owner, found = threading.get_ident(), []

    def reached(state: Any) -> None:
        if threading.get_ident() == owner:
            found.append(state)
            raise _Reached

    if index:
        handle = layers[index - 1].register_forward_hook(
            lambda layer, args, output: reached(output if isinstance(output, torch.Tensor) else output[0])
        )
    else:
        handle = layers[0].register_forward_pre_hook(lambda layer, args: reached(args[0]) if args else None)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0] if found else None
