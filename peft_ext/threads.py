# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What keeps calls in several threads apart: values that travel with a call, and hooks that act in one thread alone.

A model is shared by all threads, and so is what is set on it: an attribute, a hook, another `forward`. What belongs to one
call is kept here instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Generic, Optional, TypeVar

import torch
from torch import nn


T = TypeVar("T")
_registering = threading.RLock()


class PerCall(Generic[T]):
    """A value that the code which a block runs sees, in its thread or task, and nobody else.

    A new thread begins without one, as with all context variables; `asyncio.to_thread` takes it along, and so does
    `contextvars.copy_context().run`.

    A compiler can't trace context variables. Where none is in use, its graphs go without; where one is, they leave off at the
    layers that read it, and read it each time.

    Args:
        name: Of the context variable.

    Attributes:
        ever: Whether some thread ever had one. Layers ask for every token, and most processes never have one.
        in_use: Whether some thread may have a value that compiled graphs don't know of; what compilers guard on.
    """

    def __init__(self, name: str) -> None:
        self._value: ContextVar[Optional[T]] = ContextVar(name, default=None)
        self._lock = threading.Lock()
        self._blocks = 0
        self._kept = False
        self.ever = self.in_use = False

    def get(self) -> Optional[T]:
        """The value of this call. Not for what a compiler traces."""
        return self._value.get()

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(value, *args)`; None without a value."""
        if not self.ever:
            return None
        if torch.compiler.is_compiling():
            return _outside_of_graphs(self, function, args) if self.in_use else None
        value = self._value.get()
        return None if value is None else function(value, *args)

    @contextmanager
    def block(self, value: T) -> Iterator[None]:
        """The value of calls inside; the one before comes back afterwards."""
        before = self._value.get()
        self._count(1)
        self._value.set(value)
        try:
            yield
        finally:
            self._value.set(before)
            self._count(-1)

    def keep(self, value: T, for_compilers: bool = True) -> None:
        """The value of this thread's (or task's) calls from now on.

        Args:
            value: What they see.
            for_compilers: Whether compiled graphs have to read it; they needn't where the model has the same on itself.
        """
        self.ever = True
        self._value.set(value)
        if for_compilers and not self._kept:
            with self._lock:
                self._kept = self.in_use = True

    def _count(self, more: int) -> None:
        with self._lock:
            self._blocks += more
            self.ever = True
            self.in_use = self._kept or self._blocks > 0


@torch.compiler.disable
def _outside_of_graphs(per_call: PerCall, function: Callable[..., Any], args: tuple) -> Any:
    value = per_call.get()
    return None if value is None else function(value, *args)


@contextmanager
def hooks_of_this_thread(
    hooks: Iterable[tuple[nn.Module, Callable[..., Any]]], before: bool = False
) -> Iterator[None]:
    """Inside, forward hooks that act on the calling thread's passes alone (and on what its backward passes run again).

    Args:
        hooks: Modules, and for each what `register_forward_hook` takes.
        before: The hooks are for `register_forward_pre_hook`.
    """
    owner, handles = threading.get_ident(), []
    try:
        # torch numbers hooks by a counter that isn't guarded: two threads at once could get one number
        with _registering:
            for module, hook in hooks:
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                handles.append(register(partial(_of_thread, owner, hook)))
        yield
    finally:
        with _registering:
            for handle in handles:
                handle.remove()


def _of_thread(owner: int, hook: Callable[..., Any], *args: Any) -> Any:
    if torch.compiler.is_compiling():
        return _of_thread_outside(owner, hook, *args)
    # on a GPU, the autograd engine's own threads run checkpointed activations again
    if threading.get_ident() == owner or torch._C._current_graph_task_id() != -1:
        return hook(*args)
    return None


@torch.compiler.disable
def _of_thread_outside(owner: int, hook: Callable[..., Any], *args: Any) -> Any:
    return hook(*args) if threading.get_ident() == owner else None
