# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PEQA: integer weights whose scales are tuned. Importing this package registers the method with PEFT."""

from peft_ext.peqa.config import PeqaConfig
from peft_ext.peqa.layer import PeqaLinear
from peft_ext.peqa.model import PeqaModel
from peft_ext.registration import register_tuner


register_tuner(name="peqa", config_cls=PeqaConfig, model_cls=PeqaModel)

__all__ = ["PeqaConfig", "PeqaLinear", "PeqaModel"]
