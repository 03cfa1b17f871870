# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The study of how tuning methods and model size change out-of-distribution detection: a grid of cells, trained and
measured one by one (`runner.py`), and its report."""
