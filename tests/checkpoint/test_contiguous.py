# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Every tensor of a packed layer is contiguous, whatever format it comes from: FSDP2 shards nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_ext import AlphaTuningConfig, PeqaConfig, calibrate, load_packed
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.formats import Uniform
from peft_ext.quant.linear import PackedLinear
from tests.checkpoint.gguf_files import write_gguf
from tests.checkpoint.test_gguf_loading import FAMILIES
from tests.faults import saved
from tests.tiny.models import tiny


CONFIGS = {
    "per channel": lambda: PeqaConfig(bits=4),
    "group-wise": lambda: PeqaConfig(bits=3, group_size=8),
    "symmetric": lambda: PeqaConfig(bits=4, group_size=8, sym=True),
    "float zero points": lambda: PeqaConfig(bits=4, group_size=8, zero="float"),
    "binary": lambda: AlphaTuningConfig(bits=3, group_size=8),
    "calibrated": lambda: PeqaConfig(bits=3, group_size=8, init_method="calibrated"),
    "calibrated binary": lambda: AlphaTuningConfig(bits=2, group_size=8, init_method="calibrated"),
}
FOREIGN = ("others' compressed-tensors", "GPTQ base", "AWQ base")


def check(model: nn.Module) -> None:
    layers = packed_layers(model)
    assert layers
    turned = [
        f"{name}.{kind}"
        for name, layer in layers.items()
        for kind, p in layer.named_parameters()
        if not p.is_contiguous()
    ]
    assert not turned


@pytest.mark.parametrize("name", CONFIGS)
def test_ours_in_memory_and_from_disk(name, tmp_path):
    config, model = CONFIGS[name](), tiny("llama")
    if config.init_method == "calibrated":
        model = calibrate(model, config, [{"input_ids": torch.arange(3, 19)[None]}])
    model = get_peft_model(model, config)
    check(model)
    model.unload().save_pretrained(tmp_path)
    check(load_packed(tmp_path))
    check(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), CONFIGS[name]()))


@pytest.mark.parametrize("kind", FOREIGN)
def test_others(kind, tmp_path):
    saved.KINDS[kind][0].build(tmp_path / "base")
    check(load_packed(tmp_path / "base"))


def test_gguf(tmp_path):
    check(
        load_packed(
            write_gguf(tmp_path / "model.gguf", *FAMILIES["llama"], lambda name: "Q8_0" if "embd" in name else "Q4_1")
        )
    )


def test_a_layer_of_tensors_that_were_turned_round():
    quantized = Uniform(4, 8).quantize(torch.randn(32, 16), "minmax")
    turned = [part.t().contiguous().t() for part in quantized]
    layer = PackedLinear.from_quantized(type(quantized)(*turned), 4, None)
    assert all(p.is_contiguous() for p in layer.parameters())
    layer.set_zero_point(turned[2])
    assert layer.zero_point.is_contiguous()
