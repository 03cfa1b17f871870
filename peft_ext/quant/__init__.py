# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Number formats and packed weights. Knows tensors only: no PEFT, no model, no file."""
