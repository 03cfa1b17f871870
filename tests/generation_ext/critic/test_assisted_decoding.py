# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Under a critic, assisted decoding writes what it writes without drafts, with one forward pass more for each draft."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers

from generation_ext.critic import CriticLogitsProcessor
from peft_ext.language_model import backbone
from tests.generation_ext.critic.reference import PLAIN, SlowProcessor, random_critic, shared
from tests.tiny.models import tiny


TOP_K, STRENGTH, NEW = 4, 2.0, 10
# repeats itself, so that prompt lookup finds something
IDS = torch.tensor([[9, 3, 77, 4, 9, 3, 77, 4, 9, 3]])
PADDED = torch.tensor([[0, 0, 9, 3, 77, 4, 9, 3, 77, 4, 9, 3]])
WAYS: dict[str, Any] = {
    "lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"},
}


@functools.cache
def assistant_of(model, **options):
    """Nearly the same model, some of whose drafts are right; made before anything hooks into the model."""
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(0.02 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    assistant.generation_config.update(**options, assistant_confidence_threshold=0.0)
    return assistant


def generate(model, processors, ids=IDS, way=None, **kwargs):
    options = dict(WAYS[way]) if way else {}
    if way == "assistant":
        options = {"assistant_model": assistant_of(model, **options)}
    return model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        logits_processor=list(processors),
        **{
            "max_new_tokens": NEW,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_scores": True,
            "eos_token_id": None,
            "pad_token_id": 0,
            **options,
            **kwargs,
        },
    )


def same(output, expected) -> None:
    assert torch.equal(output.sequences, expected.sequences)
    for ours, theirs in zip(output.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def passes_of(model) -> tuple[list[int], Any]:
    """Tokens of each forward pass of the model's body from now on, and what ends that."""
    counts: list[int] = []

    def count(module, args, kwargs):  # before it: a pass may end at an inner layer
        counts.append((args[0] if args else kwargs["input_ids"]).shape[1])

    return counts, backbone(model).register_forward_pre_hook(count, with_kwargs=True)


@pytest.mark.parametrize("way", WAYS)
# mistral and gemma3 look back on few tokens, gpt2 adds positions
@pytest.mark.parametrize(
    ("name", "ids", "reads"),
    [
        ("llama", IDS, {}),
        ("gpt2", PADDED, {}),
        ("mistral", IDS, PLAIN),
        ("gemma3", PADDED, PLAIN),
        ("llama", PADDED, PLAIN),
    ],
)
def test_the_same_texts_in_two_passes_a_draft(name, ids, reads, way):
    model = shared(name)
    critic = random_critic(model, **reads)
    generate(model, [], way=way, max_new_tokens=1)
    expected = generate(model, [SlowProcessor(model, [critic], [STRENGTH], TOP_K)], ids)
    with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH) as processor:
        counts, handle = passes_of(model)
        output = generate(model, [processor], ids, way)
        handle.remove()
        assert getattr(processor._local, "draft", None) is None
    same(output, expected)
    theirs, ours = counts[::2], counts[1::2]
    # a pass of generate's over the text's last token (first: the prompt) and d drafts, and one of ours over d + 1 times k
    drafts = [theirs[0] - ids.shape[1], *(count - 1 for count in theirs[1:])]
    assert ours == [TOP_K * (count + 1) for count in drafts]
    assert max(drafts) == 3, "nothing was drafted"
    assert len(theirs) < NEW or way == "lookup", "no draft was right"


@pytest.mark.parametrize("way", WAYS)
def test_action_values_need_no_pass(way):
    model = shared("llama")
    critic = random_critic(model, action_values=True)
    generate(model, [], way=way, max_new_tokens=1)
    outputs = []
    for how in (None, way):
        with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH, mode="action-value") as processor:
            counts, handle = passes_of(model)
            outputs.append(generate(model, [processor], way=how))
            handle.remove()
    same(outputs[1], outputs[0])
    assert counts[0] >= IDS.shape[1] and max(counts[1:]) <= 4 and len(counts) <= NEW


