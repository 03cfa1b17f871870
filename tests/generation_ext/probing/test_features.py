# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Features are those of a naive loop over whole strings, in memory and on disk, also after a kill."""

from __future__ import annotations

import copy
import json
import os

import numpy as np
import pytest
import torch

from generation_ext.probing import features as module
from generation_ext.probing.feature_file import FeatureFile
from generation_ext.probing.features import FeatureExtractor
from generation_ext.shared_prefix.token_tree import TokenTree
from peft_ext import files
from tests.tiny.byte_models import CAUSAL, HIDDEN, LAYERS, LENGTH, adapted, model
from tests.tiny.tokenizers import tokenizer, tokenizer_for


TEXTS = ["Sentence 1: a fine film\nLabel:", "Sentence 1: \nLabel:", "Sentence 1: é 漢字\nLabel:", "", "another text"]
PREFIX = "Sentence 1: what a bore\nLabel: negative\nSentence 1: fun\nLabel: positive\n"


@torch.no_grad()
def naive(name, texts, prefix="", layer=-1, pooling="last", lm=None):
    lm = model(name) if lm is None else lm
    words, rows = tokenizer_for(name), []
    for text in texts:
        ids = words(prefix + text)["input_ids"] or [words.eos_token_id]
        before = words(prefix)["input_ids"] if prefix else []
        if name in ("t5", "bert"):
            before = before[:-1]  # the end token comes after the text
        batch = {"input_ids": torch.tensor([ids]), "output_hidden_states": True}
        output = lm.get_encoder()(**batch) if name == "t5" else lm(**batch)
        states = output.hidden_states[layer][0]
        own = states[min(len(before), len(states) - 1) :]
        rows.append(states[-1] if pooling == "last" else own.mean(0))
    return torch.stack(rows).numpy()


def close(ours, reference):
    assert ours.shape == reference.shape and ours.dtype == np.float32
    assert np.abs(reference).max() > 0.1, "a reference of zeros shows nothing"
    np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*CAUSAL, "t5", "bert"])
@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_equals_the_naive_loop(name, prefix, pooling):
    found = FeatureExtractor(model(name), tokenizer_for(name), pooling=pooling).extract(TEXTS, prefix)
    close(found, naive(name, TEXTS, prefix, pooling=pooling))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neo", "t5", "bert"])
@pytest.mark.parametrize("layer", [0, 1, LAYERS, -2, -1])
def test_layers(name, layer):
    found = FeatureExtractor(model(name), tokenizer_for(name), layer=layer, pooling="mean").extract(TEXTS, PREFIX)
    close(found, naive(name, TEXTS, PREFIX, layer=layer, pooling="mean"))


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "t5", "bert", "opt"])
@pytest.mark.parametrize("layer", ["all", [-1, 0], [1]])
def test_several_layers_and_poolings(name, layer, monkeypatch):
    passes, run = [], FeatureExtractor._run
    monkeypatch.setattr(FeatureExtractor, "_run", lambda *args: passes.append(1) or run(*args))
    both = ("mean", "last")
    extractor = FeatureExtractor(model(name), tokenizer_for(name), layer=layer, pooling=both)
    found, blocks = extractor.extract(TEXTS, PREFIX), extractor.blocks()
    assert len(passes) == 1 and found.shape == (len(TEXTS), max(block.stop for block in blocks.values()))
    layers = range(LAYERS + 1) if layer == "all" else [each % (LAYERS + 1) for each in layer]
    assert list(blocks) == [(each, pooling) for each in layers for pooling in both]
    for (each, pooling), block in blocks.items():
        close(found[:, block], naive(name, TEXTS, PREFIX, layer=each, pooling=pooling))


def test_layers_that_hooks_do_not_see(monkeypatch):
    expected = FeatureExtractor(model("llama"), tokenizer_for("llama"), layer="all").extract(TEXTS, PREFIX)
    monkeypatch.setattr(module, "layers_of", lambda *args: None)
    found = FeatureExtractor(model("llama"), tokenizer_for("llama"), layer="all").extract(TEXTS, PREFIX)
    close(found, expected)


