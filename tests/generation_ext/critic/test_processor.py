# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
import transformers

from generation_ext.critic import Critic, CriticLogitsProcessor, backbone, critic_generate
from generation_ext.shared_prefix import candidates
from generation_ext.shared_prefix.inner_states import decoder_layers, output_state
from peft_ext.language_model import LanguageModel
from tests.generation_ext.critic.reference import (
    ENCODER_DECODERS,
    EXPANDED,
    PLAIN,
    TREES,
    SlowProcessor,
    build,
    random_critic,
    shared,
)
from tests.tiny.models import HIDDEN, VOCAB, tiny


TOP_K, STRENGTH = 5, 3.0
PADDED = torch.tensor([[0, 0, 0, 5, 17, 40, 8], [9, 3, 77, 4, 61, 12, 30], [0, 33, 90, 21, 6, 50, 7]])
RIGHT_PADDED = torch.tensor([[5, 17, 40, 8, 0, 0, 0], [9, 3, 77, 4, 61, 12, 30], [33, 90, 21, 6, 50, 7, 0]])
METHODS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 0},
    "nucleus": {"do_sample": True, "top_p": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 0},
    "three each": {"num_return_sequences": 3, "do_sample": True, "top_k": 0},
}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}


def generate(model, processors, input_ids=PADDED, **kwargs):
    torch.manual_seed(3)
    return model.generate(
        input_ids=input_ids,
        attention_mask=(input_ids != 0).long(),
        logits_processor=processors,
        max_new_tokens=kwargs.pop("max_new_tokens", 5),
        return_dict_in_generate=True,
        output_scores=True,
        **kwargs,
    )


def compare(model, critics, input_ids=None, strengths=None, mask_others=False, differs=True, **kwargs):
    """Generate with the processor and with the reference; both must say the same, and (`differs`) not what the model
    says alone."""
    if input_ids is None:  # an encoder is padded at the end: BART counts positions from the first slot
        input_ids = RIGHT_PADDED if model.config.is_encoder_decoder else PADDED
    strengths = strengths or [STRENGTH] * len(critics)
    prompts = input_ids if model.config.is_encoder_decoder else None
    slow = SlowProcessor(model, critics, strengths, TOP_K, mask_others, prompts)
    with CriticLogitsProcessor(model, critics, TOP_K, strengths, mask_others=mask_others) as processor:
        fast = generate(model, [processor], input_ids, **kwargs)
    expected = generate(model, [slow], input_ids, **kwargs)
    assert torch.equal(fast.sequences, expected.sequences)
    for ours, theirs in zip(fast.scores, expected.scores):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    alone = generate(model, [], input_ids, **kwargs)
    same = alone.sequences.shape == fast.sequences.shape and torch.equal(alone.sequences, fast.sequences)
    assert not (differs and same)
    return fast


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3"])
def test_against_the_reference(name, method):
    model = shared(name)
    compare(model, [random_critic(model)], **METHODS[method])


@pytest.mark.parametrize("name", [*TREES, *EXPANDED, *ENCODER_DECODERS, "lora", "peqa"])
@pytest.mark.parametrize("cache", CACHES)
def test_caches(name, cache):
    if (name, cache) == ("gpt_neo", "static"):
        pytest.skip("transformers' own local attention is wrong on a static cache")
    model = shared(name)
    compare(model, [random_critic(model)], **CACHES[cache])


@pytest.mark.parametrize("method", ["beams", "three each"])
@pytest.mark.parametrize("name", [*EXPANDED, *ENCODER_DECODERS])
def test_expanded_rows_and_several_rows_per_prompt(name, method):
    model = shared(name)
    compare(model, [random_critic(model)], **METHODS[method])


