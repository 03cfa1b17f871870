# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext export`: every format from every kind of folder, written whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_ext import PeqaConfig
from peft_ext.cli import main
from peft_ext.quant.conversion import packed_layers
from tests.cases import assert_differs, assert_same
from tests.checkpoint.gptq_files import gptq_layer, save_gptq
from tests.commands.conftest import logits, make_run


STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten().tolist()))
assert "peft_ext" not in sys.modules
"""


def export(*args) -> int:
    return main(["export", *map(str, args)])


@pytest.mark.parametrize("to", ["compressed-tensors", "dequantized"])
def test_a_run_for_stock_transformers(to, run, tmp_path, fresh_process, capsys):
    folder, expected = run
    assert export(folder, "--to", to, "--output_dir", tmp_path / "out") == 0
    assert f"{to}: " in capsys.readouterr().out
    actual = torch.tensor(json.loads(fresh_process(STOCK, tmp_path / "out")))
    assert_same(actual, expected.flatten(), tolerance=1e-4)
    assert_differs(expected, logits(AutoModelForCausalLM.from_pretrained(folder / "base")))  # the adapter is merged
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in config) == (to == "compressed-tensors")


@pytest.mark.parametrize("kind", ["run", "binary_run"])
def test_bcq(kind, request, tmp_path):
    folder, expected = request.getfixturevalue(kind)
    assert export(folder, "--to", "bcq", "--output_dir", tmp_path / "new" / "out") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "out")
    assert_same(logits(model), expected)
    assert packed_layers(model)
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "out")("a b")["input_ids"]


def test_base_and_adapter_and_an_adapters_folder(run, tmp_path):
    folder, expected = run
    assert export(folder / "adapter", "--to", "bcq", "--output_dir", tmp_path / "one") == 0
    arguments = [folder / "base", "--adapter", folder / "adapter", "--to", "bcq", "--output_dir", tmp_path / "two"]
    assert export(*arguments) == 0
    for name in ("one", "two"):
        assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), expected)


def test_a_packed_checkpoint_without_an_adapter(run, tmp_path):
    """Stock transformers loads it dequantised; its codes are exported all the same."""
    folder, _ = run
    assert export(folder / "base", "--to", "bcq", "--output_dir", tmp_path / "out") == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {layer.bits for layer in packed_layers(exported).values()} == {3}
    assert_same(logits(exported), logits(AutoModelForCausalLM.from_pretrained(folder / "base")), tolerance=1e-4)


def test_containers_for_vllm(run, tmp_path, capsys, fresh_process):
    folder, expected = run
    arguments = [folder, "--to", "compressed-tensors", "--output_dir"]
    assert export(*arguments, tmp_path / "dense") == 0
    assert "vLLM won't run this checkpoint: it takes codes of 4 and 8 bits, not 3" in capsys.readouterr().err
    assert export(*arguments, tmp_path / "wide", "--container_bits", 4) == 0
    assert "vLLM" not in capsys.readouterr().err
    assert_same(torch.tensor(json.loads(fresh_process(STOCK, tmp_path / "wide"))), expected.flatten(), tolerance=1e-4)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "wide"), PeqaConfig(bits=3, group_size=32))
    assert_same(logits(tuned), expected)
    assert export(*arguments, tmp_path / "narrow", "--container_bits", 2) == 2
    assert "container_bits=2 can't hold codes of 3 bits" in capsys.readouterr().err
    assert not (tmp_path / "narrow").exists()


def save_partly_packed(float_folder, folder, **kwargs):
    """q and v packed, k not; gate packed, up not."""
    model = AutoModelForCausalLM.from_pretrained(float_folder)
    config = PeqaConfig(bits=4, group_size=32, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"], **kwargs)
    base = get_peft_model(model, config).unload()
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(float_folder).save_pretrained(folder)
    return base


@pytest.mark.parametrize("sym", [True, False])
def test_partly_packed_layers_that_vllm_runs_as_one(sym, float_folder, tmp_path, capsys, fresh_process):
    base = save_partly_packed(float_folder, tmp_path / "base", sym=sym)
    arguments = [tmp_path / "base", "--to", "compressed-tensors", "--output_dir"]
    assert export(*arguments, tmp_path / "as-it-is") == 0
    out = capsys.readouterr().err
    assert "different quantization schemes in 4 of them, such as 'model.layers.0.self_attn'" in out
    assert "k_proj float" in out and "--pack_rest packs the rest" in out
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "as-it-is")), logits(base), tolerance=1e-6)
    assert export(*arguments, tmp_path / "whole", "--pack_rest") == 0
    out = capsys.readouterr().err
    assert "packed like the layers that vLLM runs them with: 4 (model.layers.0.self_attn.k_proj" in out
    assert "vLLM won't" not in out
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    layers, before = packed_layers(whole), packed_layers(base)
    assert {name.rsplit(".", 1)[1] for name in layers.keys() - before.keys()} == {"k_proj", "up_proj"}
    assert len({layer.number_format for layer in layers.values()}) == 1
    for name, layer in before.items():
        assert torch.equal(layers[name].planes, layer.planes) and torch.equal(layers[name].scale, layer.scale)
    assert_same(
        torch.tensor(json.loads(fresh_process(STOCK, tmp_path / "whole"))), logits(whole).flatten(), tolerance=1e-4
    )
    # what vLLM looks its shards up in
    ignored = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]["ignore"]
    assert not [name for name in ignored if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))]
    assert (
        export(tmp_path / "whole", "--to", "compressed-tensors", "--output_dir", tmp_path / "no", "--pack_rest") == 0
    )
    assert "runs them with: 0\n" in capsys.readouterr().err
    assert export(tmp_path / "base", "--to", "bcq", "--output_dir", tmp_path / "bcq", "--pack_rest") == 2
    assert "pack_rest=True is for --to compressed-tensors" in capsys.readouterr().err


def test_a_gptq_checkpoint(float_folder, tmp_path, fresh_process):
    model, tensors = AutoModelForCausalLM.from_pretrained(float_folder), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes = torch.randint(16, module.weight.shape)
            scale = torch.full((codes.shape[0], codes.shape[1] // 32), 0.01)
            tensors[name] = gptq_layer(codes, scale, torch.full_like(scale, 8).int(), 4)
    save_gptq(model, tensors, tmp_path / "gptq", bits=4, group_size=32, sym=True)
    AutoTokenizer.from_pretrained(float_folder).save_pretrained(tmp_path / "gptq")
    assert export(tmp_path / "gptq", "--to", "compressed-tensors", "--output_dir", tmp_path / "out") == 0
    assert len(json.loads(fresh_process(STOCK, tmp_path / "out"))) == 4 * model.config.vocab_size


def test_ia3(float_folder, binary_run, tmp_path, capsys):
    """The adapter alone, which stock PEFT loads onto the run's base."""
    expected = make_run(tmp_path / "run", float_folder, PeqaConfig(bits=3, task_type="CAUSAL_LM"))
    assert export(tmp_path / "run", "--to", "ia3", "--output_dir", tmp_path / "out") == 0
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert "it goes onto" in capsys.readouterr().err
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base"), tmp_path / "out"
    )
    assert_same(logits(loaded), expected, tolerance=1e-5)
    for model, message in ((binary_run[0], "binary coding"), (tmp_path / "run" / "base", "has no adapter")):
        assert export(model, "--to", "ia3", "--output_dir", tmp_path / "other") != 0
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


