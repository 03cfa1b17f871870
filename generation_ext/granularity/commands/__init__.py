# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""One module for each command of `python -m generation_ext.granularity`."""
