# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What steers and reads a language model, on one family, each against a loop that encodes every text by itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers

from generation_ext.critic import CriticLogitsProcessor, critic_generate
from generation_ext.granularity import GranularityConfig, convert_to_granularity_attention
from generation_ext.granularity.attention import GranularityHead
from generation_ext.in_context.scoring import LabelScorer
from generation_ext.probing import FeatureExtractor
from generation_ext.prompts import Task
from peft_ext.language_model import backbone
from tests.generation_ext.critic.reference import WITHOUT_EMBEDDINGS, SlowProcessor, random_critic, read_slowly
from tests.tiny.tokenizers import tiny_tokenizer


TOP_K, STRENGTH, NEW = 5, 3.0, 5
LONGEST = 24  # of texts, for granularities
PADDED = torch.tensor([[0, 0, 0, 5, 17, 40, 8], [9, 3, 77, 4, 61, 12, 30], [0, 33, 90, 21, 6, 50, 7]])
TASK = Task("w5 {text} w7", {"one": " w8 w9", "two": " w8", "three": " w11 w12 w13"})
TEXTS = ["w20 w21", "w30", "w40 w41 w42 w43 w44 w45", "w50 w51", "w60", "w61 w62", "w70 w71 w72", "w80", "w81 w82"]
SHOWN = [("w33 w34", "one"), ("w35", "three")]
# Whose own steps with a cache, without any critic, are off from its passes without one: by 2e-3 in transformers 5.24, in float64
# as well. Nothing that reads those states can be nearer.
STEPS_ARE_OFF = ("zamba2",)
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


def guessed(model: Any) -> None:
    """A check of action values: what the critic says of the state before each token, the text encoded by itself."""
    critic = random_critic(model, action_values=True)

    class Slow(transformers.LogitsProcessor):
        @torch.no_grad()
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            result = scores.clone()
            for row, ids in enumerate(input_ids):
                text = ids[ids.cumsum(0) > 0][None]
                states = model(input_ids=text, use_cache=False, output_hidden_states=True).hidden_states
                state = read_slowly(model, critic, states)
                for token in scores[row].topk(TOP_K).indices:
                    after = critic.action_log_values(state, token[None])[0]
                    result[row, token] += STRENGTH * (after - critic.log_value(state))
            return result

    with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH, mode="action-value") as processor:
        same(model, generated(model, [processor], PADDED), PADDED, Slow())


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


