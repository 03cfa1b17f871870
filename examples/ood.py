# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""An intent classifier that says "not mine": LoRA on a frozen model, and a detector with a threshold behind it."""

import torch
from peft import LoraConfig, get_peft_model

from peft_ext import load, load_tokenizer
from peft_ext.ood import OODPipeline


INTENTS = {
    "book_table": ["book a table", "a table for two", "reserve a table tonight", "i need a table", "table for six"],
    "play_music": ["play a song", "some music please", "put on jazz", "play the new album", "i want to hear rock"],
}
OTHERS = ["what is the capital of france", "my printer is broken"]

names = list(INTENTS)
texts = [text for examples in INTENTS.values() for text in examples[:-1]]
labels = [label for label, examples in enumerate(INTENTS.values()) for _ in examples[:-1]]
held_out = [examples[-1] for examples in INTENTS.values()]

tokenizer = load_tokenizer()
classifier = load(kind="classifier", num_labels=len(names))
classifier.config.pad_token_id = tokenizer.pad_token_id
model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS"))

batch, targets = tokenizer(texts, return_tensors="pt", padding=True), torch.tensor(labels)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
for _ in range(8):
    model(**batch, labels=targets).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

pipeline = OODPipeline.fit(model.eval(), tokenizer, texts, labels, held_out, label_names=names)
for text in [*held_out, *OTHERS]:
    print(text, "->", pipeline(text))
pipeline.save_pretrained("runs/intents")
