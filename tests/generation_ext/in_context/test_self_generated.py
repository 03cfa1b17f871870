# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""SG-ICL on tiny models: what is sampled, kept, drawn and scored, and that a run goes on where it was killed."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from generation_ext.in_context.pools import Pool, PoolFile, draw
from generation_ext.in_context.sampler import Decoding
from generation_ext.in_context.scoring import LabelScorer
from generation_ext.in_context.self_generated import SelfGeneratedICL
from generation_ext.prompts import CB, SST2, Task
from generation_ext.shared_prefix.sampling import SeededSampling
from tests.tiny.byte_models import adapted, model
from tests.tiny.tokenizers import tokenizer, tokenizer_for


TASK = replace(SST2, max_new_tokens=8, min_new_tokens=3)
TEXTS = ["a fine film", "two hours that are gone for good", "so so", "", "dull " * 12]
FAST = {"samples": 3, "shots": 4}


def sg_icl(name="llama", task=TASK, **options):
    return SelfGeneratedICL(model(name), tokenizer_for(name), task, **{**FAST, **options})


@pytest.fixture(scope="module")
def pools():
    return sg_icl().generate(TEXTS)


@pytest.mark.parametrize("name", ["llama", "mistral", "opt", "bloom", "t5"])
def test_pools(name):
    pools = sg_icl(name).generate(TEXTS[:2])
    assert [pool.example for pool in pools] == [{"text": text} for text in TEXTS[:2]]
    for pool in pools:
        assert list(pool.samples) == ["negative", "positive"]
        assert all(len(texts) == 3 for texts in pool.samples.values())
        for text in sum(pool.samples.values(), []):
            assert len(text) <= 8 and not set(text) & set(",\n\t\r")
    texts = [text for pool in pools for texts in pool.samples.values() for text in texts]
    assert len(set(texts)) > len(texts) / 2, "all samples are the same"


def test_the_checkpoint_has_no_say_in_what_is_sampled(pools):
    opinionated = copy.deepcopy(model("llama"))
    opinionated.generation_config.update(repetition_penalty=1.5, min_p=0.3, suppress_tokens=list(range(90)))
    assert SelfGeneratedICL(opinionated, tokenizer_for("llama"), TASK, **FAST).generate(TEXTS) == pools


def test_pairs_keep_the_premise():
    task = replace(CB, max_new_tokens=6, min_new_tokens=3)
    (pool,) = sg_icl(task=task).generate([{"premise": "It rains.", "hypothesis": "It is wet."}])
    assert list(pool.samples) == ["entailment", "contradiction", "neutral"]
    shown = pool.demonstrations(task)
    assert {example["premise"] for example, _ in shown} == {"It rains."}
    assert {example["hypothesis"] for example, _ in shown} == {
        t for texts in pool.samples.values() for t in texts if t
    }


@pytest.mark.parametrize("options", [{"memory_limit": 1}, {"memory_limit": 2_000_000}])
def test_texts_do_not_depend_on_the_batch(pools, options):
    sizes = []
    ours = sg_icl(**options)
    original = ours.sampler.sample
    ours.sampler.sample = lambda prompts, *args: sizes.append(len(prompts)) or original(prompts, *args)
    assert ours.generate(TEXTS) == pools
    assert len(sizes) > 1 and max(sizes) < 2 * len(TEXTS)


def test_goes_on_after_the_device_ran_out_of_memory(pools):
    ours = sg_icl()
    original, sizes = ours.sampler._sample, []

    def scarce(prompts, *args):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return original(prompts, *args)

    ours.sampler._sample = scarce
    assert ours.generate(TEXTS) == pools
    assert max(sizes) > 3 >= sizes[-1]


def test_a_decoder_begins_as_in_generate():
    lm = copy.deepcopy(model("t5"))
    lm.config.decoder_start_token_id, lm.generation_config.decoder_start_token_id = 3, 5
    assert SelfGeneratedICL(lm, tokenizer_for("t5"), TASK, **FAST).sampler.config.decoder_start_token_id == 5


