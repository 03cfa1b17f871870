# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PEQA: a language model becomes 3-bit, its scales are tuned on Python's documentation, and it is loaded again, packed."""

from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_ext import PYTHON_DOCS, PeqaConfig, calibrate, load, load_text, load_tokenizer, perplexity, token_blocks


model, tokenizer = load(), load_tokenizer()  # or load("any hub id, folder or GGUF")
text = load_text(PYTHON_DOCS)
train = token_blocks(tokenizer, text.train, 128)[:64]
held_out = token_blocks(tokenizer, text.held_out, 128)[:8]
print(f"float: perplexity {perplexity(model, held_out):.1f}, {model.get_memory_footprint() / 2**20:.0f} MiB")

config = PeqaConfig(bits=3, init_method="calibrated", task_type="CAUSAL_LM")
model = calibrate(model, config, [{"input_ids": train[:16]}])
model = get_peft_model(model, config)
print(f"3 bits: perplexity {perplexity(model, held_out):.1f}, {model.get_memory_footprint() / 2**20:.0f} MiB")

arguments = TrainingArguments(
    "runs/peqa", max_steps=16, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none"
)
Trainer(model, arguments, train_dataset=[{"input_ids": block, "labels": block} for block in train]).train()
print(f"3 bits, tuned: perplexity {perplexity(model, held_out):.1f}")

model.save_pretrained("runs/peqa/adapter")
model.unload().save_pretrained("runs/peqa/base")

base = AutoModelForCausalLM.from_pretrained("runs/peqa/base")  # packed: no float weight is made
model = PeftModel.from_pretrained(base, "runs/peqa/adapter").eval()
inputs = tokenizer("The for statement is used to", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]))