@pytest.mark.parametrize("cache", ["static", "none"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_beams_with_other_caches(name, cache):
    model = shared(name)
    compare(model, [random_critic(model)], num_beams=3, **CACHES[cache])


@pytest.mark.parametrize("name", ["llama", "opt", "mistral", "bloom"])
def test_prompts_of_one_token(name):
    model = shared(name)
    compare(model, [random_critic(model)], torch.tensor([[5], [9]]))


@pytest.mark.parametrize("way", ["processor", "critic_generate"])
def test_beside_classifier_free_guidance(way):
    """Its negative prompt has the prompt's length, and goes on with the same tokens in a cache of its own: the critic read
    that cache from the second step on."""
    model = shared("llama")
    critic, prompts, negative = random_critic(model), PADDED[1:2], torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    options = {"negative_prompt_ids": negative, "guidance_scale": 1.7}
    expected = generate(model, [SlowProcessor(model, [critic], [STRENGTH], TOP_K)], prompts, **options)
    if way == "processor":
        with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH) as processor:
            found = generate(model, [processor], prompts, **options)
    else:
        own = {"custom_generate": critic_generate, "critic": critic, "strength": STRENGTH, "critic_top_k": TOP_K}
        found = generate(model, [], prompts, **own, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_windows_longer_and_shorter_than_the_text():
    model = shared("mistral")
    for tokens in range(1, 7):  # the window is 4
        compare(
            model,
            [random_critic(model)],
            torch.tensor([[5, 17, 40, 8, 21, 33][:tokens]]),
            differs=False,
            max_new_tokens=4,
        )


def test_end_of_text_in_the_middle_of_a_batch():
    model = shared("llama")
    critics = [random_critic(model)]
    start = PADDED.shape[1]
    end = compare(model, critics).sequences[1, start + 2]
    new = compare(model, critics, eos_token_id=int(end), max_new_tokens=9).sequences[:, start:]
    stop = int((new[1] == end).nonzero()[0])
    assert stop <= 2 and (new[1, stop + 1 :] == 0).all()
    assert new.shape[1] == 9  # others went on


def test_several_critics():
    model = shared("llama")
    critics = [random_critic(model, seed) for seed in (5, 6, 7)]
    compare(model, critics, strengths=[2.0, -1.5, 0.0])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_critics_with_a_lora(name):
    model = shared(name)
    compare(model, [random_critic(model, lora_rank=2), random_critic(model, 6)], strengths=[3.0, 2.0])
    compare(model, [random_critic(model, 7, lora_rank=2)], num_beams=3)


def test_other_tokens_masked():
    model = shared("llama")
    output = compare(model, [random_critic(model)], mask_others=True)
    assert all((torch.isfinite(scores).sum(dim=-1) == TOP_K).all() for scores in output.scores)


def test_before_and_after_other_processors():
    model, critic = shared("llama"), random_critic(shared("llama"))
    results = []
    for make in (
        lambda: CriticLogitsProcessor(model, critic, TOP_K, STRENGTH),
        lambda: SlowProcessor(model, [critic], [STRENGTH], TOP_K),
    ):
        processors = [transformers.TopPLogitsWarper(0.5), make(), transformers.RepetitionPenaltyLogitsProcessor(1.4)]
        results.append(generate(model, processors, do_sample=True, top_k=0))
    assert torch.equal(results[0].sequences, results[1].sequences)
    for ours, theirs in zip(results[0].scores, results[1].scores):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_paper_formula():
    """p'(a) is p(a) V(s + a) / V(s), renormalised over all tokens."""
    model, critic = shared("llama"), random_critic(shared("llama"))
    ids = torch.tensor([[9, 3, 77, 4]])
    with CriticLogitsProcessor(model, critic, TOP_K) as processor, torch.no_grad():
        logits = model(ids).logits[:, -1]
        steered = processor(ids, logits).softmax(dim=-1)[0]
        probabilities = logits.softmax(dim=-1)[0]
        value = critic.value(critic.read(model, ids)[0, -1])
        expected = probabilities.clone()
        for token in probabilities.topk(TOP_K).indices.tolist():
            text = torch.cat([ids, torch.tensor([[token]])], dim=1)
            expected[token] *= critic.value(critic.read(model, text)[0, -1]) / value
    torch.testing.assert_close(steered, expected / expected.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_nothing_to_steer_by(strength):
    model = shared("llama")
    critic = random_critic(model) if strength == 0 else Critic.for_model(model)  # the latter is constant
    alone = generate(model, [], do_sample=True)
    with CriticLogitsProcessor(model, critic, TOP_K, strength) as processor:
        steered = generate(model, [processor], do_sample=True)
    assert torch.equal(alone.sequences, steered.sequences)
    for ours, theirs in zip(steered.scores, alone.scores):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_negative_strength_steers_away():
    model, critic = shared("llama"), random_critic(shared("llama"))
    ids = torch.tensor([[9, 3, 77, 4]])
    scores = torch.randn(1, VOCAB)
    changes = []
    for strength in (2.0, -2.0):
        with CriticLogitsProcessor(model, critic, TOP_K, strength) as processor:
            changes.append(processor(ids, scores) - scores)
    assert changes[0].abs().max() > 0.1
    torch.testing.assert_close(changes[0], -changes[1], atol=1e-5, rtol=1e-5)


def test_tokens_that_are_ruled_out_already():
    model, critic = shared("llama"), random_critic(shared("llama"))
    scores = torch.full((3, VOCAB), float("-inf"))
    scores[0, [4, 7]] = torch.tensor([1.0, 2.0])
    scores[2] = torch.randn(VOCAB)
    for mask_others in (False, True):
        with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH, mask_others=mask_others) as processor:
            new = processor(PADDED, scores)
        assert torch.isfinite(new[0]).nonzero().flatten().tolist() == [4, 7]
        assert not torch.allclose(new[0, [4, 7]], scores[0, [4, 7]])
        assert torch.equal(new[1], scores[1])  # nothing was left; it stays as it is
        assert torch.isfinite(new[2]).sum() == (TOP_K if mask_others else VOCAB)
        assert not torch.isnan(new).any()


@pytest.mark.parametrize("bias", [-300.0, 300.0])
def test_values_near_zero_and_one(bias):
    model, critic = shared("llama"), random_critic(shared("llama"))
    with torch.no_grad():
        critic.head.bias.fill_(bias)
    with CriticLogitsProcessor(model, critic, TOP_K, 5.0) as processor:
        new = processor(PADDED, torch.randn(3, VOCAB))
    assert torch.isfinite(new).all()


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("cache", ["dynamic", "none"])
def test_action_values(name, cache):
    """Guessed from generate's own state: no forward pass of ours, but where there is no cache to look at."""
    model = shared(name)
    critic = random_critic(model, action_values=True, **PLAIN)
    padded = RIGHT_PADDED if model.config.is_encoder_decoder else PADDED
    passes, states = [], []
    handle = backbone(model).register_forward_hook(lambda module, args, output: passes.append(output[0][:, -1]))

    class Reference(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            result = scores.clone()
            states.append(passes[-1])
            for row in range(len(scores)):
                for token in scores[row].topk(TOP_K).indices:
                    ratio = critic.action_log_values(passes[-1][row], token[None])[0]
                    result[row, token] += STRENGTH * (ratio - critic.log_value(passes[-1][row]))
            return result

    expected = generate(model, [Reference()], padded, **CACHES[cache])
    passes.clear()
    with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH, mode="action-value") as processor:
        output = generate(model, [processor], padded, **CACHES[cache])
    handle.remove()
    assert len(passes) == len(output.scores)
    assert torch.equal(output.sequences, expected.sequences)
    for ours, theirs in zip(output.scores, expected.scores):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*TREES, *EXPANDED, *ENCODER_DECODERS])
