# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the tuners on packed weights stand on: which layers are packed, adapters as scales, files, mixed batches.

Importing this package teaches transformers' own `load_adapter` to read our adapter files.
"""

from peft_ext.registration import extend_load_adapter
from peft_ext.scale_tuning.native_loading import extended


extend_load_adapter(extended)