def test_gguf(run, tmp_path, capsys):
    """It says which types the codes became."""
    folder, _ = run
    arguments = ["--to", "gguf", "--other_tensors", "q8_0", "--output_dir", tmp_path / "out"]
    assert export(folder, *arguments) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    assert (tmp_path / "out" / "model.gguf").read_bytes().startswith(b"GGUF")
    assert "in the GGUF: 14 layers of 3 bits as Q4_0 (4.5 bits a weight)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "SafetensorError"],
)
@pytest.mark.parametrize("to", ["compressed-tensors", "bcq", "dequantized"])
def test_a_full_disk_leaves_nothing(to, error, run, tmp_path, monkeypatch, capsys):
    def full(tensors, path, **kwargs):
        with open(path, "wb") as file:
            file.write(b"half")
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    assert export(run[0], "--to", to, "--output_dir", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message and "damaged" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{run}", "--to", "onnx"], "to='onnx' is unknown; choose one of ('compressed-tensors', 'bcq'"),
        (["{run}"], "to=None is unknown"),
        (["--to", "bcq"], "model is missing"),
        (["{run}", "--to", "bcq", "--container_bits", "4"], "container_bits=4 is for --to compressed-tensors"),
        (["{run}", "--to", "bcq", "--low_bit_types"], "low_bit_types=True is for --to gguf"),
        (["{run}", "--to", "bcq", "--other_tensors", "q8_0"], "other_tensors='q8_0' is for --to gguf"),
        (["{run}", "--to", "bcq", "--adapter", "{run}/adapter"], "names an adapter already"),
        (["{run}/base", "--to", "bcq", "--adapter", "{tmp}/full"], "has no adapter_config.json"),
        (["{tmp}/unfinished", "--to", "bcq"], "is no finished run"),
        (["{tmp}/orphan", "--to", "bcq"], "doesn't say what its base is"),
        (["{tmp}/nothing", "--to", "bcq"], "there is no such folder"),
        (["{float}", "--to", "bcq"], "has no packed layers to export"),
        (["{binary}", "--to", "compressed-tensors"], "pass format='bcq'"),
        (["{run}", "--to", "bcq", "--output_dir", "{tmp}/full"], "is a file or not empty"),
        (["{run}", "--to", "bcq", "--output_dir", ""], "pass --output_dir"),
    ],
)
def test_mistakes_leave_nothing(arguments, message, run, binary_run, float_folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").touch()
    (tmp_path / "orphan").mkdir()
    (tmp_path / "orphan" / "adapter_config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    names = {"run": run[0], "binary": binary_run[0], "float": float_folder, "tmp": tmp_path}
    arguments = [part.format(**names) for part in arguments]
    if "--output_dir" not in arguments:
        arguments += ["--output_dir", tmp_path / "out"]
    assert export(*arguments) == 2
    error = capsys.readouterr().err
    assert "peft-ext export: error:" in error and message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_truncated_base(run, tmp_path, capsys):
    shutil.copytree(run[0], tmp_path / "run")
    path = tmp_path / "run" / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert export(tmp_path / "run", "--to", "bcq", "--output_dir", tmp_path / "out") == 2
    assert f"{str(path)!r} is truncated" in capsys.readouterr().err and not (tmp_path / "out").exists()