def test_seeds(pools):
    assert sg_icl(seed=21).generate(TEXTS) != pools
    twice = sg_icl().generate(["a fine film", "a fine film"])
    assert twice[0] == pools[0]
    assert twice[1].samples != twice[0].samples, "equal inputs have pools of their own"


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neo"])
def test_shared_prompts_are_those_of_generate_alone(name):
    """`generate` from the start, with the same random numbers, for one row without padding."""
    ours = sg_icl(name)
    prompts = ours.scorer.encoder(["Generate a film:", "Generate a much longer film than that one was:"])
    found = ours.sampler.sample(prompts, ["one", "two"], 3)
    for prompt, key, texts in zip(prompts, ["one", "two"], found):
        for number in range(3):
            output = model(name).generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                generation_config=ours.sampler.config,
                logits_processor=LogitsProcessorList([SeededSampling(ours.decoding, [f"{key}/{number}"])]),
            )
            alone = tokenizer().decode(output[0, len(prompt) :], skip_special_tokens=True)
            assert " ".join(alone.split()) == texts[number]


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        (Decoding(temperature=1.0, top_k=0), [0.4, 0.3, 0.2, 0.1]),
        (Decoding(temperature=0.5, top_k=0), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (Decoding(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Decoding(temperature=1.0, top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
        (Decoding(temperature=1.0, top_p=0.8), [4 / 9, 3 / 9, 2 / 9, 0]),
    ],
)
def test_tokens_are_drawn_by_their_probability(decoding, expected):
    rows = 20_000
    scores = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]])).repeat(rows, 1)
    drawn = SeededSampling(decoding, [str(i) for i in range(rows)])(torch.zeros(rows, 1), scores)
    assert ((drawn == 0).sum(1) == 1).all()
    np.testing.assert_allclose((drawn == 0).float().mean(0), expected, atol=0.015)


class Recorder:
    """A tokenizer that remembers what it turned into text."""

    def batch_decode(self, tokens, **kwargs):
        self.tokens = tokens.tolist()
        return [""] * len(tokens)


@pytest.mark.parametrize("size", [0, 2])
def test_lengths_and_repetition(size):
    task = replace(TASK, max_new_tokens=25, min_new_tokens=10)
    ours = sg_icl(task=task, decoding=Decoding(temperature=0.01, no_repeat_ngram_size=size))
    end = ours.sampler.config.eos_token_id
    recorder = ours.sampler.tokenizer = Recorder()
    ours.sampler.sample(ours.scorer.encoder(["ab", "a bc"]), ["one", "two"], 4)
    repeated = 0
    for row in recorder.tokens:
        row = row[: row.index(end)] if end in row else row
        assert 10 <= len(row) <= 25
        pairs = list(zip(row, row[1:]))
        repeated += len(pairs) - len(set(pairs))
    assert (repeated == 0) == (size == 2)


# files


def test_a_killed_run_goes_on(pools, tmp_path):
    path = tmp_path / "pools.jsonl"
    assert sg_icl().generate(TEXTS, path) == pools
    whole = path.read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + len(TEXTS)
    path.write_text("".join(lines[:3]) + lines[3][:30], encoding="utf-8")
    ours = sg_icl()
    sampled, original = [], ours.sampler.sample
    ours.sampler.sample = lambda prompts, *args: sampled.extend(prompts) or original(prompts, *args)
    assert ours.generate(TEXTS, path) == pools
    assert len(sampled) == 2 * 3
    assert sorted(path.read_text(encoding="utf-8").splitlines()) == sorted(whole.splitlines())
    sampled.clear()
    assert ours.generate(TEXTS, path) == pools and not sampled


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "pools.jsonl"
    sg_icl().generate(TEXTS[:1], path)
    with pytest.raises(ValueError, match=r"was made with other settings \(seed\)"):
        sg_icl(seed=21).generate(TEXTS[:1], path)
    with pytest.raises(ValueError, match=r"other settings \(prompt, conditioned\)"):
        sg_icl(conditioned=False).generate(TEXTS[:1], path)
    with pytest.raises(ValueError, match="input 0 was {'text': 'a fine film'}, and is {'text': 'other'} now"):
        sg_icl().generate(["other"], path)
    (tmp_path / "notes.txt").write_text("something\nelse\n")
    with pytest.raises(ValueError, match="is no file of pools"):
        PoolFile(tmp_path / "notes.txt", {})
    assert (tmp_path / "notes.txt").read_text() == "something\nelse\n"
    with pytest.raises(FileNotFoundError, match="folder"):
        PoolFile(tmp_path / "missing" / "pools.jsonl", {})


