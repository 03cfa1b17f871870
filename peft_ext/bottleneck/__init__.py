# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Bottleneck adapters (Houlsby, Pfeiffer). Importing this package registers the method with PEFT."""

from peft_ext.bottleneck.config import BottleneckConfig
from peft_ext.bottleneck.layer import BottleneckLinear
from peft_ext.bottleneck.model import BottleneckModel
from peft_ext.registration import register_tuner


register_tuner(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)

__all__ = ["BottleneckConfig", "BottleneckLinear", "BottleneckModel"]
