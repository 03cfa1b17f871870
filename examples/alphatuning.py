# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""AlphaTuning: binary codes of 3 bits, of which only the first scaling factors train, on records that become sentences."""

import torch
from peft import get_peft_model

from peft_ext import AlphaTuningConfig, calibrate, load, load_tokenizer


RECORDS = [
    ("name: The Punter, food: Indian", "The Punter serves Indian food."),
    ("name: Aromi, area: riverside", "Aromi is by the river."),
    ("name: Zizzi, price: cheap", "Zizzi is cheap."),
    ("name: Cotto, food: Italian", "Cotto serves Italian food."),
]

model, tokenizer = load(), load_tokenizer()
texts = [f"{record} -> {sentence}{tokenizer.eos_token}" for record, sentence in RECORDS]
batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

config = AlphaTuningConfig(bits=3, init_method="calibrated", task_type="CAUSAL_LM")
model = get_peft_model(calibrate(model, config, [batch]), config)
model.print_trainable_parameters()

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
for step in range(8):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

model.save_pretrained("runs/alphatuning/adapter")
model.unload().save_pretrained("runs/alphatuning/base")  # bcq; loads packed after `import peft_ext`
inputs = tokenizer("name: Fitzbillies, food: French ->", return_tensors="pt")
print(tokenizer.decode(model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)[0]))