def test_pools_of_another_adapter_are_refused(tmp_path):
    """Of the same name, on the same base, with as many parameters."""

    def ours(seed):
        return SelfGeneratedICL(adapted(seed), tokenizer_for("llama"), TASK, **FAST)

    path = tmp_path / "pools.jsonl"
    first = ours(1).generate(TEXTS[:1], path)
    assert ours(2).generate(TEXTS[:1]) != first
    with pytest.raises(ValueError, match=r"other settings \(model\)"):
        ours(2).generate(TEXTS[:1], path)
    assert ours(1).generate(TEXTS[:1], path) == first


def test_pools_hold_any_character(tmp_path):
    path = tmp_path / "pools.jsonl"
    pools = [Pool({"text": f"a{mark}b"}, {"negative": [f"{mark}c", "d"]}) for mark in ("\u2028", "\u2029", "\x85")]
    file = PoolFile(path, {"seed": 1})
    for index, pool in enumerate(pools):
        file.add(index, pool)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"index": 3, "exam')
    again = PoolFile(path, {"seed": 1})
    assert list(again.pools.values()) == pools and path.read_bytes() == whole
    assert [again.get(index, pool.example) for index, pool in enumerate(pools)] == pools


def test_pools_of_an_earlier_version_are_refused(tmp_path):
    path = tmp_path / "pools.jsonl"
    path.write_text('{"format": 1, "settings": {"model": "gpt2", "parameters": 5, "adapters": ["default"]}}\n')
    with pytest.raises(ValueError, match="has format 1, .* doesn't say which adapter's texts it holds"):
        PoolFile(path, {})
    one_line = tmp_path / "note.jsonl"
    one_line.write_text("something")
    with pytest.raises(ValueError, match="is no file of pools"):
        PoolFile(one_line, {})
    assert one_line.read_text() == "something"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": "0"}, "row 3: index is '0'"),
        ({"index": 0}, "row 3: index 0 occurs twice"),
        ({"example": "text"}, "row 3: example is 'text'"),
        ({"samples": {"a": ["x", 3], "b": ["y", "z"]}}, r"row 3: samples\['a'\]\[1\] is 3"),
        ({"samples": {"a": ["x"], "b": ["y", "z"]}}, "row 3: samples must have 2 texts of each label"),
        ({"samples": {"a": ["x", "z"]}}, r"row 3: samples has the labels \['a'\], not \['a', 'b'\]"),
    ],
)
def test_rows_that_are_no_pools(change, message, tmp_path):
    settings = {"task": {"labels": {"a": "A", "b": "B"}}, "samples": 2}
    row = {"index": 0, "example": {"text": "t"}, "samples": {"a": ["x", "z"], "b": ["y", "z"]}}
    path = tmp_path / "pools.jsonl"
    lines = [{"format": 2, "settings": settings}, row, {**row, "index": 1, **change}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=rf"pools.jsonl.*{message}"):
        PoolFile(path, settings)


def test_a_text_that_was_changed_is_found(tmp_path):
    path = tmp_path / "pools.jsonl"
    file = PoolFile(path, {})
    for index in (0, 1):
        file.add(index, Pool({"text": "t"}, {"a": ["good"]}))
    path.write_text(path.read_text().replace("good", "bad", 1))
    with pytest.raises(ValueError, match="pools.jsonl, line 2 isn't what was written there"):
        PoolFile(path, {})


def test_a_stop_belongs_to_chats():
    with pytest.raises(ValueError, match="decoding.stop"):
        sg_icl(decoding=Decoding(stop=("x",)))


# drawing and scoring


CANDIDATES = [(str(i), "ab"[i % 2]) for i in range(12)] + [("12", "c")]


