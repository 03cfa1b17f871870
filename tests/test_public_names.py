# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the packages show: names that exist, imports that register nothing and cost nothing."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


METHODS = [
    "generation_ext.critic",
    "generation_ext.granularity",
    "generation_ext.in_context",
    "generation_ext.probing",
]
PACKAGES = ["peft_ext", "peft_ext.quant", "peft_ext.ood", "peft_ext.distillation", *METHODS, "trl_ext.almost"]
COLLECTIONS = {"generation_ext": METHODS, "trl_ext": ["trl_ext.almost"]}
LIGHT = [*COLLECTIONS, *METHODS, "trl_ext.almost"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there(package):
    module = importlib.import_module(package)
    assert module.__all__ == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing_like_this'"):
        getattr(module, "nothing_like_this")  # noqa: B009


@pytest.mark.parametrize("package", COLLECTIONS)
def test_a_collection_has_all_names_of_its_packages(package):
    module = importlib.import_module(package)
    parts = [importlib.import_module(part) for part in COLLECTIONS[package]]
    assert sorted(module.__all__) == sorted(name for part in parts for name in part.__all__)
    for part in parts:
        for name in part.__all__:
            assert getattr(module, name) is getattr(part, name)


@pytest.mark.parametrize("package", ["peft_ext.ood", "peft_ext.distillation", *METHODS, "trl_ext.almost"])
def test_type_checkers_see_every_name(package):
    """What is imported on demand is imported for them under TYPE_CHECKING."""
    tree = ast.parse(inspect.getsource(importlib.import_module(package)))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    names = {alias.name: line.module for line in block.body for alias in line.names}
    module = importlib.import_module(package)
    assert sorted(names) == module.__all__
    for name, home in names.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)


@pytest.mark.parametrize("package", LIGHT + ["peft_ext.ood"])
def test_no_name_is_also_a_module(package):
    """Importing the module would put it in the name's place."""
    module = importlib.import_module(package)
    assert not {found.name for found in pkgutil.iter_modules(module.__path__)} & set(module.__all__)


def test_importing_the_collections_costs_nothing():
    code = (
        f"import sys, {', '.join(LIGHT)}; print(*sorted({{'peft_ext', 'torch', 'transformers'}} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("package", LIGHT)
def test_importing_a_package_registers_no_tuner(package, fresh_process):
    code = f"import {package}; from peft import PeftType; print(*sorted(PeftType.__members__))"
    assert not {"PEQA", "ALPHATUNING", "BOTTLENECK"} & set(fresh_process(code).split())


def test_the_readme_and_the_notebooks_need_few_import_paths():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "notebooks").glob("*.ipynb"))]
    paths = {path for text in texts for path in re.findall(r"from ((?:peft|generation|trl)_ext[\w.]*) import", text)}
    assert paths <= {
        *("peft_ext", "peft_ext.ood", "generation_ext", "trl_ext"),
        # what lies under them
        *("peft_ext.quant", "peft_ext.ood.study.data", "peft_ext.ood.study.training", "trl_ext.almost.plan"),
    }
