# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Several threads on one model: each computes what it would compute alone. They are made to meet in the middle of a pass, so
that a value of one that another one could see is seen."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model

from generation_ext.critic import CriticLogitsProcessor, generate
from generation_ext.critic.reading import Reading
from generation_ext.critic.rollouts import _recording
from generation_ext.granularity import convert_to_granularity_attention, recorded
from generation_ext.in_context import LabelScorer
from generation_ext.prompts import Task
from generation_ext.shared_prefix.cache import EMPTY
from generation_ext.shared_prefix.decoding import DecodingBatch, _attention
from peft_ext import AdapterPool, AlphaTuningConfig, BottleneckConfig, PeqaConfig
from peft_ext.language_model import LanguageModel, inference
from peft_ext.ood.features import extract
from tests.cases import assert_differs, assert_same, move_adapter
from tests.generation_ext.critic.reference import random_critic
from tests.tiny import byte_models
from tests.tiny.models import inputs, tiny
from tests.tiny.tokenizers import tiny_tokenizer, tokenizer


TIMEOUT = 60


def at_once(*jobs):
    """What the jobs return, each from a thread of its own."""
    results, errors = [None] * len(jobs), []

    def run(index, job):
        try:
            results[index] = job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=job) for job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    if errors:
        raise errors[0]
    return results


@contextmanager
def meeting(module, count):
    """Inside, `count` threads wait for each other whenever they reach a module."""
    barrier = threading.Barrier(count, timeout=TIMEOUT)

    def meet(*args):
        barrier.wait()

    handle = module.register_forward_pre_hook(meet)
    try:
        yield
    finally:
        handle.remove()
        barrier.abort()


def pool_of(folder, count):
    """A pool with so many adapters, and the logits with each, and with none."""
    names = [f"task{index}" for index in range(count)]
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4), names[0]).eval()
    for index, name in enumerate(names):
        if index:
            model.add_adapter(name, PeqaConfig(bits=4))
        move_adapter(model, name, seed=index, strength=0.5)
    model.save_pretrained(folder)
    pool = AdapterPool(model.unload())
    for name in names:
        pool.load(folder / name)
    expected = {}
    for name in (*pool.names, None):
        pool.activate(name)
        expected[name] = logits(pool.model)
    return pool, expected


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**inputs("llama"), **kwargs).logits


def last_layer(model):
    return model.get_decoder().layers[-1]


def test_a_pool_in_threads(tmp_path):
    """One thread has activated an adapter, one another, one mixes, one has chosen nothing."""
    pool, expected = pool_of(tmp_path, 3)
    names = ["task2", None, "task0"]

    def activated(name):
        pool.activate(name)
        ready.wait()
        assert pool.active == name
        return logits(pool.model)

    def mixed():
        ready.wait()
        with pool.mixed(names):
            return logits(pool.model)

    def neither():
        ready.wait()
        return logits(pool.model)

    pool.activate("task1")
    ready = threading.Barrier(4, timeout=TIMEOUT)
    with meeting(last_layer(pool.model), 4):
        zero, two, of_all, plain = at_once(lambda: activated("task0"), lambda: activated("task2"), mixed, neither)
    assert_same(zero, expected["task0"])
    assert_same(two, expected["task2"])
    for row, name in enumerate(names):
        assert_same(of_all[row], expected[name][row])
    # what was activated last, by either
    assert any(torch.equal(plain, expected[name]) for name in ("task0", "task2"))
    assert torch.equal(logits(pool.model), expected["task1"]) and pool.active == "task1"  # this thread's own choice


def test_eight_threads_with_eight_adapters(tmp_path):
    pool, _ = pool_of(tmp_path, 8)
    prompts = inputs("llama")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def write(name, mixed):
        if mixed:
            with pool.mixed([name] * len(prompts["input_ids"])):
                return pool.model.generate(**prompts, **options).tolist()
        pool.activate(name)
        return pool.model.generate(**prompts, **options).tolist()

    expected = [write(name, mixed) for name in pool.names for mixed in (False, True)]
    jobs = [lambda name=name: [write(name, mixed) for mixed in (False, True)] for name in pool.names]
    found = [text for texts in at_once(*jobs) for text in texts]
    assert found == expected
    assert len({str(text) for text in found}) > 4


def test_a_new_thread_has_what_was_activated_last(tmp_path):
    """As when text is streamed: generate runs in a thread that the caller starts."""
    pool, expected = pool_of(tmp_path, 2)
    pool.activate("task1")
    (found,) = at_once(lambda: logits(pool.model))
    assert torch.equal(found, expected["task1"])
    (active,) = at_once(lambda: pool.active)
    assert active == "task1"


