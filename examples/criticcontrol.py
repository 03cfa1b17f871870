# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""CriticControl: a critic learns from a reward that is three lines of Python, and steers the frozen model that it read."""

import torch

from generation_ext import Critic, CriticConfig, CriticTrainer, critic_generate
from generation_ext.critic import from_texts
from peft_ext import load, load_tokenizer


POSITIVE = ("good", "great", "love", "wonderful", "happy", "best", "enjoy", "beautiful")

model, tokenizer = load(dtype="bfloat16"), load_tokenizer()
reward = from_texts(lambda texts: [min(1.0, sum(text.lower().count(word) for word in POSITIVE) / 2) for text in texts])
prompts = ["The film was", "My day was", "This book is", "The food was"] * 32

critic = Critic.for_model(model)
arguments = CriticConfig(
    "runs/critic", num_iterations=1, rollouts_per_iteration=128, epochs_per_iteration=10, max_new_tokens=16
)
CriticTrainer(critic, arguments, model, reward, prompts, processing_class=tokenizer).train()
critic.save_pretrained("runs/critic/final")

inputs = tokenizer(["The weather was"] * 8, return_tensors="pt")
for strength in (0.0, 8.0):
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, max_new_tokens=16, custom_generate=critic_generate, critic=critic, strength=strength
    )
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    print(f"strength {strength}: mean reward {sum(reward(texts, [''] * 8)) / 8:.2f}; {texts[0]!r}")
