# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the tuners on packed weights stand on: which layers are packed, adapters as scales, files, mixed batches."""
