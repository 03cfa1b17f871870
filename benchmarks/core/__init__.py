# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What all benchmarks share. Importing it imports nothing, so that workers that measure memory start with an empty process."""