def test_models_without_head_and_with_adapters():
    from peft import get_peft_model

    from peft_ext import PeqaConfig

    close(
        FeatureExtractor(model("gpt2").transformer, tokenizer()).extract(TEXTS, PREFIX), naive("gpt2", TEXTS, PREFIX)
    )
    packed = get_peft_model(copy.deepcopy(model("llama")), PeqaConfig(bits=4, group_size=16)).eval()
    found = FeatureExtractor(packed, tokenizer_for("llama")).extract(TEXTS, PREFIX)
    close(found, naive("llama", TEXTS, PREFIX, lm=packed))
    assert np.abs(found - naive("llama", TEXTS, PREFIX)).max() > 0.01


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("limit", [1, 200_000])
def test_small_batches(name, limit, monkeypatch):
    calls, run = [], FeatureExtractor._run
    monkeypatch.setattr(FeatureExtractor, "_run", lambda *args: calls.append(1) or run(*args))
    found = FeatureExtractor(model(name), tokenizer_for(name), memory_limit=limit).extract(TEXTS * 3, PREFIX)
    assert len(calls) > 1
    close(found, naive(name, TEXTS * 3, PREFIX))


def test_the_prefix_runs_once(monkeypatch):
    lengths, encode = [], module.encode_prefix
    monkeypatch.setattr(module, "encode_prefix", lambda lm, shared: lengths.append(len(shared)) or encode(lm, shared))
    seen, run = [], FeatureExtractor._run
    monkeypatch.setattr(
        FeatureExtractor, "_run", lambda self, trees, *rest: seen.extend(map(len, trees)) or run(self, trees, *rest)
    )
    FeatureExtractor(model("gpt2"), tokenizer(), memory_limit=200_000).extract(TEXTS[:3] * 4, PREFIX)
    shared = len(tokenizer()(PREFIX + "Sentence 1: ")["input_ids"])
    assert lengths == [shared]
    assert sum(seen) == sum(len(tokenizer()(PREFIX + text)["input_ids"]) - shared for text in TEXTS[:3] * 4)


def test_few_texts():
    extractor = FeatureExtractor(model("gpt2"), tokenizer())
    assert extractor.extract([]).shape == (0, HIDDEN)
    close(extractor.extract(TEXTS[:1], PREFIX), naive("gpt2", TEXTS[:1], PREFIX))
    close(extractor.extract([""]), naive("gpt2", [""]))


# files


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_killed_run_goes_on(name, tmp_path, monkeypatch):
    output, run, calls = tmp_path / "features.npy", FeatureExtractor._run, []

    def killed(self, trees, *rest):
        if len(calls) == 3:
            raise Killed
        calls.append(len(trees))
        return run(self, trees, *rest)

    extractor = FeatureExtractor(model(name), tokenizer_for(name), memory_limit=1)
    monkeypatch.setattr(FeatureExtractor, "_run", killed)
    with pytest.raises(Killed):
        extractor.extract(TEXTS, PREFIX, output)
    assert not output.exists() and len(calls) == 3
    calls.clear()
    monkeypatch.setattr(FeatureExtractor, "_run", lambda *args: calls.append(1) or run(*args))
    found = extractor.extract(TEXTS, PREFIX, output)
    assert len(calls) == 2, "what was finished was computed again"
    close(found, naive(name, TEXTS, PREFIX))
    assert isinstance(found, np.memmap) and not found.flags.writeable
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.npy", "features.npy.json"]
    calls.clear()
    np.testing.assert_array_equal(extractor.extract(TEXTS, PREFIX, output), found)
    assert not calls