def test_draws_are_uniform_and_without_replacement():
    counts, firsts = Counter(), Counter()
    for seed in range(3000):
        drawn = draw(CANDIDATES, 8, np.random.default_rng(seed))
        assert len(set(drawn)) == 8
        counts.update(drawn)
        firsts[drawn[0]] += 1
    assert all(abs(count / 3000 - 8 / 13) < 0.04 for count in counts.values()) and len(counts) == 13
    assert all(abs(count / 3000 - 1 / 13) < 0.02 for count in firsts.values()) and len(firsts) == 13


def test_balanced_draws():
    extra, firsts = Counter(), Counter()
    for seed in range(600):
        drawn = draw(CANDIDATES, 8, np.random.default_rng(seed), balanced=True)
        counts = Counter(label for _, label in drawn)
        assert len(set(drawn)) == 8 and counts["c"] == 1 and sorted(counts.values()) == [1, 3, 4]
        extra[max(counts, key=counts.get)] += 1
        firsts[drawn[0][1]] += 1
    assert min(extra.values()) > 200 and min(firsts.values()) > 30
    assert len(draw(CANDIDATES[:3], 8, np.random.default_rng(0), balanced=True)) == 3


def test_scores_are_those_of_the_drawn_demonstrations(pools):
    ours = sg_icl(calibrate=True)
    scores = ours.score(TEXTS)
    scorer = LabelScorer(model("llama"), tokenizer_for("llama"), TASK, normalization="mean")
    for index, (pool, shown) in enumerate(zip(pools, ours.draw(pools))):
        assert len(shown) == 4 and all(pair in pool.demonstrations(TASK) for pair in shown)
        alone = scorer.score([TEXTS[index]], shown, calibrate=True)
        np.testing.assert_allclose(scores.log_probs[index], alone.log_probs[0], atol=1e-4)
        np.testing.assert_allclose(scores.prior[index], alone.prior[0], atol=1e-4)
    assert ours.draw(pools, seed=1) != ours.draw(pools, seed=2)


def test_a_class_without_samples():
    """Empty texts are no demonstrations; without any, the input is scored zero-shot, and that is said."""
    pools = [Pool({"text": "a"}, {"negative": ["", ""], "positive": ["b"]}), Pool({"text": "c"}, {"negative": [""]})]
    ours = sg_icl()
    with pytest.warns(UserWarning, match=r"2 of 2 inputs have fewer than 4 .*, 1 of them none \(zero-shot\)"):
        scores = ours.score_pools(pools)
    scorer = LabelScorer(model("llama"), tokenizer_for("llama"), TASK, normalization="mean")
    np.testing.assert_allclose(
        scores.log_probs[0], scorer.score(["a"], [({"text": "b"}, "positive")]).log_probs[0], atol=1e-4
    )
    np.testing.assert_allclose(scores.log_probs[1], scorer.score(["c"]).log_probs[0], atol=1e-4)


def test_class_only_prompts_do_not_see_the_input():
    ours = sg_icl(conditioned=False)
    first, second = ours.generate(["a fine film", "a very different film"])
    other, _ = ours.generate(["another", "a very different film"])
    assert first.samples == other.samples != second.samples


def test_packed_model():
    from peft import get_peft_model

    from peft_ext import PeqaConfig

    packed = get_peft_model(copy.deepcopy(model("llama")), PeqaConfig(bits=4, group_size=16)).eval()
    scores = SelfGeneratedICL(packed, tokenizer_for("llama"), TASK, **FAST).score(TEXTS[:2])
    assert np.isfinite(scores.log_probs).all()


# what is refused


def test_prompts_that_are_too_long():
    with pytest.raises(ValueError, match="input 1: the prompt that asks for a 'negative' one takes .* but 504 fit"):
        sg_icl().generate(["short", "x" * 100_000])
    with pytest.warns(UserWarning, match="input 0 is cut to"):
        (pool,) = sg_icl(overflow="drop_then_truncate").generate(["x" * 100_000])
    assert len(pool.example["text"]) == 100_000 and any(pool.samples["negative"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 0}, "shots=0 must be a positive"),
        ({"samples": 1.5}, "samples=1.5 must be a positive"),
        ({"task": Task("{text} :", {"a": " a", "b": " b"})}, "has no generation_template"),
        ({"overflow": "cut"}, "overflow='cut' is unknown"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        sg_icl(**options)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0}, {"top_k": -1}, {"no_repeat_ngram_size": -1}])
