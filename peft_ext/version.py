# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The version, readable without importing torch."""

__version__ = "0.1.0"