def test_what_a_kill_at_the_end_leaves_is_swept(tmp_path):
    extractor = FeatureExtractor(model("llama"), tokenizer_for("llama"))
    found = np.array(extractor.extract(TEXTS, output=tmp_path / "f.npy"))
    (tmp_path / "f.npy.done").write_bytes(b"\1")  # the file was in its place, its record not yet gone
    np.testing.assert_array_equal(extractor.extract(TEXTS, output=tmp_path / "f.npy"), found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npy", "f.npy.json"]


def test_a_record_without_its_file_is_no_record(tmp_path):
    file = FeatureFile(tmp_path / "f.npy", (4, 8), {})
    file.features[:] = 1
    file.mark([0, 1, 2, 3])
    file.close()
    (tmp_path / "f.npy.partial").unlink()
    assert not FeatureFile(tmp_path / "f.npy", (4, 8), {}).done.any()


def test_another_process_fills_the_file(tmp_path):
    file = FeatureFile(tmp_path / "f.npy", (4, 8), {})
    process = os.fork()
    if process == 0:
        files._HOLDS.clear()  # as in a process that wasn't forked off
        try:
            FeatureFile(tmp_path / "f.npy", (4, 8), {})
        except BlockingIOError as error:
            os._exit(7 if "another process works in it" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7
    file.close()
    assert not FeatureFile(tmp_path / "f.npy", (4, 8), {}).finished


def test_a_full_disk_is_an_error_before_anything_is_mapped(tmp_path, monkeypatch):
    """The fault: a sparse file was mapped, and the process died of SIGBUS when the disk was full."""

    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device: '.*f.npy.partial' needs 256 bytes"):
        FeatureFile(tmp_path / "f.npy", (4, 8), {})
    monkeypatch.undo()
    file = FeatureFile(tmp_path / "f.npy", (1000, 8), {})
    assert (tmp_path / "f.npy.partial").stat().st_blocks * 512 >= 32_000, "it isn't sparse"
    file.close()


def test_files_that_are_refused(tmp_path):
    output = tmp_path / "features.npy"
    extractor = FeatureExtractor(model("gpt2"), tokenizer())
    extractor.extract(TEXTS, PREFIX, output)
    with pytest.raises(ValueError, match="holds features of other texts"):
        extractor.extract(TEXTS[:2], PREFIX, output)
    with pytest.raises(ValueError, match="of other prefix;"):
        extractor.extract(TEXTS, "", output)
    with pytest.raises(ValueError, match="of other layer, pooling"):
        FeatureExtractor(model("gpt2"), tokenizer(), layer=1, pooling="mean").extract(TEXTS, PREFIX, output)
    with pytest.raises(ValueError, match=r"must end in \.npy"):
        extractor.extract(TEXTS, output=tmp_path / "features")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        extractor.extract(TEXTS, output=tmp_path / "no" / "features.npy")
    np.save(tmp_path / "mine.npy", np.zeros(3))
    with pytest.raises(ValueError, match="was not made by this"):
        extractor.extract(TEXTS, output=tmp_path / "mine.npy")
    (tmp_path / "features.npy.json").write_text("[")
    with pytest.raises(ValueError, match="is damaged"):
        extractor.extract(TEXTS, PREFIX, output)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[:-4],
        lambda content: content[:6] + b"\x09" + content[7:],
        lambda content: content.replace(b"<f4", b"<i4"),
    ],
    ids=["a bit", "cut off", "version", "dtype"],
)
def test_a_finished_file_that_is_damaged(damage, tmp_path):
    extractor = FeatureExtractor(model("llama"), tokenizer_for("llama"))
    path, settings = tmp_path / "f.npy", tmp_path / "f.npy.json"
    whole = extractor.extract(TEXTS, output=path).copy()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with pytest.raises(ValueError, match="f.npy' isn't the file that was written"):
        extractor.extract(TEXTS, output=path)
    stored = json.loads(settings.read_text())
    del stored["sha256"]  # an earlier version's
    settings.write_text(json.dumps(stored))
    if len(damage(content)) == len(content) and damage(content)[6:128] == content[6:128]:
        assert (extractor.extract(TEXTS, output=path) != whole).sum() == 1
    else:
        with pytest.raises(ValueError, match="f.npy' (is no .npy file|holds int32)"):
            extractor.extract(TEXTS, output=path)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_row_that_was_damaged_is_computed_again(earlier, tmp_path, monkeypatch):
    extractor = FeatureExtractor(model("llama"), tokenizer_for("llama"))
    whole = extractor.extract(TEXTS)
    file = FeatureFile(tmp_path / "f.npy", whole.shape, extractor._settings(TEXTS, ""))
    file.features[:2] = whole[:2]
    file.mark([0, 1])
    file._held.close()
    del file
    if earlier:
        done = np.zeros(len(TEXTS), np.uint8)
        done[:2] = 1
        (tmp_path / "f.npy.done").write_bytes(done.tobytes())
    else:
        partial = tmp_path / "f.npy.partial"
        content = bytearray(partial.read_bytes())
        content[128 + 4 * whole.shape[1]] ^= 1  # of the second row
        partial.write_bytes(content)
    ran = []
    run = FeatureExtractor._run
    monkeypatch.setattr(
        FeatureExtractor, "_run", lambda self, trees, *args: ran.extend(trees) or run(self, trees, *args)
    )
    close(extractor.extract(TEXTS, output=tmp_path / "f.npy"), whole)
    assert len(ran) == len(TEXTS) - (2 if earlier else 1)


