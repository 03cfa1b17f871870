# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The verbs of `peft-ext critic`, a module each."""

COMMANDS = {
    "train": "train a critic for a frozen language model on any reward; goes on after a kill",
    "generate": "generate text with one critic or several",
    "export": "a critic as a LoRA on the output head, for PEFT, vLLM or llama.cpp",
    "evaluate": "how well a critic foresees the reward, and what it gains at each strength",
}
