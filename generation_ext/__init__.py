# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Extensions of transformers' generation: what steers or reads a frozen language model. All methods' names in one place."""

from typing import TYPE_CHECKING

from generation_ext import critic, granularity, in_context, probing
from generation_ext.lazy import found_in


if TYPE_CHECKING:
    from generation_ext.critic import *  # noqa: F403
    from generation_ext.granularity import *  # noqa: F403
    from generation_ext.in_context import *  # noqa: F403
    from generation_ext.probing import *  # noqa: F403


__all__: list[str] = []
__all__ += critic.__all__
__all__ += granularity.__all__
__all__ += in_context.__all__
__all__ += probing.__all__

__getattr__ = found_in(__name__, ".critic", ".granularity", ".in_context", ".probing")
