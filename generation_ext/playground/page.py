# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The page: four tabs of gradio. Nothing is fetched from elsewhere and nothing is reported."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from generation_ext.playground.answers import BASE, Answers


def make_page(answers: Answers) -> Any:
    """The page as `gradio.Blocks`, to be launched.

    Raises:
        ImportError: If gradio isn't installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the playground needs: pip install 'peft-ext[playground]'") from error

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        """A mistake is a message on the page."""

        def call(*values: Any) -> Any:
            try:
                return function(*values)
            except ValueError as error:
                raise gradio.Error(str(error), print_exception=False) from error

        return call

    with gradio.Blocks(title="peft-ext playground") as page:
        gradio.Markdown(
            "# peft-ext playground\nEverything runs on this machine. The first answer of a tab takes longest."
        )
        with gradio.Tab("Two adapters"):
            gradio.Markdown("One packed base of 4 bits; each answer has an adapter of its own, in one batch.")
            prompt = gradio.Textbox("The for statement is used to", label="Prompt", elem_id="adapters-prompt")
            with gradio.Row():
                left = gradio.Dropdown(answers.adapters, value=BASE, label="Left")
                right = gradio.Dropdown(answers.adapters, value=answers.adapters[-1], label="Right")
            go = gradio.Button("Generate", variant="primary", elem_id="adapters-go")
            with gradio.Row():
                texts = [
                    gradio.Textbox(label=side, lines=5, elem_id=f"adapters-{side.lower()}")
                    for side in ("Left", "Right")
                ]
            go.click(guarded(answers.beside_each_other), [prompt, left, right], texts)
        with gradio.Tab("Steer"):
            gradio.Markdown(
                "A critic of happy words. The greener a token, the likelier the critic finds that the text has them."
            )
            prompt = gradio.Textbox("The food was", label="Prompt", elem_id="steer-prompt")
            strength = gradio.Slider(-8, 16, value=8, step=1, label="Strength", elem_id="steer-strength")
            seed = gradio.Number(0, label="Seed", precision=0)
            go = gradio.Button("Generate", variant="primary", elem_id="steer-go")
            gradio.Markdown("**Steered**")
            steered = gradio.HTML(elem_id="steer-steered")
            gradio.Markdown("**The same model alone**")
            plain = gradio.HTML(elem_id="steer-plain")
            go.click(guarded(answers.steered), [prompt, strength, seed], [steered, plain])
        with gradio.Tab("Not mine"):
            gradio.Markdown(
                "Four intents (a table, music, the weather, an alarm), and a detector for everything else."
            )
            text = gradio.Textbox("please get me a table for four", label="Text", elem_id="intent-text")
            go = gradio.Button("Classify", variant="primary", elem_id="intent-go")
            verdict = gradio.HTML(elem_id="intent-verdict")
            go.click(guarded(answers.intent), [text], [verdict])
        with gradio.Tab("Paraphrase"):
            gradio.Markdown(
                "C-DNPG, trained on thirty pairs about learning. White words are the frame, green ones detail."
            )
            text = gradio.Textbox("how do i learn swimming", label="Sentence", elem_id="paraphrase-text")
            go = gradio.Button("Paraphrase", variant="primary", elem_id="paraphrase-go")
            other = gradio.Textbox(label="Paraphrase", elem_id="paraphrase-other")
            picture = gradio.HTML(elem_id="paraphrase-picture")
            go.click(guarded(answers.paraphrased), [text], [other, picture])
    return page
