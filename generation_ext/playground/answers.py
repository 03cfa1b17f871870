# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the page's buttons do: texts in, HTML and tables out; one at a time, since all share one model."""

from __future__ import annotations

import html
import threading
from collections.abc import Sequence
from typing import Any

import torch

from generation_ext.critic.generate import critic_generate
from generation_ext.granularity.pictures import sentence_granularities
from generation_ext.granularity.training import paraphrase
from generation_ext.playground.exhibits import ADAPTERS, Exhibits


BASE = "the base alone"
TOKENS = 32


class Answers:
    """The page's four answers.

    Args:
        exhibits: What is shown.
    """

    def __init__(self, exhibits: Exhibits) -> None:
        self.exhibits = exhibits
        self._lock = threading.Lock()

    @property
    def adapters(self) -> list[str]:
        """What can be chosen between."""
        return [BASE, *ADAPTERS]

    @torch.no_grad()
    def beside_each_other(self, prompt: str, left: str, right: str) -> tuple[str, str]:
        """How two adapters go on from a prompt, in one batch."""
        _check(prompt)
        with self._lock:
            pool, tokenizer = self.exhibits.pool, self.exhibits.tokenizer
            model: Any = pool.model
            inputs = tokenizer([prompt, prompt], return_tensors="pt")
            names = [None if name == BASE else name for name in (left, right)]
            with pool.mixed(names):
                tokens = model.generate(
                    **inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
                )
            first, second = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            return first, second

    @torch.no_grad()
    def steered(self, prompt: str, strength: float, seed: float = 0) -> tuple[str, str]:
        """A prompt continued with and without the critic, each token in the colour of the critic's value after it."""
        _check(prompt)
        with self._lock:
            critic, tokenizer = self.exhibits.critic, self.exhibits.tokenizer
            model: Any = self.exhibits.pool.model
            self.exhibits.pool.activate(None)
            inputs = tokenizer(prompt, return_tensors="pt")
            shown = []
            for each in (strength, 0.0):
                torch.manual_seed(int(seed))
                tokens = model.generate(
                    **inputs,
                    max_new_tokens=TOKENS,
                    do_sample=True,
                    top_p=0.9,
                    pad_token_id=tokenizer.pad_token_id,
                    **({"custom_generate": critic_generate, "critic": critic, "strength": each} if each else {}),
                )
                values = critic.value(critic.read(model, tokens))[0]
                pieces = [tokenizer.decode(token) for token in tokens[0].tolist()]
                shown.append(coloured(pieces, values.tolist(), "V"))
            return shown[0], shown[1]

    @torch.no_grad()
    def intent(self, text: str) -> str:
        """Which intent a text is, or that it is none of them."""
        _check(text)
        with self._lock:
            pipeline = self.exhibits.intents
            answer = pipeline(text)
            answer = answer[0] if isinstance(answer, list) else answer
            label = html.escape(str(answer["label"]))
            verdict = f"<b>{label}</b>" if answer["in_distribution"] else f"<b>not mine</b> (nearest: {label})"
            return f"{verdict}<br>score {answer['score']:.1f}, accepted from {pipeline.threshold:.1f}"

    @torch.no_grad()
    def paraphrased(self, text: str) -> tuple[str, str]:
        """A paraphrase, and the source's granularities: light words are the frame, dark ones detail."""
        _check(text)
        with self._lock:
            model, tokenizer = self.exhibits.paraphraser
            (other,) = paraphrase(model, tokenizer, [text.lower()], num_beams=4)
            tokens, z = sentence_granularities(model, tokenizer, text.lower())
            rows = "".join(
                f"<div>layer {number}: {coloured([f' {token}' for token in tokens], row, 'z')}</div>"
                for number, row in enumerate(z.reshape(-1, len(tokens)).tolist(), 1)
            )
            return other, rows


def coloured(pieces: Sequence[str], values: Sequence[float], name: str) -> str:
    """Tokens as HTML, the background from white (0) to green (1); the value is what a pointer over a token shows."""
    spans = []
    for piece, value in zip(pieces, values):
        share = min(max(value, 0.0), 1.0)
        style = f"background:rgba(30,140,80,{share:.2f});border-radius:3px;white-space:pre-wrap"
        spans.append(f'<span style="{style}" title="{name} = {value:.2f}">{html.escape(piece)}</span>')
    return '<span class="tokens">' + "".join(spans) + "</span>"


def _check(text: Any) -> None:
    if not str(text or "").strip():
        raise ValueError("Write something first: the text is empty.")
