# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The `peft-ext` command."""

from __future__ import annotations

import sys
from functools import partial

from peft_ext.command_line import run_command


COMMANDS = {
    "tune": "quantise a language model, tune it on conversations, prompts or texts, and compare before and after",
    "quantize": "write a packed checkpoint of a language model, calibrated on your data",
    "eval": "perplexity of any model on held-out data",
    "generate": "generate text with any model",
    "chat": "talk with a model in the terminal",
    "export": "write a model for other engines: compressed-tensors, GGUF, bcq or plain floats",
    "inspect": "show what is in a checkpoint, an adapter or a run, without loading it",
    "run": "another program (lm_eval, trl, transformers, ...) with our methods and formats known to it",
    "plan": "memory that tuning and serving a model take, from its config alone",
}

main = partial(run_command, "peft-ext", "peft_ext.commands", COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
