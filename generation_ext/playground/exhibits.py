# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the page shows: a packed base with two adapters, a critic, an intent classifier and a paraphrase model. Each is made in
well under a minute on two cores, and kept in a folder for the next time."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from generation_ext.critic.rewards import from_texts
from generation_ext.critic.training import CriticConfig, CriticTrainer
from generation_ext.critic.value import Critic
from generation_ext.granularity.modeling import CDNPGConfig, CDNPGForConditionalGeneration
from generation_ext.granularity.tokenizer import train_tokenizer
from generation_ext.granularity.training import paraphrase_trainer
from peft_ext import AdapterPool, PeqaConfig, load, load_text, load_tokenizer, token_blocks
from peft_ext.files import scratch, written_whole
from peft_ext.ood import OODPipeline
from peft_ext.text import PYTHON_DOCS


CACHE_VARIABLE = "PEFT_EXT_CACHE"
ADAPTERS: dict[str, Callable[[str], str]] = {"documentation": str, "shouting": str.upper}
POSITIVE = ("good", "great", "love", "wonderful", "happy", "best", "enjoy", "beautiful", "nice", "delicious")
INTENTS = {
    "book a table": "book a table|a table for two|reserve a table tonight|i need a table|table for six|get us a table",
    "play music": "play a song|some music please|put on jazz|play the new album|i want to hear rock|play radio",
    "weather": "will it rain|what is the weather|is it cold outside|how warm is it|sunny tomorrow|forecast please",
    "set an alarm": "wake me at six|set an alarm|alarm for noon|remind me to get up|start a timer|timer for ten minutes",
}
_THINGS = ("chess", "swimming", "guitar", "french", "cooking", "drawing", "python", "driving", "dancing", "singing")
_WAYS = (
    ("how do i learn {}", "what is the best way to learn {}"),
    ("why is {} so hard", "what makes {} difficult"),
    ("can anybody teach me {}", "who could teach me {}"),
)


class Exhibits:
    """Makes what is missing when it is asked for, and keeps it.

    Args:
        model: What `peft_ext.load` takes; None: the default model.
        folder: Where everything is kept; None: `PEFT_EXT_CACHE`, or `~/.cache/peft-ext`. What belongs to a model lies in a
            folder of its name.
    """

    def __init__(self, model: Optional[str] = None, folder: Optional[str] = None) -> None:
        root = Path(folder or os.environ.get(CACHE_VARIABLE) or "~/.cache/peft-ext").expanduser()
        self.model = model
        self.folder = root / "playground" / (model or "default").strip("/").replace("/", "--")

    @cached_property
    def tokenizer(self) -> Any:
        """The language model's."""
        return load_tokenizer(self.model)

    @cached_property
    def pool(self) -> AdapterPool:
        """The packed base, and the adapters beside it."""
        base = self._made("base", self._write_base)
        pool = AdapterPool(load(str(base), dtype="float32"))
        for name in ADAPTERS:
            pool.load(str(base / "adapters" / name), name=name)
        return pool

    @cached_property
    def critic(self) -> Critic:
        """A critic of the base: how likely a text will have words that somebody happy uses."""
        folder = self._made("critic", self._write_critic)
        return Critic.from_pretrained(folder).eval().attach(self.pool.model)

    @cached_property
    def intents(self) -> OODPipeline:
        """A classifier of four intents, with a detector behind it."""
        return OODPipeline.from_pretrained(str(self._made("intents", self._write_intents)))

    @cached_property
    def paraphraser(self) -> tuple[Any, Any]:
        """C-DNPG on sentences about learning things, and its tokenizer."""
        folder = self._made("paraphraser", self._write_paraphraser)
        return CDNPGForConditionalGeneration.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def _made(self, name: str, write: Callable[[Path, str], None]) -> Path:
        folder = self.folder / name
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            # the caller may be in no_grad: what it asked for is trained all the same
            with written_whole(folder) as partial, scratch("playground") as work, torch.enable_grad():
                partial.mkdir(parents=True, exist_ok=True)
                write(partial, str(work))
        return folder

    def _write_base(self, folder: Path, scratch: str) -> None:
        config = PeqaConfig(bits=4, group_size=32, task_type="CAUSAL_LM")
        model = get_peft_model(load(self.model, dtype="float32"), config)
        texts = load_text(PYTHON_DOCS).train
        for name, changed in ADAPTERS.items():
            if name not in model.peft_config:
                model.add_adapter(name, config)
            model.set_adapter(name)
            blocks = token_blocks(self.tokenizer, [changed(text) for text in texts], 64)[:64]
            arguments = TrainingArguments(
                scratch,
                max_steps=16,
                per_device_train_batch_size=4,
                learning_rate=2e-2,
                report_to="none",
                save_strategy="no",
            )
            rows = [{"input_ids": block, "labels": block} for block in blocks]
            Trainer(model, arguments, train_dataset=rows).train()
            model.save_pretrained(folder / "adapters", selected_adapters=[name])
        model.unload().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _write_critic(self, folder: Path, scratch: str) -> None:
        model = self.pool.model
        self.pool.activate(None)
        reward = from_texts(
            lambda texts: [min(1.0, sum(word in text.lower() for word in POSITIVE) / 2) for text in texts]
        )
        prompts = ["The film was", "My day was", "This book is", "The food was", "I think that", "The weather is"] * 32
        critic = Critic.for_model(model)
        arguments = CriticConfig(
            scratch,
            num_iterations=1,
            rollouts_per_iteration=192,
            epochs_per_iteration=10,
            max_new_tokens=16,
            save_strategy="no",
        )
        CriticTrainer(critic, arguments, model, reward, prompts, processing_class=self.tokenizer).train()
        critic.save_pretrained(folder)

    def _write_intents(self, folder: Path, scratch: str) -> None:
        names = list(INTENTS)
        pairs = [(text, label) for label, texts in enumerate(INTENTS.values()) for text in texts.split("|")]
        train = [pair for number, pair in enumerate(pairs) if number % 6 != 5]
        held_out = [text for number, (text, _) in enumerate(pairs) if number % 6 == 5]
        classifier = load(self.model, kind="classifier", num_labels=len(names), dtype="float32")
        classifier.config.pad_token_id = self.tokenizer.pad_token_id
        model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS"))
        batch = self.tokenizer([text for text, _ in train], return_tensors="pt", padding=True)
        targets = torch.tensor([label for _, label in train])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        for _ in range(12):
            model(**batch, labels=targets).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        texts, labels = [text for text, _ in train], [label for _, label in train]
        pipeline = OODPipeline.fit(
            model.eval(), self.tokenizer, texts, labels, held_out, "mahalanobis", label_names=names
        )
        pipeline.save_pretrained(str(folder))

    def _write_paraphraser(self, folder: Path, scratch: str) -> None:
        pairs = [
            {"source": source.format(thing), "target": target.format(thing)}
            for thing in _THINGS
            for source, target in _WAYS
        ]
        tokenizer = train_tokenizer([text for pair in pairs for text in pair.values()], vocab_size=300)
        config = CDNPGConfig(vocab_size=len(tokenizer), d_model=144, encoder_layers=2, decoder_layers=2)
        model = CDNPGForConditionalGeneration(config)
        arguments = Seq2SeqTrainingArguments(
            scratch,
            max_steps=150,
            per_device_train_batch_size=15,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
        )
        paraphrase_trainer(model, tokenizer, arguments, pairs).train()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
