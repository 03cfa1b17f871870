# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Every recipe parses against the dataclasses of all stages."""

from __future__ import annotations

from pathlib import Path

import pytest

import trl_ext
from trl_ext.almost.recipe import STAGES, check_recipe, load_recipe


RECIPES = sorted((Path(trl_ext.__file__).parent / "recipes").glob("*.yaml"))


def test_the_recipes_are_there():
    assert {path.stem for path in RECIPES} == {"smollm2-135m", "qwen-small", "llama-7b"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, tmp_path, monkeypatch):
    # recipes for GPUs are to be checked on machines without one
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True, raising=False)
    config = load_recipe(str(path), run_dir=str(tmp_path))
    assert config.stages == list(STAGES)
    check_recipe(config)
    with pytest.raises(ValueError, match="learning_ratte"):
        check_recipe(load_recipe(str(path), ["reward_model.learning_ratte=1"], run_dir=str(tmp_path)))