@pytest.mark.parametrize("name", ["bloom", "gpt_neo", "t5", "bart"])
@pytest.mark.parametrize("mode", ["exact", "action-value"])
def test_other_families(name, mode):
    """Whose candidates can't be a tree: one text after the other, or no pass at all."""
    model = shared(name)
    critic = random_critic(model, action_values=True)
    outputs = []
    for way in (None, "lookup"):
        with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH, mode=mode) as processor:
            outputs.append(generate(model, [processor], way=way))
    same(outputs[1], outputs[0])


def test_several_critics_one_with_a_lora():
    model = shared("llama")
    critics = [random_critic(model), random_critic(model, 7, lora_rank=2)]
    expected = generate(model, [SlowProcessor(model, critics, [STRENGTH, -2.0], TOP_K)])
    with CriticLogitsProcessor(model, critics, TOP_K, [STRENGTH, -2.0]) as processor:
        same(generate(model, [processor], way="lookup"), expected)


class Penalty(transformers.LogitsProcessor):
    """Moves some tokens to the front that the model doesn't think likely."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, (input_ids.shape[1] * 7) % scores.shape[1]] += 50.0
        return scores


def test_behind_processors_that_move_other_tokens_to_the_front():
    model = shared("llama")
    critic = random_critic(model)
    expected = generate(model, [Penalty(), SlowProcessor(model, [critic], [STRENGTH], TOP_K)])
    with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH) as processor:
        same(generate(model, [Penalty(), processor], way="lookup"), expected)


def test_texts_of_one_token_alone():
    """Whose drafts look like the text itself."""
    model = shared("llama")
    critic = random_critic(model)
    ids = torch.full((1, 6), 7)
    expected = generate(model, [SlowProcessor(model, [critic], [STRENGTH], TOP_K)], ids)
    with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH) as processor:
        for _ in range(2):
            same(generate(model, [processor], ids, "lookup"), expected)


def test_one_processor_with_and_without_drafts():
    model = shared("llama")
    critic = random_critic(model)
    expected = generate(model, [SlowProcessor(model, [critic], [STRENGTH], TOP_K)])
    with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH) as processor:
        for way in ("lookup", None, "assistant", "lookup", None):
            same(generate(model, [processor], way=way), expected)


def test_an_assistant_with_another_tokenizer_is_not_steered():
    """It has another vocabulary: what its candidates are is not for the critic to say."""
    model, assistant = shared("llama"), tiny("gpt2")
    critic = random_critic(model)
    seen = []

    class Watched(CriticLogitsProcessor):
        def candidates(self, scores):
            seen.append(scores.shape[-1])
            return super().candidates(scores)

    with Watched(model, critic, TOP_K, STRENGTH) as processor:
        output = model.generate(
            IDS, assistant_model=assistant, logits_processor=[processor], max_new_tokens=NEW, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    expected = generate(model, [SlowProcessor(model, [critic], [STRENGTH], TOP_K)])
    assert torch.equal(output, expected.sequences)
    assert len(seen) >= NEW


@pytest.mark.parametrize("way", WAYS)
def test_sampling_keeps_to_the_steered_distribution(way):
    model = shared("llama")
    with CriticLogitsProcessor(model, random_critic(model), TOP_K, STRENGTH, mask_others=True) as processor:
        for _ in range(5):
            output = generate(model, [processor], way=way, do_sample=True)
            written = output.sequences[0, IDS.shape[1] :]
            assert all(torch.isfinite(scores[0, token]) for scores, token in zip(output.scores, written, strict=True))


def test_the_model_as_its_own_assistant_by_its_first_layers():
    """Whose states aren't the model's."""
    model = shared("llama")
    critic = random_critic(model)
    expected = generate(model, [SlowProcessor(model, [critic], [STRENGTH], TOP_K)])
    with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH) as processor:
        same(generate(model, [processor], assistant_early_exit=1), expected)
