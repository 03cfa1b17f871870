# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What tests of several formats share."""

from __future__ import annotations

import pytest
from torch import nn

from tests.tiny.models import tiny


@pytest.fixture
def float_weights(monkeypatch):
    """The shapes of all float parameters that are made from here on and are as large as a weight of the tiny Llama's layers."""
    shapes = {p.shape for name, p in tiny("llama").named_parameters() if name.endswith("proj.weight")}
    made, original = [], nn.Parameter.__new__

    def watched(cls, data=None, *args, **kwargs):
        if data is not None and data.is_floating_point() and data.shape in shapes and data.device.type != "meta":
            made.append(tuple(data.shape))
        return original(cls, data, *args, **kwargs)

    monkeypatch.setattr(nn.Parameter, "__new__", watched)
    return made
