# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which model an adapter's config is being saved with.

PEFT asks the tuner for an adapter's tensors and then saves the config: only the one knows the model, only the other the
folder. What wants both, such as a model card, listens here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary


# By the config's id, since configs compare by value; never part of the config, which is copied and pickled.
_models: WeakValueDictionary[int, Any] = WeakValueDictionary()
_listeners: dict[str, Callable[[Any, str, Path], None]] = {}


def listen(name: str, listener: Callable[[Any, str, Path], None]) -> None:
    """Have a function called with each adapter that was saved: its model, its name, the folder.

    Args:
        name: Of the listener; another one of that name, from before a reload, is replaced.
        listener: The function.
    """
    _listeners[name] = listener


def taken_from(model: Any, config: Any) -> None:
    """Note that an adapter's tensors were taken from a model."""
    _models[id(config)] = model


def saved(config: Any, folder: Path) -> None:
    """Tell the listeners that an adapter's config was written into a folder, if its tensors came before."""
    model = _models.pop(id(config), None)
    for name, each in getattr(model, "peft_config", {}).items():
        if each is config:
            for listener in _listeners.values():
                listener(model, name, folder)