def test_one_forward_pass_more_per_step_and_no_output_head(name):
    model = shared(name)
    passes, last, heads = [], [], []
    layers = decoder_layers(LanguageModel(model))
    handles = [
        layers[0].register_forward_hook(lambda module, args, output: passes.append(output_state(output).shape)),
        layers[-1].register_forward_hook(lambda module, args, output: last.append(output_state(output).shape)),
        model.get_output_embeddings().register_forward_hook(lambda module, args, output: heads.append(output.shape)),
    ]
    with CriticLogitsProcessor(model, random_critic(model), TOP_K, STRENGTH) as processor:
        output = generate(model, [processor])
    for handle in handles:
        handle.remove()
    steps = len(output.scores)
    assert len(heads) == steps
    assert len(passes) == 2 * steps
    assert len(last) == steps, "the candidates' passes end at the layer that is read"
    of_candidates = (3, TOP_K, HIDDEN) if name in TREES else (3 * TOP_K, 1, HIDDEN)
    assert all(shape == of_candidates for shape in passes[1::2])


@pytest.mark.parametrize("name", TREES)
def test_tree_and_expanded_rows_are_the_same(name, monkeypatch):
    model, critic = shared(name), random_critic(shared(name))
    results = []
    for trees in (True, False):
        if not trees:
            monkeypatch.setattr(candidates, "takes_trees", lambda model, prefix: False)
        with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH) as processor:
            results.append(generate(model, [processor]))
    for tree, expanded in zip(results[0].scores, results[1].scores):
        torch.testing.assert_close(tree, expanded, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "mistral", "lfm2"])
