# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The verbs of `peft-ext paraphrase`, a module each."""

COMMANDS = {
    "train": "train C-DNPG, or a plain Transformer, on pairs of texts; goes on after a kill",
    "paraphrase": "paraphrase texts with a trained model",
    "evaluate": "BLEU, iBLEU, ROUGE-L and METEOR of a model's paraphrases",
    "show": "the granularities of a sentence's tokens, in the terminal and as a picture",
}
