# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What steers and reads a language model, on one family, each against a loop that encodes every text by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from generation_ext.critic import CriticLogitsProcessor, critic_generate
from generation_ext.in_context.scoring import LabelScorer
from generation_ext.probing import FeatureExtractor
from generation_ext.prompts import Task
from peft_ext.language_model import backbone
from tests.generation_ext.critic.reference import WITHOUT_EMBEDDINGS, SlowProcessor, random_critic
from tests.tiny.tokenizers import tiny_tokenizer


TOP_K, STRENGTH, NEW = 5, 3.0, 5
PADDED = torch.tensor([[0, 0, 0, 5, 17, 40, 8], [9, 3, 77, 4, 61, 12, 30], [0, 33, 90, 21, 6, 50, 7]])
TASK = Task("w5 {text} w7", {"one": " w8 w9", "two": " w8", "three": " w11 w12 w13"})
TEXTS = ["w20 w21", "w30", "w40 w41 w42 w43 w44 w45", "w50 w51", "w60", "w61 w62", "w70 w71 w72", "w80", "w81 w82"]
SHOWN = [("w33 w34", "one"), ("w35", "three")]
EQUAL, REFUSED, NOT_THERE = "✓", "refused", "–"


def generated(model: Any, processors: list[Any], prompts: torch.Tensor, **options: Any) -> Any:
    """Greedy texts with the scores of every step."""
    return model.generate(
        input_ids=prompts,
        attention_mask=(prompts != 0).long(),
        logits_processor=processors,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


def steered(**options: Any) -> Callable[[Any], None]:
    """A check of the processor under options of `generate`."""

    def check(model: Any) -> None:
        prompts = PADDED[1:2] if "prompt_lookup_num_tokens" in options else PADDED
        with CriticLogitsProcessor(model, random_critic(model), TOP_K, STRENGTH) as processor:
            same(model, generated(model, [processor], prompts, **options), prompts, **options)

    return check


def looped(model: Any) -> None:
    """A check of the decoding loop."""
    own = {"custom_generate": critic_generate, "critic": random_critic(model), "strength": STRENGTH}
    same(model, generated(model, [], PADDED, critic_top_k=TOP_K, **own), PADDED)


def same(model: Any, found: Any, prompts: torch.Tensor, **options: Any) -> None:
    """Compare with the slow processor."""
    slow = SlowProcessor(model, [random_critic(model)], [STRENGTH], TOP_K)
    expected = generated(model, [slow], prompts, **options)
    assert torch.equal(found.sequences, expected.sequences)
    written = expected.sequences[:, prompts.shape[1] :]
    for step, (ours, theirs) in enumerate(zip(found.scores, expected.scores)):
        # of a text that has ended, scores decide nothing
        goes_on = (written[:, :step] != 2).all(dim=1) if "num_beams" not in options else slice(None)
        torch.testing.assert_close(ours[goes_on], theirs[goes_on], rtol=1e-3, atol=4e-3)
    alone = generated(model, [], prompts, **options)
    assert not torch.allclose(found.scores[0], alone.scores[0], atol=0.1), "nothing is steered"


def labels(model: Any) -> None:
    """A check of the scorer, behind demonstrations and without."""
    words = tiny_tokenizer()
    for shown in ([], SHOWN):
        found = LabelScorer(model, words, TASK).score(TEXTS, shown).log_probs
        for row, text in zip(found, TEXTS):
            before = words(TASK.context(text, shown))["input_ids"]
            for ours, word in zip(row, TASK.words):
                whole = words(TASK.context(text, shown) + word)["input_ids"]
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
                theirs = sum(logits[at - 1, whole[at]].item() for at in range(len(before), len(whole)))
                assert abs(ours - theirs) < 2e-3, f"{text!r} {word!r}: {ours} instead of {theirs}"


def features(model: Any) -> None:
    """A check of the last and of an inner layer."""
    words = tiny_tokenizer()
    for layer in (-1, 1):
        found = FeatureExtractor(model, words, layer=layer).extract(TEXTS, "w5 w6 ")
        for row, text in zip(found, TEXTS):
            ids = torch.tensor([words(f"w5 w6 {text}")["input_ids"]])
            with torch.no_grad():
                states = backbone(model)(input_ids=ids, use_cache=False, output_hidden_states=True)
            skipped = model.config.model_type in WITHOUT_EMBEDDINGS
            state = states[0] if layer == -1 else states.hidden_states[layer - skipped]
            torch.testing.assert_close(torch.from_numpy(row), state[0, -1].float(), rtol=1e-3, atol=2e-3)


# Ways of decoding that transformers itself has not for every family.
OPTIONS = {"drafts": {"prompt_lookup_num_tokens": 2}, "critic_generate": {"use_cache": True}}


def has(model: Any, check: str) -> bool:
    """Whether transformers decodes so without a critic."""
    if check == "critic_generate" and model.generation_config.use_cache is False:
        return False
    try:
        generated(model, [], PADDED[1:2], **OPTIONS.get(check, {}))
    except (ValueError, RuntimeError):
        return False
    return True


CHECKS: dict[str, Callable[[Any], None]] = {
    "critic": steered(),
    "beams": steered(num_beams=3),
    "no cache": steered(use_cache=False),
    "drafts": steered(prompt_lookup_num_tokens=2),
    "critic_generate": looped,
    "labels": labels,
    "features": features,
}
