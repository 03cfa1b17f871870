# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Shared prefixes: what several texts begin with runs through a frozen language model once, and is only read afterwards."""
