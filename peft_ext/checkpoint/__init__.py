# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Packed checkpoints in and out. Importing this package registers `bcq` with transformers."""

from peft_ext.checkpoint.bcq import QUANT_METHOD, BcqConfig, BcqHfQuantizer
from peft_ext.registration import register_quantizer


register_quantizer(QUANT_METHOD, BcqConfig, BcqHfQuantizer)

__all__ = ["BcqConfig", "BcqHfQuantizer"]
