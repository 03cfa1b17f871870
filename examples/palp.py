# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PALP: a scikit-learn classifier on a frozen model's hidden states, compared with and without a prompt."""

from sklearn.model_selection import cross_val_score

from generation_ext import PALPClassifier
from peft_ext import load, load_tokenizer


GOOD = ["a fine film", "a joy to watch", "simply lovely", "great fun", "moving and clever", "the best this year"]
BAD = ["two lost hours", "a bore", "badly made", "no fun at all", "dull and stupid", "the worst this year"]

model, tokenizer = load(dtype="bfloat16"), load_tokenizer()
texts, labels = GOOD + BAD, ["good"] * len(GOOD) + ["bad"] * len(BAD)

for name, options in {
    "linear probing": {"template": "{text}"},
    "PALP-T": {"template": "Review: {text}\nSentiment:"},
    "PALP-D": {"template": "Review: {text}\nSentiment:", "demonstrations": "per-class"},
}.items():
    palp = PALPClassifier(model, tokenizer, random_state=0, **options)
    accuracies = cross_val_score(palp, texts, labels, cv=3)
    print(f"{name}: {100 * accuracies.mean():.0f} % right in three folds")

palp.fit(texts, labels).save_pretrained("runs/palp")
print(palp.predict(["what a joy", "what a waste"]))
