# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Packed checkpoints in and out."""
