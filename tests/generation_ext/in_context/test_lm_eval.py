# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`--model peft_ext` of lm-evaluation-harness gives the numbers of `--model hf`, with less computed."""

from __future__ import annotations

import math

import pytest
import torch

from generation_ext.in_context.continuations import Continuation, score_continuations
from generation_ext.shared_prefix import batching
from peft_ext.language_model import language_model
from tests.generation_ext.in_context.harness_tasks import TASKS, write_tasks
from tests.tiny.byte_models import CAUSAL, LENGTH, adapted, model
from tests.tiny.folders import save_long_model
from tests.tiny.tokenizers import tokenizer_for


TEXTS = [
    ([1, 2, 3, 4, 5, 6], [7]),
    ([1, 2, 3, 4, 5, 6], [7, 8, 9]),
    ([1, 2, 3, 4, 5, 6], [8]),
    ([1, 2, 3, 4, 5, 6, 7], [8]),
    ([1, 2, 3, 4, 9], [9, 9]),
    ([5], [6, 7, 8, 9, 10, 11]),
    ([5], [6, 7]),
    ([5], [6, 7]),
]


@torch.no_grad()
def naive(lm, context, tokens):
    logits = lm(input_ids=torch.tensor([[*context, *tokens]]), use_cache=False).logits[0, len(context) - 1 : -1]
    parts = logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
    return float(parts.sum()), bool((logits.argmax(-1) == torch.tensor(tokens)).all())


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("shots", [0, 40])
def test_continuations_score_as_alone(name, shots):
    generator = torch.Generator().manual_seed(shots)
    shown = torch.randint(0, 250, (shots,), generator=generator).tolist()
    lm = model(name)
    wanted = [Continuation(shown + context, tokens) for context, tokens in TEXTS * (4 if shots else 1)]
    # one that is certain to be greedy
    last = lm(input_ids=torch.tensor([wanted[0].context])).logits[0, -1].argmax().item()
    wanted.append(Continuation(wanted[0].context, [last]))
    found = {}
    for indices, scores in score_continuations(language_model(lm), wanted):
        found.update(zip(indices, scores))
    assert sorted(found) == list(range(len(wanted)))
    for index, each in enumerate(wanted):
        log_prob, greedy = naive(lm, *each)
        assert found[index].log_prob == pytest.approx(log_prob, abs=1e-4)
        assert found[index].greedy == greedy
    assert found[len(wanted) - 1].greedy


def test_small_batches_change_nothing():
    lm = language_model(model("llama"))
    wanted = [Continuation(context, tokens) for context, tokens in TEXTS]

    def total(limit):
        scores = [score for _, found in score_continuations(lm, wanted, limit) for score in found]
        return len(scores), sum(score.log_prob for score in scores)

    assert total(1) == pytest.approx(total(None), abs=1e-4)


def harness(name):
    lm_eval = pytest.importorskip("lm_eval")
    from generation_ext.in_context.lm_eval import SharedPrefixLM

    kind = {"hf": lm_eval.models.huggingface.HFLM, "peft_ext": SharedPrefixLM}[name]
    return lm_eval, kind


def results_of(kind, lm_eval, lm, tokenizer, names, folder, **kwargs):
    """Metrics and all responses of a model on tasks."""
    from lm_eval.tasks import TaskManager

    evaluated = lm_eval.simple_evaluate(
        model=kind(pretrained=lm, tokenizer=tokenizer, batch_size=4, **kwargs),
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    responses = {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda each: each["doc_id"])]
        for name, samples in evaluated["samples"].items()
    }
    return evaluated["results"], responses


def flat(response):
    """The numbers, flags and strings of nested lists."""
    if isinstance(response, (list, tuple)):
        return [each for part in response for each in flat(part)]
    return [response]


def close(ours, theirs):
    for name in TASKS:
        got, wanted = flat(ours[f"tiny_{name}"]), flat(theirs[f"tiny_{name}"])
        assert len(got) == len(wanted) > 0
        for one, other in zip(got, wanted):
            if isinstance(other, float):
                assert one == pytest.approx(other, abs=2e-4)
            else:
                assert one == other


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("llama", "first_n"),
        ("gemma2", None),
        pytest.param("gpt2", "first_n", marks=pytest.mark.slow),
        pytest.param("bloom", "first_n", marks=pytest.mark.slow),
        pytest.param("mistral", None, marks=pytest.mark.slow),
    ],
)
def test_five_tasks_as_the_harness_s_own_model(name, sampler, tmp_path):
    lm_eval, kind = harness("peft_ext")
    names = write_tasks(tmp_path, sampler=sampler)
    lm, words = model(name), tokenizer_for("gpt2")
    ours, our_responses = results_of(kind, lm_eval, lm, words, names, tmp_path)
    theirs, their_responses = results_of(harness("hf")[1], lm_eval, lm, words, names, tmp_path)
    close(our_responses, their_responses)
    assert ours.keys() == theirs.keys() == set(names)
    for task in names:
        for metric, value in theirs[task].items():
            if isinstance(value, float):
                assert ours[task][metric] == pytest.approx(value, rel=1e-3)