@pytest.mark.parametrize("static", [False, True])
def test_the_cache_is_only_read(name, static):
    model = shared(name)
    config = model.config
    cache = (
        transformers.StaticCache(config=config, max_cache_len=12)
        if static
        else transformers.DynamicCache(config=config)
    )
    with CriticLogitsProcessor(model, random_critic(model), TOP_K, STRENGTH) as processor, torch.no_grad():
        logits = model(PADDED, attention_mask=(PADDED != 0).long(), cache=cache, use_cache=True).logits[:, -1]
        before = [_tensors(layer) for layer in cache.layers]
        copies = [{key: value.clone() for key, value in layer.items()} for layer in before]
        processor(PADDED, logits)
        after = [_tensors(layer) for layer in cache.layers]
    for old, copied, new in zip(before, copies, after):
        assert old.keys() == new.keys()
        assert all(old[key] is new[key] and torch.equal(copied[key], new[key]) for key in old)


def _tensors(layer):
    found = {}
    for name, value in vars(layer).items():
        parts = value if isinstance(value, dict) else {"": value}
        found.update({(name, key): part for key, part in parts.items() if isinstance(part, torch.Tensor)})
    return found


def test_a_cache_of_the_user():
    """On Mistral, one without a config keeps all tokens, though the model looks back on four."""
    model = shared("mistral")
    critics = [random_critic(model)]
    slow = SlowProcessor(model, critics, [STRENGTH], TOP_K)
    expected = generate(model, [slow])
    for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
        with CriticLogitsProcessor(model, critics, TOP_K, STRENGTH) as processor:
            output = generate(model, [processor], cache=cache)
        assert torch.equal(output.sequences, expected.sequences)
        for ours, theirs in zip(output.scores, expected.scores):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_going_on_from_a_filled_cache_and_prefill_in_chunks():
    model, critic = shared("llama"), random_critic(shared("llama"))
    ids = PADDED[1:2]
    expected = generate(model, [SlowProcessor(model, [critic], [STRENGTH], TOP_K)], ids)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :4], cache=cache, use_cache=True)
    with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH) as processor:
        filled = generate(model, [processor], ids, cache=cache)
        chunks = generate(model, [processor], ids, prefill_chunk_size=3)
    for output in (filled, chunks):
        assert torch.equal(output.sequences, expected.sequences)
        for ours, theirs in zip(output.scores, expected.scores):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_prompt_of_embeddings():
    """generate's ids then have no prompt, while its cache has."""
    model, critic = shared("llama"), random_critic(shared("llama"))
    ids = PADDED[1:2]
    expected = generate(model, [SlowProcessor(model, [critic], [STRENGTH], TOP_K)], ids)
    embeddings = model.get_input_embeddings()(ids).detach()
    with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH) as processor:
        torch.manual_seed(3)
        sequences = model.generate(inputs_embeds=embeddings, logits_processor=[processor], max_new_tokens=5)
    assert torch.equal(sequences, expected.sequences[:, ids.shape[1] :])


def test_outside_of_generate():
    model, critic = shared("llama"), random_critic(shared("llama"))
    scores = torch.randn(3, VOCAB)
    expected = SlowProcessor(model, [critic], [STRENGTH], TOP_K)(PADDED, scores)
    mask = (PADDED != 0).long()
    for kwargs in ({}, {"attention_mask": mask}):  # without a mask: leading padding tokens are padding
        with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH, **kwargs) as processor:
            torch.testing.assert_close(processor(PADDED, scores), expected, rtol=1e-3, atol=1e-3)
            # the last forward pass was of another text
            with torch.no_grad():
                model(PADDED + 1)
            torch.testing.assert_close(processor(PADDED, scores), expected, rtol=1e-3, atol=1e-3)
    processor.close()
    torch.testing.assert_close(processor(PADDED, scores), expected, rtol=1e-3, atol=1e-3)


def test_padding_that_is_also_the_end_token_needs_a_mask():
    model = build("llama")
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    critic = random_critic(model)
    scores = torch.randn(3, VOCAB)
    padded = torch.where(PADDED == 0, 2, PADDED)
    expected = SlowProcessor(model, [critic], [STRENGTH], TOP_K)(PADDED, scores)
    mask = (PADDED != 0).long()
    with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH, attention_mask=mask) as processor:
        torch.testing.assert_close(processor(padded, scores), expected, rtol=1e-3, atol=1e-3)
        beams = processor(padded.repeat_interleave(2, dim=0), scores.repeat_interleave(2, dim=0))
        torch.testing.assert_close(beams[::2], expected, rtol=1e-3, atol=1e-3)
        with pytest.raises(ValueError, match="attention_mask"):
            processor(padded[:2], scores[:2])


