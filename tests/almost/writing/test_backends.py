# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Sampling on a shared prefix is sampling one text after the other, each with its own random numbers."""

from __future__ import annotations

import pytest
import torch

from generation_ext.shared_prefix import decoding
from generation_ext.shared_prefix.decoding import DecodingBatch, can_share, prefix_of
from generation_ext.shared_prefix.sampling import Sampling, SeededSampling, draw_tokens, row_generator
from peft_ext.language_model import language_model
from tests.tiny.byte_models import CAUSAL, model
from tests.tiny.tokenizers import tokenizer, tokenizer_for
from trl_ext.almost.writing.backends import Request, TransformersBackend, VLLMBackend, tokens_of


SHARED = "A person asks, and an assistant answers in kind words. "
ENDINGS = ["Why?", "How do I do it", "A", "Tell me more of this", "What is it for, then?"]
REQUESTS = [Request(f"r{number}", SHARED + text) for number, text in enumerate(ENDINGS)]
SAMPLING = Sampling(max_new_tokens=10, samples=2, seed=3, temperature=0.8, top_p=0.8)


@torch.no_grad()
def one_by_one(lm, words, request: Request, number: int, sampling: Sampling) -> str:
    """The whole text through the model for every token, and the nucleus by its definition."""
    ids, start = list(tokens_of(words, request.prompt)), len(tokens_of(words, request.prompt))
    generator = row_generator(f"{sampling.seed}/{request.key}/{number}")
    for _ in range(sampling.max_new_tokens):
        logits = lm(torch.tensor([ids]), use_cache=False).logits[0, -1].double() / sampling.temperature
        probabilities, tokens = logits.softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        kept = probabilities[before < sampling.top_p]
        place = int((kept.cumsum(-1) <= generator.random() * kept.sum()).sum())
        if int(tokens[place]) == words.eos_token_id:
            break
        ids.append(int(tokens[place]))
    return words.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
def test_texts_are_those_of_a_plain_loop(name):
    lm, words = model(name), tokenizer_for(name)
    backend = TransformersBackend(lm, words, batch_size=4)
    expected = [[one_by_one(lm, words, request, n, SAMPLING) for n in range(2)] for request in REQUESTS]
    assert backend.generate(REQUESTS, SAMPLING) == expected
    assert can_share(backend.language_model) == (name in ("llama", "gpt2"))
    assert (len(backend._prefix) >= len(SHARED)) == can_share(backend.language_model)


def test_a_text_does_not_depend_on_its_company():
    lm, words = model("llama"), tokenizer_for("llama")
    together = TransformersBackend(lm, words, batch_size=16).generate(REQUESTS, SAMPLING)
    for batch_size, chosen in ((1, REQUESTS), (3, REQUESTS[::-1]), (8, REQUESTS[2:4])):
        apart = TransformersBackend(lm, words, batch_size).generate(chosen, SAMPLING)
        assert apart == [together[REQUESTS.index(request)] for request in chosen]
    other_seed = Sampling(**{**SAMPLING.__dict__, "seed": 4})
    assert TransformersBackend(lm, words).generate(REQUESTS, other_seed) != together


def test_what_is_done_is_left_out_and_the_rest_is_the_same():
    lm, words = model("llama"), tokenizer_for("llama")
    backend = TransformersBackend(lm, words, batch_size=4)
    batches = list(backend.stream(REQUESTS, SAMPLING))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    first = {place for place, _ in batches[0]}
    assert list(backend.stream(REQUESTS, SAMPLING, done=lambda place: place in first)) == batches[1:]
    half = next(iter(first))
    assert list(backend.stream(REQUESTS, SAMPLING, done=lambda place: place == half)) == batches


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_logits_of_rows_that_come_and_go(name, monkeypatch):
    monkeypatch.setattr(decoding, "_BUFFER_STEP", 4)  # buffers grow on the way
    lm = model(name)
    subject = language_model(lm)
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(3, 250, (count,), generator=generator).tolist()  # noqa: E731
    prefix, prompts = draw(20), [draw(5), draw(9), draw(2)]
    shares = can_share(subject)
    begun = prompts if shares else [prefix + prompt for prompt in prompts]
    batch = DecodingBatch(subject, prefix_of(subject, prefix if shares else []), begun, samples=2)
    texts = [prefix + prompt for prompt in prompts for _ in range(2)]
    logits = batch.start()
    for step in range(5):  # more than there is room for at first
        expected = torch.stack([lm(torch.tensor([text]), use_cache=False).logits[0, -1] for text in texts])
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
        if step == 2:
            kept = torch.tensor([0, 3, 4])
            batch.keep(kept)
            texts = [list(texts[place]) for place in kept]
        new = draw(len(texts))
        for text, token in zip(texts, new):
            text.append(token)
        logits = batch.step(torch.tensor(new))
    assert lm.config.get_text_config()._attn_implementation in ("sdpa", "eager"), "the model keeps its own attention"


def test_stop_strings_and_ends(monkeypatch):
    lm, words = model("llama"), tokenizer_for("llama")
    backend = TransformersBackend(lm, words, batch_size=8)
    free = backend.generate(REQUESTS, SAMPLING)
    mark = next(text[4:6] for texts in free for text in texts if len(text) > 7)
    stopped = backend.generate(REQUESTS, Sampling(**{**SAMPLING.__dict__, "stop": (mark,)}))
    assert stopped == [[text.split(mark)[0] for text in texts] for texts in free] != free
    drawn = [4, 5, words.eos_token_id, 6, 7]
    monkeypatch.setattr(
        "generation_ext.shared_prefix.sampling.draw_tokens",
        lambda logits, *rest: torch.full((len(logits),), drawn.pop(0)),
    )
    assert backend.generate(REQUESTS[:1], Sampling(max_new_tokens=5)) == [[words.decode([4, 5])]]


def test_a_whole_vocabulary_is_sorted_only_where_the_top_does_not_tell():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 2000, generator=generator) * torch.tensor([8.0, 4, 2, 1, 0.1, 0.01])[:, None]
    uniforms = [0.0, 0.3, 0.5, 0.7, 0.9, 0.999]
    for top_p in (1.0, 0.9, 0.1):
        whole = draw_tokens(scores, uniforms, 0.9, top_k=2000, top_p=top_p)
        assert draw_tokens(scores, uniforms, 0.9, top_k=0, top_p=top_p).tolist() == whole.tolist()
    processor = SeededSampling(Sampling(temperature=0.9, top_k=0, top_p=0.9), ["a"] * 6)
    assert (processor(torch.zeros(6, 1), scores) > -torch.inf).sum(-1).tolist() == [1] * 6


def test_bad_input():
    lm, words = model("llama"), tokenizer_for("llama")
    with pytest.raises(ValueError, match="'long' has .* tokens.*more than the model's 512"):
        TransformersBackend(lm, words).generate([Request("long", "x" * 510)], SAMPLING)
    with pytest.raises(ValueError, match="'none' has an empty prompt"):
        TransformersBackend(lm, tokenizer()).generate([Request("none", "")], SAMPLING)
    with pytest.raises(TypeError, match="no causal language model"):
        TransformersBackend(model("bert"), words)
    for name, value in (("temperature", 0), ("top_p", 0), ("top_k", -1), ("max_new_tokens", 0), ("samples", 0)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            Sampling(**{name: value})
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="backend='vllm' needs: pip install vllm"):
            VLLMBackend("some/model")