def request(context, continuation):
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, (context, continuation), 0)


def test_an_adapter_counts():
    requests = [request("ab ab", " c"), request("ab ab", " d e")]

    def scores(name, seed):
        made = harness(name)[1](pretrained=adapted(seed), tokenizer=tokenizer_for("gpt2"))
        return flat(made.loglikelihood(requests, disable_tqdm=True))

    assert scores("peft_ext", 1) == pytest.approx(scores("hf", 1), abs=2e-4)
    assert math.dist(scores("peft_ext", 1), scores("peft_ext", 2)) > 1e-3


def test_what_is_too_long_is_cut_as_the_harness_cuts_it(caplog):
    _, kind = harness("peft_ext")
    requests = [request("ab " * LENGTH, f" {word}") for word in ("good", "bad", "ab ab")] + [request("x", " y")]
    requests.append(request("", "no context"))
    numbers = []
    for each in (kind, harness("hf")[1]):
        made = each(pretrained=model("llama"), tokenizer=tokenizer_for("gpt2"), batch_size=2)
        numbers.append(flat(made.loglikelihood(requests, disable_tqdm=True)))
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-4)
    assert "3 of 5 requests are longer than max_length=512" in caplog.text


def test_prefixes_are_run_once(monkeypatch):
    """The tokens that go through the model: the shots once, each input once, each label once."""
    _, kind = harness("peft_ext")
    lm, words = model("llama"), tokenizer_for("gpt2")
    made = kind(pretrained=lm, tokenizer=words, batch_size=1)
    counted = []
    hook = lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        shots = "shown " * 50
        made.loglikelihood(
            [request(f"{shots}{number:02}:", f" {word}") for number in range(16) for word in ("bad", "very good")],
            disable_tqdm=True,
        )
    finally:
        hook.remove()
    shown, own, labels = len(words(shots)["input_ids"]), 3, len(" bad") + len(" very good")
    assert sum(counted) <= (shown + 16 * (own + labels)) * 1.2
    assert max(counted) <= batching._CPU_TOKENS


def test_a_model_that_cannot_share_is_scored_as_ever(caplog):
    _, kind = harness("peft_ext")
    lm, words = model("t5"), tokenizer_for("t5")
    requests = [request("a b", "c"), request("a b", "d e")]
    ours = kind(pretrained=lm, tokenizer=words).loglikelihood(requests, disable_tqdm=True)
    theirs = harness("hf")[1](pretrained=lm, tokenizer=words).loglikelihood(requests, disable_tqdm=True)
    assert ours == theirs
    assert "nothing shared: an encoder-decoder" in caplog.text


def test_empty_requests_and_bad_arguments():
    _, kind = harness("peft_ext")
    lm, words = model("llama"), tokenizer_for("gpt2")
    assert kind(pretrained=lm, tokenizer=words).loglikelihood([], disable_tqdm=True) == []
    with pytest.raises(ValueError, match="no tokens to score"):
        kind(pretrained=lm, tokenizer=words).loglikelihood([request("a", "")], disable_tqdm=True)
    with pytest.raises(ValueError, match="memory_limit"):
        kind(pretrained=lm, tokenizer=words, memory_limit=-1)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        kind(pretrained="/nowhere/at/all", device="cpu")


def test_what_a_model_argument_names(tmp_path):
    """A packed folder and an adapter's folder alone, from names, as the command line gives them."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from peft_ext import PeqaConfig
    from tests.cases import move_adapter

    _, kind = harness("peft_ext")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    floats = save_long_model(tmp_path / "float")
    packed = get_peft_model(AutoModelForCausalLM.from_pretrained(floats), PeqaConfig(bits=4)).unload()
    packed.save_pretrained(base)
    tokenizer_for("gpt2").save_pretrained(base)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), PeqaConfig(bits=4, task_type="CAUSAL_LM"))
    move_adapter(tuned)
    tuned.save_pretrained(adapter)
    requests = [request("a b c", " d"), request("a b c", " e f")]

    def scores(arguments):
        made = kind.create_from_arg_string(arguments, {"device": "cpu", "batch_size": 1})
        return flat(made.loglikelihood(requests, disable_tqdm=True))

    alone, together = scores(f"pretrained={adapter}"), scores(f"pretrained={base},peft={adapter}")
    bare = scores(f"pretrained={base}")
    assert alone == together
    assert math.dist(alone, bare) > 1e-3
    theirs = harness("hf")[1](pretrained=str(base), peft=str(adapter), device="cpu")
    assert together == pytest.approx(flat(theirs.loglikelihood(requests, disable_tqdm=True)), abs=2e-4)