def test_two_processors_at_once():
    model = shared("llama")
    critics = [random_critic(model, seed) for seed in (5, 6)]
    slow = [SlowProcessor(model, [critic], [STRENGTH], TOP_K) for critic in critics]
    expected = generate(model, slow)
    passes = []
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: passes.append(1))
    fast = [CriticLogitsProcessor(model, critic, TOP_K, STRENGTH) for critic in critics]
    output = generate(model, fast)
    handle.remove()
    for processor in fast:
        processor.close()
    assert torch.equal(output.sequences, expected.sequences)
    assert len(passes) == 3 * len(output.scores)


def test_the_model_is_left_as_it_was():
    model, critic = build("llama"), random_critic(shared("llama"))
    hooks = backbone(model)._forward_hooks
    before = generate(model, [])
    processor = CriticLogitsProcessor(model, critic, TOP_K, STRENGTH)
    generate(model, [processor])
    assert len(hooks) == 1
    again = generate(model, [])
    assert torch.equal(before.sequences, again.sequences)
    assert all(torch.equal(one, other) for one, other in zip(before.scores, again.scores))
    processor.close()
    processor.close()
    assert not hooks
    processor = CriticLogitsProcessor(model, critic)
    del processor
    gc.collect()
    assert not hooks


def test_no_cache_is_kept_alive():
    model, critic = shared("llama"), random_critic(shared("llama"))
    with CriticLogitsProcessor(model, critic, TOP_K) as processor:
        cache = transformers.DynamicCache(config=model.config)
        generate(model, [processor], cache=cache)
        with torch.no_grad():
            model(PADDED, cache=cache)  # nobody asks for scores after this one
        gone = weakref.ref(cache)
        del cache
        gc.collect()
        assert gone() is None


def test_threads_do_not_mix():
    model = shared("llama")
    critics = [random_critic(model, seed) for seed in (5, 6)]
    prompts = [PADDED[1:2], PADDED[1:2].flip(1)]
    expected = [
        generate(model, [SlowProcessor(model, [critic], [STRENGTH], TOP_K)], ids)
        for critic, ids in zip(critics, prompts)
    ]
    outputs = [None, None]

    def work(number):
        with CriticLogitsProcessor(model, critics[number], TOP_K, STRENGTH) as processor:
            outputs[number] = [generate(model, [processor], prompts[number]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert all(torch.equal(output.sequences, expected[number].sequences) for output in outputs[number])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": VOCAB + 1}, f"top_k={VOCAB + 1}.*{VOCAB}"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": float("inf")}, "strength=inf"),
        ({"strength": [1.0, 2.0]}, "2 numbers for 1 critics"),
        ({"mode": "guess"}, "mode='guess'.*exact"),
        ({"mode": "action-value"}, "action_values=True"),
    ],
)
def test_refuses_arguments(kwargs, message):
    model = shared("llama")
    with pytest.raises(ValueError, match=message):
        CriticLogitsProcessor(model, Critic.for_model(model), **kwargs)
    assert not backbone(model)._forward_hooks


def test_refuses_critics():
    model = shared("llama")
    with pytest.raises(ValueError, match="fingerprint"):
        CriticLogitsProcessor(model, Critic.for_model(tiny("gpt2")))
    with pytest.raises(ValueError, match="empty"):
        CriticLogitsProcessor(model, [])
    with pytest.raises(TypeError, match="Linear"):
        CriticLogitsProcessor(model, torch.nn.Linear(2, 1))
    with pytest.raises(TypeError, match="str"):
        CriticLogitsProcessor(model, [Critic.for_model(model), "critic"])


def test_an_empty_text():
    model = shared("llama")
    with CriticLogitsProcessor(model, random_critic(model)) as processor:
        with pytest.raises(ValueError, match="no token"):
            processor(torch.zeros(1, 0, dtype=torch.long), torch.randn(1, VOCAB))


def test_an_encoder_decoder_outside_of_generate():
    model = shared("t5")
    with CriticLogitsProcessor(model, random_critic(model)) as processor:
        with pytest.raises(ValueError, match="encoder"):
            processor(torch.zeros(1, 1, dtype=torch.long), torch.randn(1, VOCAB))


def test_half_precision():
    model = build("llama").bfloat16()
    critic = random_critic(model)
    with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH) as processor:
        output = generate(model, [processor])
    slow = SlowProcessor(model, [critic], [STRENGTH], TOP_K)
    first = slow(PADDED, generate(model, [], max_new_tokens=1).scores[0])
    torch.testing.assert_close(output.scores[0], first, rtol=0.05, atol=0.3)
