# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""peft-ext: published methods to adapt and shrink language models, as parts of PEFT. Importing it registers them."""

import peft_ext.auto_classes  # noqa: F401 (AutoPeftModel* on packed bases)
from peft_ext.adapter_files import install as _check_adapter_files
from peft_ext.alphatuning import AlphaTuningConfig, AlphaTuningModel
from peft_ext.bottleneck import BottleneckConfig, BottleneckModel
from peft_ext.checkpoint import BcqConfig, load_gptq, load_packed
from peft_ext.checkpoint.gguf import export_gguf
from peft_ext.counting import install as _count_weights
from peft_ext.model_card import note_measured
from peft_ext.models import load, load_tokenizer
from peft_ext.packed_cards import install as _install_cards
from peft_ext.peqa import PeqaConfig, PeqaModel
from peft_ext.perplexity import perplexity
from peft_ext.rows import read_rows
from peft_ext.scale_tuning.bit_budget import BitAllocation, allocate_bits
from peft_ext.scale_tuning.calibration import calibrate
from peft_ext.scale_tuning.pool import AdapterPool
from peft_ext.scale_tuning.report import Report, report
from peft_ext.sealing import install as _check_indexes
from peft_ext.text import PYTHON_DOCS, load_text, token_blocks
from peft_ext.version import __version__


__all__ = [
    "AdapterPool",
    "AlphaTuningConfig",
    "AlphaTuningModel",
    "BcqConfig",
    "BitAllocation",
    "BottleneckConfig",
    "BottleneckModel",
    "PYTHON_DOCS",
    "PeqaConfig",
    "PeqaModel",
    "Report",
    "__version__",
    "allocate_bits",
    "calibrate",
    "export_gguf",
    "load",
    "load_gptq",
    "load_packed",
    "load_text",
    "load_tokenizer",
    "note_measured",
    "perplexity",
    "read_rows",
    "report",
    "token_blocks",
]

_count_weights()
_install_cards()
_check_adapter_files()
_check_indexes()
