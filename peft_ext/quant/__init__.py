# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Number formats and packed weights. Knows tensors only: no PEFT, no model, no file."""

from peft_ext.quant.binary import dequantize_binary, levels_of, quantize_binary
from peft_ext.quant.uniform import dequantize, quantize


__all__ = ["dequantize", "dequantize_binary", "levels_of", "quantize", "quantize_binary"]
