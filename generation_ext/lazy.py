# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Packages whose public names are imported when they are asked for; importing the packages imports nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def found_in(package: str, *modules: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package: a name of its `__all__` is what the first module that has it calls so.

    Args:
        package: The package's `__name__`.
        modules: Names of modules, light ones first; those that begin with a dot lie in the package.
    """

    def __getattr__(name: str) -> Any:
        if name in sys.modules[package].__all__:
            for module in modules:
                home = importlib.import_module(module, package)
                if hasattr(home, name):
                    return getattr(home, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
