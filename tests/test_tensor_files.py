# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""safetensors files with a digest: whatever is changed in one is noticed, and errors name the file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peft_ext import tensor_files
from peft_ext.tensor_files import (
    PLACEHOLDER,
    carries_digest,
    check_digest,
    read_arrays,
    read_header,
    read_tensors,
    seal,
    write_tensors,
)


TENSORS = {
    "a": torch.arange(24.0).view(4, 6),
    "b": torch.arange(24.0).view(4, 6) + 1,
    "c": torch.tensor([1, 2], dtype=torch.int64),
    "d": torch.tensor(3.0),
    "e": torch.zeros(0, 3),
    "f": torch.ones(5, dtype=torch.bfloat16),
}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    return tmp_path / "x.safetensors"


def test_round_trip(path):
    assert carries_digest(path) and load_file(path).keys() == TENSORS.keys()
    for name, tensor in read_tensors(path).items():
        assert torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype


def test_arrays(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array(2.0), "c": np.array([1], np.int64)}
    write_tensors(tmp_path / "x.safetensors", arrays)
    for name, array in read_arrays(tmp_path / "x.safetensors").items():
        assert (
            np.array_equal(array, arrays[name])
            and array.shape == arrays[name].shape
            and array.dtype == arrays[name].dtype
        )


def test_several_threads_and_pieces_of_tensors_give_one_digest(path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_CHUNK", 32)
    seal_of_pieces = tensor_files._digest(path, read_header(path))
    monkeypatch.setattr(tensor_files, "ThreadPoolExecutor", lambda threads: _OneAfterTheOther())
    assert tensor_files._digest(path, read_header(path)) == seal_of_pieces


class _OneAfterTheOther:
    map = staticmethod(map)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_the_order_of_tensors_in_the_file_does_not_matter(path):
    digest = read_header(path).metadata
    save_file(dict(reversed(TENSORS.items())), path, metadata=digest)
    check_digest(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pt", **PLACEHOLDER}])
def test_sealed_after_others_have_written_it(tmp_path, metadata):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata=metadata)
    assert not carries_digest(path)
    check_digest(path)
    seal(path)
    assert carries_digest(path)
    check_digest(path)
    kept = {key: value for key, value in (metadata or {}).items() if key == "format"}
    assert kept.items() <= read_header(path).metadata.items()
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, TENSORS[name])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_of_the_data_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "x.safetensors"
    write_tensors(path, TENSORS)
    content, start = bytearray(path.read_bytes()), read_header(path).start
    content[data.draw(st.integers(start, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.safetensors': the tensors aren't those that were written"):
        read_tensors(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_header_is_an_error_that_names_the_file_or_the_same_tensors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    write_tensors(path, TENSORS)
    content, start = bytearray(path.read_bytes()), read_header(path).start
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, start - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), start, start // 2, 7]))])
    try:
        found = read_tensors(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    # a byte of the digest's name or of a blank
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in found)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"[" * 90_000,
        b"{",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b"\xff",
    ],
)
def test_headers_that_are_none(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    for read in (read_tensors, check_digest, read_header):
        with pytest.raises(ValueError, match="x.safetensors' is truncated, damaged or no safetensors file"):
            read(path)


def test_turned_off(path, monkeypatch):
    tensors = {**load_file(path), "c": torch.tensor([2, 1])}
    save_file(tensors, path, metadata=read_header(path).metadata)
    with pytest.raises(ValueError, match="PEFT_EXT_VERIFY_DIGESTS=0"):
        read_tensors(path)
    monkeypatch.setenv("PEFT_EXT_VERIFY_DIGESTS", "0")
    assert read_tensors(path)["c"].tolist() == [2, 1]
    monkeypatch.setenv("PEFT_EXT_VERIFY_DIGESTS", "no")
    with pytest.raises(ValueError, match="PEFT_EXT_VERIFY_DIGESTS='no' is unknown"):
        read_tensors(path)


def test_a_digest_of_a_later_kind(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"sha256-8m:", b"sha512-8m:"))
    with pytest.raises(ValueError, match="doesn't know; pip install -U peft-ext"):
        read_tensors(path)
    assert json.loads(content[8 : read_header(path).start])["__metadata__"]["format"] == "pt"
