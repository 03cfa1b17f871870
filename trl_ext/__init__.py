# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Recipes on top of TRL: ALMoST, alignment with synthetic feedback. All recipes' names in one place."""

from typing import TYPE_CHECKING

from generation_ext.lazy import found_in
from trl_ext import almost


if TYPE_CHECKING:
    from trl_ext.almost import *  # noqa: F403


__all__: list[str] = []
__all__ += almost.__all__

__getattr__ = found_in(__name__, ".almost")
