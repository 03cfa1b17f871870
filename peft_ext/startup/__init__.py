# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A folder for PYTHONPATH: Python processes that are started with it know our methods (see sitecustomize.py)."""
