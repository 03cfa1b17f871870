# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Descriptions of file formats: what they take and refuse, and that the documentation is made from them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ext.file_formats import (
    FLOATS,
    JsonFormat,
    Tensor,
    check_tensors,
    list_of,
    mapping_of,
    number,
    one_of,
    record,
    text,
    truth,
    whole,
)


FORMAT = JsonFormat(
    "thing.json",
    {
        "count": whole(1, 9),
        "share": number(0, 1),
        "name": text("a", "b"),
        "words": list_of(text(), least=1),
        "flag": truth(),
        "by_name": mapping_of(one_of(whole(), text())).or_missing(),
        "inner": record({"deep": number(above=0)}).or_null(),
    },
    format=1,
)
GOOD = {"count": 3, "share": 0.5, "name": "a", "words": ["x"], "flag": True, "inner": {"deep": 1}}


def test_what_is_written_is_read(tmp_path):
    FORMAT.write(tmp_path / "thing.json", GOOD)
    assert FORMAT.read(tmp_path / "thing.json") == {"format": 1, **GOOD}


@pytest.mark.parametrize(
    "field, value",
    [
        ("count", 0),
        ("count", 10),
        ("count", 3.0),
        ("count", True),
        ("count", "3"),
        ("count", None),
        ("share", float("nan")),
        ("share", float("inf")),
        ("share", "0.5"),
        ("share", False),
        ("share", 10**400),
        ("name", "c"),
        ("name", ["a"]),
        ("words", "xy"),
        ("words", []),
        ("words", ["x", 1]),
        ("flag", 1),
        ("by_name", {"k": None}),
        ("by_name", [1]),
        ("inner", {}),
        ("inner", {"deep": 0}),
        ("inner", {"deep": float("nan")}),
    ],
)
def test_a_value_out_of_its_range_names_file_field_and_value(tmp_path, field, value):
    path = tmp_path / "thing.json"
    with pytest.raises(ValueError, match=rf"thing\.json can't be written: {field}"):
        FORMAT.write(path, {**GOOD, field: value})
    assert not path.exists()
    path.write_text(json.dumps({"format": 1, **GOOD, field: value}))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}': {field}.* it must be ") as error:
        FORMAT.read(path)
    assert "\n" not in str(error.value)


def test_missing_fields_and_other_versions(tmp_path):
    path = tmp_path / "thing.json"
    for name in GOOD:
        path.write_text(json.dumps({"format": 1, **{key: value for key, value in GOOD.items() if key != name}}))
        with pytest.raises(ValueError, match=f"{name} is missing; it must be"):
            FORMAT.read(path)
    for version, way_out in (
        (2, "later version"),
        (0, "save it again"),
        (True, "save it again"),
        ("1", "save it again"),
    ):
        path.write_text(json.dumps({**GOOD, "format": version}))
        with pytest.raises(ValueError, match=f"format is .*{way_out}"):
            FORMAT.read(path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "by_name", "format", "other"]), _JSON))
def test_any_json_is_taken_or_refused_in_one_line(changes):
    value = {"format": 1, **GOOD, **changes}
    try:
        FORMAT.check(value, "thing.json")
    except ValueError as error:
        assert "'thing.json': " in str(error) and "\n" not in str(error)
        return
    assert value["format"] == 1 and 1 <= value["count"] <= 9 and 0 <= value["share"] <= 1 and value["name"] in "ab"


DESCRIBED = {
    "weight": Tensor(FLOATS, ("out", "in"), least=-10, most=10),
    "bias": Tensor(FLOATS, ("out",), optional=True),
}


@pytest.mark.parametrize("make", [torch.tensor, np.array])
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"weight": [[1.0, float("nan")]]}, "weight has NaN or infinity"),
        ({"weight": [[1.0, float("-inf")]]}, "weight has NaN or infinity"),
        ({"weight": [[1.0, 11.0]]}, "weight has the value 11; its values must be from -10 to 10"),
        ({"weight": [[1, 2]]}, "weight is I64; it must be a float"),
        ({"weight": [1.0, 2.0]}, r"weight has the shape \[2\]; it must be \[out, in\]"),
        ({"bias": [1.0, 2.0]}, r"bias has the shape \[2\]; it must be \[1\]"),
        ({"bias": [[1.0]]}, "bias has the shape"),
        ({"weight": None}, "weight is missing"),
        ({"more": [1.0]}, "more belongs to nothing there"),
    ],
)
def test_tensors(make, changes, words):
    tensors = {"weight": [[1.0, 2.0]], "bias": [0.5], **changes}
    found = {name: make(value) for name, value in tensors.items() if value is not None}
    with pytest.raises(ValueError, match=f"'a file': {words}"):
        check_tensors(found, DESCRIBED, "'a file'")


def test_sizes_are_shared_and_returned():
    found = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    assert check_tensors(found, DESCRIBED, "'a file'", {"in": 2}) == {"out": 3, "in": 2}
    with pytest.raises(ValueError, match=r"weight has the shape \[3, 2\]; it must be \[out, 4\]"):
        check_tensors(found, DESCRIBED, "'a file'", {"in": 4})
    with pytest.raises(ValueError, match="no numbers"):
        check_tensors({"weight": torch.zeros(0, 2)}, DESCRIBED, "'a file'")


def test_the_page_is_made_from_the_descriptions():
    pytest.importorskip("sklearn", reason="some of the formats are a PALPClassifier's")
    from tests.documents.file_formats import PAGE, filled, tables

    page = PAGE.read_text(encoding="utf-8")
    assert page == filled(page), "run python -m tests.documents.file_formats"
    as_others = {"palp ridge", "palp svm", "palp gda", "detector cosine", "params of relative_mahalanobis"}
    missing = [name for name in tables() if f"<!-- table: {name} -->" not in page and name not in as_others]
    assert not missing
