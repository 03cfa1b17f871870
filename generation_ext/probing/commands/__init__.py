# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The verbs of `peft-ext probe`, a module each."""

COMMANDS = {
    "train": "fit a classifier on the hidden states of labelled texts; goes on after a kill",
    "predict": "classes and probabilities of texts",
}
