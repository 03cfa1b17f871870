# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""C-DNPG: a small paraphrase model from scratch on a few pairs; its granularities say what it takes for the sentence's frame."""

from transformers import Seq2SeqTrainingArguments

from generation_ext import (
    CDNPGConfig,
    CDNPGForConditionalGeneration,
    paraphrase,
    paraphrase_trainer,
    sentence_granularities,
    train_tokenizer,
)


PAIRS = [
    {"source": f"how do i learn {skill}", "target": f"what is the best way to learn {skill}"}
    for skill in ("chess", "swimming", "guitar", "french", "cooking", "drawing", "python", "to drive")
]

tokenizer = train_tokenizer([text for pair in PAIRS for text in pair.values()], vocab_size=300)
config = CDNPGConfig(vocab_size=len(tokenizer), d_model=144, encoder_layers=2, decoder_layers=2)
model = CDNPGForConditionalGeneration(config)
arguments = Seq2SeqTrainingArguments(
    "runs/paraphrase", max_steps=60, per_device_train_batch_size=8, learning_rate=1e-3, report_to="none"
)
paraphrase_trainer(model, tokenizer, arguments, PAIRS).train()

texts = ["how do i learn swimming", "how do i learn python"]
for text, other in zip(texts, paraphrase(model.eval(), tokenizer, texts, num_beams=4)):
    print(f"{text}  ->  {other}")
print(sentence_granularities(model, tokenizer, texts[0]))
