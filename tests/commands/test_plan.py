# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext plan` on a tiny model's config, without its weights; and mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import pytest

from peft_ext.cli import main
from tests.tiny.folders import save_tiny


SMALL = ["--max_length", "16", "--context_length", "16"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A config.json alone."""
    folder = tmp_path_factory.mktemp("plan")
    save_tiny("llama", folder / "model")
    shutil.copy(folder / "model" / "config.json", folder / "config.json")
    return str(folder / "config.json")


@pytest.fixture(scope="module")
def plain(config_file):
    """The plan that flags are compared with."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["plan", config_file, "--method", "peqa", "full", *SMALL, "--json"]) == 0
    return json.loads(out.getvalue())


def _planned(capsys, *arguments):
    assert main(["plan", *arguments, *SMALL, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_tables(config_file, capsys):
    assert main(["plan", "--model", config_file, *SMALL, "--gpus", "2", "--bits", "3"]) == 0
    out = capsys.readouterr().out
    for word in ("peqa, 3 bits", "alphatuning, 3 bits", "float (float32)", "peqa, 3 bits, in vLLM on 2 devices"):
        assert f"  {word} " in out
    for line in ("lora ", "full ", "tuning ", "serving "):
        assert f"\n  {line}" in out
    assert "gathered" in out and "MiB" in out


def test_json_names_what_was_asked(config_file, capsys):
    found = _planned(capsys, config_file, "--method", "peqa", "full", "--bits", "2", "--dtype", "bfloat16")
    assert found["bits"] == 2 and found["dtype"] == "bfloat16" and found["gpus"] == 1
    assert list(found["tuning"]) == ["peqa", "full"]
    assert list(found["serving"]) == ["peqa, 2 bits", "peqa, 2 bits, in vLLM on one device", "float (bfloat16)"]
    assert found["tuning"]["peqa"]["total"] < found["tuning"]["full"]["total"]
    vllm = found["serving"]["peqa, 2 bits, in vLLM on one device"]
    assert vllm["activations"] is None and vllm["total"] == vllm["weights"] + vllm["cache"]


@pytest.mark.parametrize(
    ("flags", "column", "smaller"),
    [
        (["--bits", "8"], "weights", False),
        (["--group_size", "8"], "optimizer", False),
        (["--optim", "sgd"], "optimizer", True),
        (["--max_length", "32"], "activations", False),
        (["--per_device_train_batch_size", "1"], "activations", True),
        (["--gradient_checkpointing"], "activations", True),
        (["--gpus", "4"], "weights", True),
        (["--trained", "scales+zeros"], "trained", False),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_flag_of_tuning_counts(flags, column, smaller, config_file, plain, capsys):
    assert main(["plan", config_file, "--method", "peqa", *SMALL, *flags, "--json"]) == 0
    size, before = (found["tuning"]["peqa"][column] for found in (json.loads(capsys.readouterr().out), plain))
    assert (size < before) is smaller and size != before


@pytest.mark.parametrize(
    ("flags", "row"),
    [
        (["--batch_size", "2"], "peqa, 4 bits"),
        (["--zero", "float"], "peqa, 4 bits"),
        (["--sym", "True"], "peqa, 4 bits, in vLLM on one device"),
        (["--context_length", "32"], "float (float32)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_flag_of_serving_counts(flags, row, config_file, plain, capsys):
    assert main(["plan", config_file, "--method", "peqa", "full", *SMALL, *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["serving"][row]["total"] != plain["serving"][row]["total"]


def test_rank_of_lora(config_file, capsys):
    trained = [
        _planned(capsys, config_file, "--method", "lora", "--lora_r", rank)["tuning"]["lora"]["trained"]
        for rank in ("4", "8")
    ]
    assert trained[1] == 2 * trained[0]


def test_accumulation_keeps_gradients(config_file, capsys):
    def total(*more):
        return _planned(capsys, config_file, "--method", "full", *more)["tuning"]["full"]["total"]

    assert total("--gradient_accumulation_steps", "2") > total()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--bits", "7"], "bits=7"),
        (["--method", "alphatuning", "--bits", "9"], "bits=9"),
        (["--group_size", "24"], "q_proj': group_size=24 does not divide in_features=32"),
        (["--gpus", "0"], "gpus=0 must be at least 1"),
        (["--method", "qlora"], "method='qlora' is unknown"),
        (["--lora_r", "0"], "lora_r=0"),
        (["--dtype", "int8"], "dtype='int8' is unknown"),
        (["--optim", "adam"], "optim='adam' is unknown"),
        (["--batch_size", "0"], "batch_size=0"),
        (["--max_length", "65"], "max_position_embeddings=64"),
        (["--context_length", "65"], "max_position_embeddings=64"),
        (["--model", "missing.json"], "there is no such config file"),
        (["--model", "./missing"], "there is no such folder"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--model", "{tmp}/unknown.json"], "nosuchmodel"),
        (["--model", "{tmp}/t5.json"], "model_type='t5' is no causal language model's"),
        (["--model", "{tmp}/broken.json"], "broken.json"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line(mistake, message, config_file, tmp_path, capsys):
    (tmp_path / "unknown.json").write_text('{"model_type": "nosuchmodel"}')
    (tmp_path / "t5.json").write_text('{"model_type": "t5"}')
    (tmp_path / "broken.json").write_text("{")
    mistake = [part.format(tmp=tmp_path) for part in mistake]
    assert main(["plan", "--model", config_file, *SMALL, *mistake]) == 2
    error = capsys.readouterr().err
    assert "peft-ext plan: error:" in error and message in error and "Traceback" not in error


def test_distillation(config_file, plain, capsys):
    """Of the methods on packed weights; a live teacher has a column."""
    live = _planned(capsys, config_file, "--method", "peqa", "full", "--distill", "live")
    assert live["tuning"]["peqa"]["teacher"] > 0 and live["tuning"]["full"] == plain["tuning"]["full"]
    assert main(["plan", config_file, *SMALL, "--distill", "live"]) == 0
    assert " teacher " in capsys.readouterr().out
    assert main(["plan", config_file, *SMALL, "--distill", "cached"]) == 0
    assert "towards a teacher on disk, 64 tokens of each, logits in pieces" in capsys.readouterr().out
    assert main(["plan", config_file, *SMALL, "--distill", "yes"]) == 2
    assert "distill='yes' is unknown" in capsys.readouterr().err