def test_two_pools_in_one_thread(tmp_path):
    one, of_one = pool_of(tmp_path / "one", 2)
    other, of_other = pool_of(tmp_path / "other", 2)
    one.activate("task0")
    other.activate("task1")
    assert torch.equal(logits(one.model), of_one["task0"]) and torch.equal(logits(other.model), of_other["task1"])
    with one.mixed(["task1"] * 3), other.mixed(["task0"] * 3):
        assert_same(logits(one.model), of_one["task1"])
        assert_same(logits(other.model), of_other["task0"])


def test_a_compiled_model_with_a_pool(tmp_path):
    """As long as one thread chooses, graphs are whole; then they leave off at packed layers and ask."""
    tuned = get_peft_model(tiny("mlp"), PeqaConfig(bits=4)).eval()
    move_adapter(tuned, strength=0.5)
    tuned.save_pretrained(tmp_path)
    pool, batch = AdapterPool(tuned.unload()), inputs("mlp")
    pool.load(tmp_path, "one")

    def run(model):
        with torch.no_grad():
            return model(**batch)

    expected = {}
    for name in ("one", None):
        pool.activate(name)
        expected[name] = run(pool.model)
    assert_differs(expected["one"], expected[None])
    compiled = torch.compile(pool.model, backend="eager")
    assert_same(run(compiled), expected[None])
    pool.activate("one")
    assert_same(run(compiled), expected["one"])
    names = ["one", None, "one", *[None] * (len(expected[None]) - 3)]
    with pool.mixed(names):
        found = run(compiled)
    for row, name in enumerate(names):
        assert_same(found[row], expected[name][row])
    assert_same(run(compiled), expected["one"])
    at_once(lambda: pool.activate(None))  # from now on, the layers' own scales are another thread's
    assert_same(run(compiled), expected["one"])
    torch._dynamo.reset()


