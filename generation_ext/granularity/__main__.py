# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m generation_ext.granularity train | paraphrase | evaluate | show`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Optional

from peft_ext.command_line import run_command


COMMANDS = {
    "train": "train C-DNPG, or a plain Transformer, on pairs of texts; goes on after a kill",
    "paraphrase": "paraphrase texts with a trained model",
    "evaluate": "BLEU, iBLEU, ROUGE-L and METEOR of a model's paraphrases",
    "show": "the granularities of a sentence's tokens, in the terminal and as a picture",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; returns the exit status, see `run_command`."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command("python -m generation_ext.granularity", "generation_ext.granularity.commands", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
