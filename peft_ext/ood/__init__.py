# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Out-of-distribution detection behind text classifiers; `study/` compares how tuning methods and model size change it."""
