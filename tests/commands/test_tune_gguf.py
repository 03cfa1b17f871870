# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext tune` on a GGUF: its own integers, unless another format is named."""

from __future__ import annotations

import json

import pytest
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_ext import PeqaConfig, export_gguf, load
from peft_ext.cli import main
from peft_ext.commands.tune import TuneArguments
from peft_ext.quant.conversion import packed_layers
from tests.tiny.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = get_peft_model(LlamaForCausalLM(config), PeqaConfig(bits=4, group_size=32, zero="float")).unload()
    return export_gguf(model, byte_tokenizer(), folder / "model.gguf")


@pytest.mark.parametrize("more, bits", [([], "base"), (["--bits", "3", "--init_method", "minmax"], 3)])
def test_the_files_own_integers_or_a_format_that_is_named(more, bits, gguf_file, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a b c d e f g h. " * 200)
    run = tmp_path / "run"
    flags = [
        "--model",
        str(gguf_file),
        "--data",
        str(tmp_path / "text.txt"),
        "--output_dir",
        str(run),
        "--max_steps",
        "1",
    ]
    flags += ["--held_out_blocks", "1", "--block_size", "32", "--use_cpu", "True", "--disable_tqdm", "True"]
    assert main(["tune", *flags, *more]) == 0
    err = capsys.readouterr().err
    assert ("holds integers already (Q4_1 x7); they become floats and are rounded to 3 bits again" in err) == (
        bits == 3
    )
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["bits"] == bits and (metrics["perplexity"]["float"] is None) == (bits == "base")
    formats = {
        (layer.bits, layer.group_size, layer.number_format.zero)
        for layer in packed_layers(load(str(run / "base"))).values()
    }
    assert formats == ({(4, 32, "float")} if bits == "base" else {(3, -1, "int")})
    with_recipe = TuneArguments(model=str(gguf_file), recipe="adapt-pack-heal")
    assert (with_recipe.width(), TuneArguments(model=str(gguf_file), method="alphatuning").width()) == (4, 4)
    assert main(["generate", str(run), "--prompt", "a", "--max_new_tokens", "2"]) == 0