def own_difference(model: Any, prompts: torch.Tensor, **options: Any) -> float:
    """How far a model's own scores with a cache are from those without one, nothing being steered."""
    cached, whole = (generated(model, [], prompts, **{**options, "use_cache": use}) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    return max((one - other).abs().max().item() for one, other in zip(cached.scores, whole.scores))


def same(model: Any, found: Any, prompts: torch.Tensor, slow: Any = None, **options: Any) -> None:
    """Compare with a slow processor."""
    slow = slow or SlowProcessor(model, [random_critic(model)], [STRENGTH], TOP_K)
    expected = generated(model, [slow], prompts, **options)
    assert torch.equal(found.sequences, expected.sequences)
    written = expected.sequences[:, prompts.shape[1] :]
    own = own_difference(model, prompts, **options) if model.config.model_type in STEPS_ARE_OFF else 0.0
    allowed = 2e-3 + own
    for step, (ours, theirs) in enumerate(zip(found.scores, expected.scores)):
        # of a text that has ended, scores decide nothing
        goes_on = (written[:, :step] != 2).all(dim=1) if "num_beams" not in options else slice(None)
        torch.testing.assert_close(ours[goes_on], theirs[goes_on], rtol=1e-3, atol=allowed)
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


@torch.no_grad()
def granularities(model: Any) -> None:
    """A check of attention with granularities, padded and step by step, against attention as two loops in a twin of the model
    that reads every text by itself."""
    twin = copy.deepcopy(model)
    convert_to_granularity_attention(model, GranularityConfig(link="rectified", initial=0.0, max_length=LONGEST))
    heads = {name: module for name, module in model.named_modules() if isinstance(module, GranularityHead)}
    generator = torch.Generator().manual_seed(3)
    for head in heads.values():
        size = head.projection.weight.shape
        head.projection.weight.copy_(0.3 * torch.randn(size, generator=generator))
        head.projection.bias.fill_(0.3)
    naive = LoopedAttention(twin, heads)
    ids, mask = PADDED, (PADDED != 0).long()
    found = model(input_ids=ids, attention_mask=mask).logits
    alone = twin(input_ids=ids[1:2], use_cache=False).logits[0, -1]
    written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    with naive:
        for row, text in enumerate(ids):
            expected = twin(input_ids=text[text != 0][None], use_cache=False).logits[0]
            torch.testing.assert_close(found[row, -1], expected[-1], rtol=1e-3, atol=2e-3)
            ended = (written[row, ids.shape[1] :] == 2).nonzero()
            end = ids.shape[1] + int(ended[0]) + 1 if len(ended) else written.shape[1]
            whole = torch.cat([text[text != 0], written[row, ids.shape[1] : end]])
            logits = twin(input_ids=whole[None], use_cache=False).logits[0]
            steps = range(int((text != 0).sum()), len(whole))
            for step in steps:
                short = logits[step - 1].max() - logits[step - 1, whole[step]]
                assert short < 2e-3, f"another token at step {step}, short of the best by {short}"
    assert not torch.allclose(found[1, -1], alone, atol=1e-2), "granularities do nothing"


class LoopedAttention:
    """Within it, attentions of a plain model weigh keys by equations 6, 8 and 9, one element at a time; without cache and
    padding.

    Args:
        model: The plain model.
        heads: Of a converted twin: names of the heads there -> heads.
    """

    NAME = "granularities_as_loops"

    def __init__(self, model: Any, heads: dict[str, GranularityHead]) -> None:
        self.model = model
        self.heads = {model.get_submodule(name.removesuffix(".granularity")): head for name, head in heads.items()}
        self.z: list[float] = []

    def __enter__(self) -> None:
        transformers.AttentionInterface.register(self.NAME, self.attend)
        self.handles = [each.register_forward_pre_hook(self.see, with_kwargs=True) for each in self.heads]
        self.before = {id(each): each for each in (module.config for module in self.heads)}
        self.kept = {key: each._attn_implementation for key, each in self.before.items()}
        for each in self.before.values():
            each._attn_implementation_internal = self.NAME

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        for key, each in self.before.items():
            each._attn_implementation_internal = self.kept[key]

    def see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        u = self.heads[module].projection(hidden)[0, :, 0]
        self.z = torch.tanh(u / 2).clamp(min=0).tolist()

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        _, count, length, size = query.shape
        output = torch.zeros(1, length, count, value.shape[-1])
        scale = options.get("scaling") or size**-0.5
        window, cap = options.get("sliding_window"), options.get("softcap")
        for head in range(count):
            shared = head * key.shape[1] // count
            for i in range(length):
                seen = range(max(0, i - window + 1) if window else 0, i + 1)
                scores = [float(query[0, head, i] @ key[0, shared, j]) * scale for j in seen]
                scores = [cap * math.tanh(score / cap) for score in scores] if cap else scores
                weights = [math.exp(score) * self.mask(self.z[i], self.z[j], i - j) for score, j in zip(scores, seen)]
                for j, weight in zip(seen, weights):
                    output[0, i, head] += weight / sum(weights) * value[0, shared, j]
        return output, None

    @staticmethod
    def mask(a: float, b: float, distance: int) -> float:
        resonance = (1 - a) * max(0.0, 1 - (a + b)) + a * min(1.0, 1 - a + b)
        return resonance * max(0.0, min(1.0, (LONGEST - 2) ** (1 - a) + 2 - distance))


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
    "action values": guessed,
    "beams": steered(num_beams=3),
    "no cache": steered(use_cache=False),
    "drafts": steered(prompt_lookup_num_tokens=2),
    "critic_generate": looped,
    "labels": labels,
    "features": features,
    "granularity": granularities,
}
