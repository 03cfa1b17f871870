# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The `peft-ext` command: the front door of all three packages, whose commands it knows by name alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Optional

from peft_ext.command_line import Command, Commands, note, run_command


COMMANDS: Commands = {
    "tune": "quantise a language model, tune it on conversations, prompts or texts, and compare before and after",
    "quantize": "write a packed checkpoint of a language model, calibrated on your data",
    "eval": "perplexity of any model on held-out data",
    "generate": "generate text with any model",
    "chat": "talk with a model in the terminal",
    "export": "write a model for other engines: compressed-tensors, GGUF, bcq or plain floats",
    "inspect": "show what is in a checkpoint, an adapter or a run, without loading it",
    "push": "upload a run, an adapter, a packed model, a critic or a classifier to the hub",
    "run": "another program (lm_eval, trl, transformers, ...) with our methods and formats known to it",
    "plan": "memory that tuning and serving a model take, from its config alone",
    "critic": Command("steer a frozen model: train | generate | export | evaluate", "generation_ext.critic.commands"),
    "classify": Command(
        "classify texts in context, with or without demonstrations", "generation_ext.in_context.classify"
    ),
    "probe": Command("classify by a probe on hidden states: train | predict", "generation_ext.probing.commands"),
    "paraphrase": Command("C-DNPG: train | paraphrase | evaluate | show", "generation_ext.granularity.commands"),
    "ood": Command("the out-of-distribution study: run | report", "peft_ext.ood.study.commands"),
    "almost": Command("align a model by its own feedback: all stages, or one of them", "trl_ext.scripts"),
    "playground": Command("a page to try the methods on, on this machine", "generation_ext.playground.command"),
    "completion": "a script that completes commands and flags in bash or zsh",
}

main = partial(run_command, "peft-ext", "peft_ext.commands", COMMANDS)


def old_name(program: str, command: str, argv: Optional[Sequence[str]] = None) -> int:
    """Run a command that was called by the name it had before; says so once, on the standard error."""
    note(f"{program} is now peft-ext {command}; the old name goes with the next release.")
    return main([command, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
