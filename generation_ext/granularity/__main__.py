# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m generation_ext.granularity train | paraphrase | evaluate | show`."""

from __future__ import annotations

import sys
from functools import partial

from peft_ext.command_line import run_command


COMMANDS = {
    "train": "train C-DNPG, or a plain Transformer, on pairs of texts; goes on after a kill",
    "paraphrase": "paraphrase texts with a trained model",
    "evaluate": "BLEU, iBLEU, ROUGE-L and METEOR of a model's paraphrases",
    "show": "the granularities of a sentence's tokens, in the terminal and as a picture",
}

main = partial(run_command, "python -m generation_ext.granularity", "generation_ext.granularity.commands", COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