def test_decoding(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Decoding(**options)


def test_file_is_json_lines(tmp_path):
    path = tmp_path / "pools.jsonl"
    sg_icl().generate(TEXTS[:1], path)
    header, row = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert header["settings"]["temperature"] == 0.5 and header["settings"]["seed"] == 13
    assert row["index"] == 0 and set(row["samples"]) == {"negative", "positive"}


# presets, and what goes beyond the paper


def test_shared_demonstrations_are_one_draw_from_all_pools(pools):
    ours = sg_icl(shared=True, shots=12)
    drawn = ours.draw(pools)
    assert len(drawn) == len(TEXTS) and all(each is drawn[0] for each in drawn)
    every = [pair for pool in pools for pair in pool.demonstrations(TASK)]
    assert len(drawn[0]) == 12 and all(pair in every for pair in drawn[0])
    assert sum(any(pair in pool.demonstrations(TASK) for pair in drawn[0]) for pool in pools) > 1
    assert ours.draw(pools, number=1)[0] != drawn[0]


def test_scores_are_the_mean_over_draws(pools):
    ours = sg_icl(shared=True, balanced=True, draws=3, calibrate=True, strength=0.5)
    scores = ours.score_pools(pools, seed=7, examples=["x", "yy"])
    scorer = LabelScorer(model("llama"), tokenizer_for("llama"), TASK, normalization="mean")
    single = [scorer.score(["x", "yy"], ours.draw(pools, 7, number)[0], True, strength=0.5) for number in range(3)]
    np.testing.assert_allclose(scores.log_probs, np.mean([each.log_probs for each in single], axis=0), atol=1e-5)
    np.testing.assert_allclose(scores.prior, np.mean([each.prior for each in single], axis=0), atol=1e-5)
    assert np.abs(single[0].log_probs - single[1].log_probs).max() > 1e-3


def test_texts_are_written_for_some_inputs(tmp_path):
    path = tmp_path / "pools.jsonl"
    ours = sg_icl(shared=True, pool_inputs=2)
    scores = ours.score(TEXTS, path)
    assert len(scores.log_probs) == len(TEXTS)
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert len(rows) == 2 and all(row["example"]["text"] in map(str.strip, TEXTS) for row in rows)
    np.testing.assert_array_equal(ours.score(TEXTS, path).log_probs, scores.log_probs)


def test_with_unlabelled_texts_no_input_has_a_say_in_anothers_score():
    ours = sg_icl(preset="recommended", pool_inputs=2, draws=2)
    unlabelled = [f"text {number}" for number in range(16)]
    together = ours.score(["a fine film", "so so"], unlabelled=unlabelled)
    alone = ours.score(["a fine film"], unlabelled=unlabelled)
    np.testing.assert_allclose(together.scores[:1], alone.scores, atol=1e-4)


@pytest.mark.filterwarnings("error")
def test_one_input_is_calibrated_beside_generated_texts():
    ours = sg_icl(preset="recommended", samples=16, draws=1)
    scores = ours.score(["a fine film"])
    assert scores.prior.shape == (1, 2) and np.abs(scores.scores[0, 0] - scores.scores[0, 1]) > 1e-3
    assert len(ours.score([]).log_probs) == 0


def test_shared_texts_are_for_shared_demonstrations(pools):
    with pytest.raises(ValueError, match="unlabelled texts are for shared=True"):
        sg_icl().score(["a"], unlabelled=["b"])
    with pytest.raises(ValueError, match="examples and unlabelled texts beside pools are for shared=True"):
        sg_icl().score_pools(pools, examples=["a"])
    with pytest.raises(ValueError, match="pools is empty"):
        sg_icl(shared=True).score_pools([])
