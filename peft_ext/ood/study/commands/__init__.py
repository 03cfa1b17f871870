# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The commands of `python -m peft_ext.ood`, a module each."""