CONFIGS = {
    "peqa": PeqaConfig(bits=4),
    "alphatuning": AlphaTuningConfig(bits=3),
    "bottleneck": BottleneckConfig(),
    "modules_to_save": PeqaConfig(bits=4, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapter_names_from_threads(kind):
    model = get_peft_model(tiny("llama"), CONFIGS[kind], "one").eval()
    model.add_adapter("two", CONFIGS[kind])
    for seed, name in enumerate(("one", "two")):
        move_adapter(model, name, seed=seed)
    batches = [["one"] * 3, ["two"] * 3, ["one", "two", "__base__"]]
    expected = [logits(model, adapter_names=names) for names in batches]
    plain = logits(model)
    assert_differs(expected[0], expected[1])
    with meeting(last_layer(model.get_base_model()), 4):
        *found, without = at_once(
            *(lambda names=names: logits(model, adapter_names=names) for names in batches), lambda: logits(model)
        )
    for mine, alone in zip(found, expected):
        assert torch.equal(mine, alone)
    assert torch.equal(without, plain)


TASK = Task("Review: {text}\nSentiment:", labels={"good": " good", "bad": " bad"})


def test_a_scorer_beside_plain_passes():
    model = byte_models.model("llama")
    scorer = LabelScorer(model, tokenizer(), TASK)
    texts, others = ["a fine film", "two lost hours"], ["no"]
    expected, expected_others = scorer.score(texts).log_probs, scorer.score(others).log_probs
    plain = logits(model)
    with meeting(last_layer(model), 3):
        first, second, beside = at_once(
            lambda: scorer.score(texts).log_probs, lambda: scorer.score(others).log_probs, lambda: logits(model)
        )
    assert (first == expected).all() and (second == expected_others).all()
    assert torch.equal(beside, plain)
    assert not model.lm_head._forward_pre_hooks


def test_a_processor_is_entered_and_left_while_another_thread_runs_the_model():
    """torch registers a hook that takes kwargs in two steps, and removes it in two."""
    model = tiny("llama")
    backbone, plain = model.get_decoder(), logits(model)
    seen = []

    class Between(OrderedDict):
        def __setitem__(self, key, value):
            seen.extend(at_once(lambda: logits(model)))
            super().__setitem__(key, value)

        def __delitem__(self, key):
            seen.extend(at_once(lambda: logits(model)))
            super().__delitem__(key)

    backbone._forward_hooks_with_kwargs = Between()
    model._forward_pre_hooks_with_kwargs = Between()
    with CriticLogitsProcessor(model, random_critic(model)):
        pass
    assert len(seen) == 4 and all(torch.equal(one, plain) for one in seen)


def test_one_processor_in_several_threads():
    """Its own encodings (without a cache) are each thread's own."""
    model = tiny("llama")
    texts = [torch.tensor([[5 + i, 9, 3 + i, 77 - i]]) for i in range(4)]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "use_cache": False, "pad_token_id": 0}
    with CriticLogitsProcessor(model, random_critic(model), strength=4.0) as processor:

        def write(text):
            mask = torch.ones_like(text)
            return model.generate(text, attention_mask=mask, logits_processor=[processor], **options).tolist()

        expected = [write(text) for text in texts]
        for _ in range(3):
            assert at_once(*(lambda text=text: write(text) for text in texts)) == expected


def test_a_critic_with_a_lora_beside_plain_passes():
    model = tiny("llama")
    critic = random_critic(model, lora_rank=2)
    plain = logits(model)

    def adapted():
        with critic.adapted(model):
            return logits(model)

    alone = adapted()
    assert_differs(alone, plain)
    with meeting(last_layer(model), 2):
        found, beside = at_once(adapted, lambda: logits(model))
    assert torch.equal(found, alone) and torch.equal(beside, plain)


def test_two_threads_that_ask_for_the_head_alone(monkeypatch):
    """The second comes while the first has put its states in place of a pass, and leaves the model as both found it."""
    model = tiny("llama")
    backbone, lock, waits = model.get_decoder(), threading.Lock(), threading.Event()
    states = [torch.randn(1, 1, 32), torch.randn(1, 1, 32)]

    class Lock:
        def __enter__(self):
            if lock.locked():
                waits.set()
            lock.acquire()

        def __exit__(self, *error):
            lock.release()

    monkeypatch.setattr(generate, "_head_lock", Lock())

    def ask(hidden):
        with generate._answering(backbone, hidden):
            return backbone(torch.tensor([[4]])).last_hidden_state

    plain = logits(model)
    with generate._answering(backbone, states[0]):
        second = threading.Thread(target=ask, args=states[1:])
        second.start()
        assert waits.wait(TIMEOUT)
        assert backbone(torch.tensor([[4]])).last_hidden_state is states[0]
    second.join(TIMEOUT)
    assert "forward" not in vars(backbone)
    assert torch.equal(logits(model), plain)


def test_recorded_states_are_the_threads_own():
    model = tiny("llama")

    last = model.config.num_hidden_layers
    readings = [Reading((last,), last), Reading((1,), last, running_mean=True)]

    def recording(reading):
        with _recording(model, reading, None) as steps:
            logits(model)
        return steps

    alone = [recording(reading) for reading in readings]
    with meeting(last_layer(model), 3):
        *found, _ = at_once(
            *(lambda reading=reading: recording(reading) for reading in readings), lambda: logits(model)
        )
    for (mine,), (expected,) in zip(found, alone):  # a step each: that of its own pass
        assert torch.equal(mine, expected)


def test_features_of_a_classifier_in_threads():
    model, words = tiny("bert"), tiny_tokenizer()
    batches = [["w5 w6"], ["w7 w8 w9", "w3"], ["w4 w4 w4 w4"]]
    expected = [extract(model, words, texts) for texts in batches]
    with meeting(model.classifier, 3):
        found = at_once(*(lambda texts=texts: extract(model, words, texts) for texts in batches))
    for mine, alone in zip(found, expected):
        assert torch.equal(mine.features, alone.features) and torch.equal(mine.logits, alone.logits)


def test_evaluation_mode_lasts_until_the_last_is_through():
    model = tiny("mlp").train()
    first_is_out, second_is_in, first_is_in = (threading.Event() for _ in range(3))

    def first():
        with inference(model):
            first_is_in.set()
            assert second_is_in.wait(TIMEOUT)
        first_is_out.set()

    def second():
        assert first_is_in.wait(TIMEOUT)
        with inference(model):
            second_is_in.set()
            assert first_is_out.wait(TIMEOUT)
            return [module.training for module in model.modules()]

    _, modes = at_once(first, second)
    assert not any(modes) and all(module.training for module in model.modules())


def test_granularities_in_threads():
    model = convert_to_granularity_attention(tiny("bart")).eval()
    batch = inputs("bart")
    others = {name: value.flip(0) if value.dim() else value for name, value in batch.items()}

    def run(given):
        with torch.no_grad(), recorded(model) as granularities:
            return model(**given).logits, granularities

    expected = run(batch), run(others)
    attention = model.get_encoder().layers[0].self_attn
    with meeting(attention.q_proj, 2):
        found = at_once(lambda: run(batch), lambda: run(others))
    for (mine, z), (alone, z_alone) in zip(found, expected):
        assert torch.equal(mine, alone)
        assert z.keys() == z_alone.keys() and all(torch.equal(z[name], z_alone[name]) for name in z)


def test_shared_decoding_beside_plain_passes():
    """While texts are written behind a shared prefix, the model's attention is ours in that thread alone."""
    base = tiny("llama")
    model, kind = LanguageModel(base), type(base.config)
    plain = logits(base)
    cache = DecodingBatch(model, EMPTY, [[4, 5], [6]]).cache
    with _attention(model, cache):
        (beside,) = at_once(lambda: logits(base))
        assert base.config._attn_implementation == "almost_shared_prefix"
    assert torch.equal(beside, plain) and type(base.config) is kind
