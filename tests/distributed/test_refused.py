# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What can't run on several processes says so, in one line and before anything is changed."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from peft import get_peft_model

from peft_ext import AlphaTuningConfig, PeqaConfig, load_packed
from tests.conftest import ROOT
from tests.distributed import tensor_parallel
from tests.tiny.models import tiny


pytestmark = pytest.mark.distributed


def test_tensor_parallelism(tmp_path, run_module):
    """`tp_plan="auto"` on a packed base ended the process, and a tuner on a model that is cut died in its quantiser."""
    tensor_parallel.write(tmp_path)
    run_module("tests.distributed.tensor_parallel", tmp_path, processes=2, ranks=True)


@pytest.mark.parametrize("version", [None, "1", "2"])
def test_fsdp1(version, tmp_path, monkeypatch):
    """It ended in "Cannot flatten integer dtype tensors", once the model had been loaded and packed."""
    tensor_parallel.write(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    if version is not None:
        monkeypatch.setenv("FSDP_VERSION", version)
    works = nullcontext() if version == "2" else pytest.raises(ValueError, match="--fsdp_version 2")
    for name in ("bcq", "pack-quantized"):
        with works:
            load_packed(tmp_path / name)
    for config in (PeqaConfig(bits=4), AlphaTuningConfig(bits=3)):
        with works:
            get_peft_model(tiny("llama"), config)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_ready_configs(name):
    """accelerate reads them, and the FSDP one is of version 2."""
    config = load_config_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    assert config.num_processes == 2
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
