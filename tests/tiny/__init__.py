# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Tiny models and tokenizers for all tests: random weights from configs, no download, milliseconds per step.

`models` reads a hundred words and has every architecture that tuners and critics meet, `byte_models` reads bytes and has
room for demonstrations, `tokenizers` has what turns texts into either's ids, `folders` what a `--model` argument may name.
"""
