# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""In-context classification of your own task: zero-shot, behind given demonstrations, and behind the model's own."""

from generation_ext import LabelScorer, SelfGeneratedICL, Task
from peft_ext import load, load_tokenizer


TEXTS = ["Where is my parcel?", "You charged me twice.", "The courier never came.", "I want my money back."]
DEMONSTRATIONS = [("My package is late.", "delivery"), ("The invoice is wrong.", "billing")]

model, tokenizer = load(dtype="bfloat16"), load_tokenizer()
task = Task(
    template="Message: {text}\nTopic:",
    labels={"billing": " billing", "delivery": " delivery"},
    generation_template="A message like: {text}\nA new customer's message about {label}:",
)

scorer = LabelScorer(model, tokenizer, task)
print("zero-shot:            ", scorer.score(TEXTS).predictions())
print("behind demonstrations:", scorer.score(TEXTS, DEMONSTRATIONS).predictions())

sg_icl = SelfGeneratedICL(model, tokenizer, task, preset="recommended", shots=4, samples=4)
scores = sg_icl.score(TEXTS, pool_file="sg_icl_pools.jsonl")  # kept; a second run reads them
print("behind its own:       ", scores.predictions())
