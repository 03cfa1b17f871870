# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A teacher's distributions on disk: found again, made once, gone on with, and refused when they belong to something else."""

from __future__ import annotations

import json

import pytest
import torch

from peft_ext.distillation import CachedLogits, LiveTeacher, cached_logits
from peft_ext.distillation.cached_logits import data_digest, key_of, texts_of, tokenizer_digest
from peft_ext.distillation.teacher import teacher_digest
from peft_ext.examples import Example
from peft_ext.perplexity import padded
from tests.distillation.test_trainer import sft
from tests.tiny.folders import save_tiny
from tests.tiny.models import tiny
from tests.tiny.tokenizers import VOCAB, byte_tokenizer, tiny_tokenizer


TEXTS = [
    Example(list(range(3 + n, 9 + 2 * n)), [-100] * (n % 3) + list(range(3 + n + n % 3, 9 + 2 * n))) for n in range(6)
]


def cache(folder, **more):
    settings = {
        "teacher": "a",
        "tokenizer": tokenizer_digest(tiny_tokenizer()),
        "data": data_digest(TEXTS),
        "vocabulary": VOCAB,
        "top_k": 8,
    }
    return CachedLogits(folder, **{**settings, **more})


def test_what_is_read_is_what_the_teacher_says(tmp_path):
    teacher = LiveTeacher(tiny("llama"), temperature=2.0)
    kept = cache(tmp_path, temperature=2.0)
    kept.fill(teacher, TEXTS, progressbar=False)
    batch = padded([TEXTS[4], TEXTS[1]])
    found, expected = kept.of(batch), teacher.of(batch)
    assert len(found) == len(expected) == sum(TEXTS[n].trained for n in (4, 1))
    log_probs, indices = found[slice(2, 5)]
    whole = expected[slice(2, 5)].log_probs
    assert indices.shape == (3, 8) and log_probs.shape == (3, 9)
    torch.testing.assert_close(log_probs[:, :8], whole.gather(1, indices), rtol=0, atol=5e-3)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3))
    assert (indices == whole.topk(8).indices).float().mean() > 0.9
    assert cache(tmp_path, temperature=2.0).complete


def test_texts_are_found_however_they_are_packed():
    first, second = Example([5, 6, 7], [-100, 6, 7]), Example([8, 9, 3], [-100, -100, 3])
    row = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 3, 0]]),
        "labels": torch.tensor([[-100, 6, 7, -100, -100, 3, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 0]]),
    }
    left = {
        "input_ids": torch.tensor([[5, 6, 7, 4], [0, 8, 9, 3]]),
        "labels": torch.tensor([[5, 6, 7, -100], [-100, 8, -100, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]),
    }
    keys = [key_of(first), key_of(second)]
    assert keys[0] != keys[1]
    assert [key_of(each) for each in texts_of(row)] == keys == [key_of(each) for each in texts_of(left)]
    # another mask is another text, whose rows are others
    assert key_of(Example([5, 6, 7], [-100, -100, 7])) != keys[0]
    row["labels"][0, 3] = 8
    with pytest.raises(ValueError, match="a packed text's first token is supervised"):
        texts_of(row)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"teacher": "b"}, "teacher"),
        ({"tokenizer": tokenizer_digest(byte_tokenizer())}, "tokenizer"),
        ({"data": data_digest(TEXTS[1:])}, "data"),
        ({"temperature": 2.0}, "temperature"),
        ({"top_k": 4}, "top_k"),
    ],
)
def test_a_stale_cache_is_refused_by_name(tmp_path, changed, named):
    cache(tmp_path).fill(LiveTeacher(tiny("llama")), TEXTS, progressbar=False)
    with pytest.raises(FileExistsError, match=rf"teacher_logits=.* holds a run with other settings \({named}"):
        cache(tmp_path, **changed)
    # without a teacher, the folder's own counts
    assert cache(tmp_path, teacher=None).complete
    with pytest.raises(ValueError, match=r"lacks a text of the batch \(it begins with the tokens \[50, 51\]"):
        cache(tmp_path).of(padded([Example([50, 51], [50, 51])]))


class Killed(Exception):
    pass


def test_a_killed_teacher_goes_on_behind_its_last_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(cached_logits, "_SHARD_NUMBERS", 1)
    monkeypatch.setattr(cached_logits, "_BATCH_TOKENS", 1)
    teacher, asked = LiveTeacher(tiny("llama")), []
    own = LiveTeacher.of

    def of(self, inputs):
        if len(asked) == 3:
            raise Killed
        asked.append(inputs["input_ids"])
        return own(self, inputs)

    monkeypatch.setattr(LiveTeacher, "of", of)
    kept = cache(tmp_path)
    with pytest.raises(Killed):
        kept.fill(teacher, TEXTS, progressbar=False)
    del kept
    with pytest.raises(ValueError, match="is not complete, so a teacher is needed"):
        cache(tmp_path, teacher=None)
    asked.clear()
    monkeypatch.setattr(LiveTeacher, "of", lambda self, inputs: asked.append(1) or own(self, inputs))
    kept = cache(tmp_path)
    assert not kept.complete
    kept._run._held.close()
    kept.fill(teacher, TEXTS, progressbar=False)
    assert len(asked) == 3 and kept.complete
    assert len(kept.of(padded(TEXTS))) == sum(text.trained for text in TEXTS)


def test_a_damaged_shard_is_refused(tmp_path):
    cache(tmp_path).fill(LiveTeacher(tiny("llama")), TEXTS, progressbar=False)
    (shard,) = tmp_path.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="logits-00000.safetensors"):
        cache(tmp_path).of(padded(TEXTS))


def test_named_teachers_are_told_apart_by_their_files(tmp_path):
    one, other = save_tiny("llama", tmp_path / "one"), save_tiny("llama", tmp_path / "other")
    assert teacher_digest(one) == teacher_digest(other)
    changed = tiny("llama")
    changed.lm_head.weight.data[0, 0] += 1
    changed.save_pretrained(other)
    assert teacher_digest(one) != teacher_digest(other)


def test_a_finished_cache_needs_no_teacher(tmp_path):
    """The same losses from the disk alone, and a named teacher isn't loaded again."""
    name = save_tiny("llama", tmp_path / "teacher")
    kept = {"teacher_logits": tmp_path / "kept", "top_k": 8}
    losses = []
    for named in ({"teacher_model": name}, {"teacher_model": None, "alone": True}):
        trainer = sft(tmp_path / "run", **named, **kept)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]
    assert json.loads((tmp_path / "kept" / "complete.json").read_text()) == {"texts": 8}


def test_two_processes_share_a_cache(tmp_path, run_module):
    """Each trains on its half of a batch: together they end where one process does."""
    run_module("tests.distillation.two_processes", tmp_path, processes=2, ranks=True)
    ends = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ends[0]["processes"] == 2 and ends[0]["weights"] == ends[1]["weights"]
    from tests.distillation.two_processes import trained

    alone = trained(tmp_path / "alone", per_device_train_batch_size=4)
    one, other = torch.tensor(alone), torch.tensor(ends[0]["weights"])
    assert 0 < (one - other).norm() < 0.02 * one.norm()
