# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""AlphaTuning: binary codes whose first scaling factors are tuned. Importing this package registers it with PEFT."""

from peft_ext.alphatuning.config import AlphaTuningConfig
from peft_ext.alphatuning.layer import AlphaTuningLinear
from peft_ext.alphatuning.model import AlphaTuningModel
from peft_ext.registration import register_tuner


register_tuner(name="alphatuning", config_cls=AlphaTuningConfig, model_cls=AlphaTuningModel)

__all__ = ["AlphaTuningConfig", "AlphaTuningLinear", "AlphaTuningModel"]