def test_features_of_another_adapter_are_refused(tmp_path):
    output, one, other = tmp_path / "features.npy", adapted(1), adapted(2)
    first = FeatureExtractor(one, tokenizer_for("llama")).extract(TEXTS, PREFIX, output)
    assert not np.allclose(FeatureExtractor(other, tokenizer_for("llama")).extract(TEXTS, PREFIX), first)
    with pytest.raises(ValueError, match="holds features of other model;"):
        FeatureExtractor(other, tokenizer_for("llama")).extract(TEXTS, PREFIX, output)
    np.testing.assert_array_equal(
        FeatureExtractor(adapted(1), tokenizer_for("llama")).extract(TEXTS, PREFIX, output), first
    )


def test_files_that_name_no_adapter_are_refused(tmp_path):
    output = tmp_path / "features.npy"
    extractor = FeatureExtractor(model("gpt2"), tokenizer())
    extractor.extract(TEXTS, PREFIX, output)
    settings = json.loads((tmp_path / "features.npy.json").read_text())
    earlier = {**settings, "model": "GPT2LMHeadModel", "parameters": 5}
    (tmp_path / "features.npy.json").write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match="other model, parameters; .* earlier versions don't tell adapters apart"):
        extractor.extract(TEXTS, PREFIX, output)


def test_no_texts_on_disk(tmp_path):
    extractor = FeatureExtractor(model("gpt2"), tokenizer())
    for _ in range(2):
        assert extractor.extract([], output=tmp_path / "none.npy").shape == (0, HIDDEN)
    assert json.loads((tmp_path / "none.npy.json").read_text())["pooling"] == "last"


# texts that don't fit


LONG = "abcdefghij" * 10_000


@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_long_texts(name, prefix):
    lm, words = model(name), tokenizer_for(name)
    with pytest.raises(ValueError, match="text 1 takes 100.* but the model takes 512; .*overflow='truncate_start'"):
        FeatureExtractor(lm, words).extract(["a", LONG], prefix)
    room = LENGTH - len(words(prefix)["input_ids"])
    for overflow, kept in (("truncate_start", LONG[-room:]), ("truncate_end", LONG[:room])):
        extractor = FeatureExtractor(lm, words, overflow=overflow)
        with pytest.warns(UserWarning, match="1 of 2 texts are cut to 512 tokens"):
            found = extractor.extract(["a", LONG], prefix)
        close(found, naive(name, ["a", kept], prefix))


def test_a_prefix_that_leaves_no_room():
    extractor = FeatureExtractor(model("gpt2"), tokenizer(), max_length=20, overflow="truncate_start")
    with pytest.raises(ValueError, match="text 0 takes .* of them the prefix.* takes 20; shorten it or the prefix"):
        extractor.extract(["abc"], PREFIX)


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling='max' is unknown"),
        ({"pooling": ["mean", "mean"]}, "is unknown"),
        ({"pooling": []}, "is unknown"),
        ({"layer": []}, "must be an integer"),
        ({"layer": [0, -3]}, "names a layer twice"),
        ({"layer": "some"}, "layer='some' must be an integer"),
        ({"overflow": "cut"}, "overflow='cut' is unknown"),
        ({"layer": 3}, "layer=3 must be an integer from -3 to 2"),
        ({"layer": -4}, "layer=-4"),
        ({"layer": None}, "layer=None"),
        ({"max_length": 0}, "max_length=0"),
        ({"memory_limit": -1}, "memory_limit=-1"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(model("gpt2"), tokenizer(), **options)


def test_texts_that_are_none():
    extractor = FeatureExtractor(model("gpt2"), tokenizer())
    with pytest.raises(TypeError, match="got a single one"):
        extractor.extract("text")
    with pytest.raises(TypeError, match="text 1 must be a string, got NoneType"):
        extractor.extract(["a", None])
    with pytest.raises(TypeError, match="prefix must be a string"):
        extractor.extract(["a"], prefix=["b"])


def test_damaged_model():
    damaged = copy.deepcopy(model("gpt2"))
    damaged.transformer.ln_f.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite hidden states"):
        FeatureExtractor(damaged, tokenizer()).extract(TEXTS)


def test_chains_read_what_is_pooled():
    tree = TokenTree.chain([4, 5, 6])
    assert tree.paths() == [[0, 1, 2]] and tree.reads == [0, 1, 2]
