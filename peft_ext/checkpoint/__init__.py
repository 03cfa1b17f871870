# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Packed checkpoints in and out. Importing this package registers its quantizers with transformers."""

from peft_ext.checkpoint.awq import QUANT_METHOD as AWQ_QUANT_METHOD
from peft_ext.checkpoint.awq import PackedAwqConfig, PackedAwqHfQuantizer
from peft_ext.checkpoint.bcq import QUANT_METHOD, BcqConfig, BcqHfQuantizer
from peft_ext.checkpoint.gguf_loading import PackedGgufHfQuantizer
from peft_ext.checkpoint.gptq import QUANT_METHOD as GPTQ_QUANT_METHOD
from peft_ext.checkpoint.gptq import PackedGptqConfig, PackedGptqHfQuantizer
from peft_ext.checkpoint.loading import load_gptq, load_packed
from peft_ext.checkpoint.pack_quantized_loading import QUANT_METHOD as TENSORS_QUANT_METHOD
from peft_ext.checkpoint.pack_quantized_loading import (
    AnyTensorsHfQuantizer,
    PackedTensorsConfig,
    PackedTensorsHfQuantizer,
)
from peft_ext.quant.experts import unfused_experts
from peft_ext.registration import extend_quantizer, keep_names_of_layers, register_quantizer


register_quantizer(QUANT_METHOD, BcqConfig, BcqHfQuantizer)
register_quantizer(GPTQ_QUANT_METHOD, PackedGptqConfig, PackedGptqHfQuantizer)
register_quantizer(AWQ_QUANT_METHOD, PackedAwqConfig, PackedAwqHfQuantizer)
register_quantizer(TENSORS_QUANT_METHOD, PackedTensorsConfig, AnyTensorsHfQuantizer)
extend_quantizer("compressed-tensors", PackedTensorsHfQuantizer)
extend_quantizer("gguf", PackedGgufHfQuantizer)
keep_names_of_layers(lambda model: bool(unfused_experts(model)))

__all__ = ["BcqConfig", "BcqHfQuantizer", "load_gptq", "load_packed"]
