# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""peft-ext: published methods to adapt and shrink language models, as parts of PEFT. Importing it registers them."""

from peft_ext.peqa import PeqaConfig, PeqaModel, calibrate


__version__ = "0.1.0"

__all__ = ["PeqaConfig", "PeqaModel", "calibrate"]
