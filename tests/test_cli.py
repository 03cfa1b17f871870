# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The command line on a tiny model: whole runs, resumed runs, and mistakes that leave nothing behind."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file

from peft_ext import PeqaConfig, load, load_tokenizer
from peft_ext.cli import main
from peft_ext.model_card import README
from tests.snippets import printed_by_card
from tests.tiny.folders import save_tiny_gpt2, save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def flags(tiny_folder):
    common = {
        "model": tiny_folder,
        "max_steps": 3,
        "block_size": 32,
        "held_out_blocks": 4,
        "calibration_blocks": 8,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return [part for name, value in common.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def finished(tiny_folder, tmp_path_factory):
    """A finished run."""
    run = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--model", tiny_folder, "--output_dir", run, "--bits", "3", "--max_steps", "4", "--block_size", "32"]
    arguments += ["--held_out_blocks", "4", "--calibration_blocks", "8", "--device", "cpu", "--batch_size", "2"]
    assert main(["tune", *map(str, arguments)]) == 0
    return run


def test_a_run_holds_what_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"adapter", "base", "before.json", "config.yaml", "loss.png", "metrics.json"}
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics["perplexity"]) == {"float", "quantized", "tuned"}
    assert metrics["trained_parameters"] == 2 * (4 * 64 + 2 * 96 + 64)
    assert metrics["steps"] == len(metrics["losses"]) == 4
    assert metrics["bytes"]["adapter"] < metrics["bytes"]["packed_base"] < metrics["bytes"]["float_model"]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_runs_cards(finished, tmp_path):
    """Also of a run that was moved: its adapter's base lies beside it."""
    run = shutil.copytree(finished, tmp_path / "moved")
    cards, perplexities = {}, json.loads((run / "metrics.json").read_text())["perplexity"]
    for part, columns in (("base", ("float", "quantized")), ("adapter", ("float", "quantized", "tuned"))):
        text = (run / part / README).read_text()
        row = " | ".join(f"{perplexities[name]:.4g}" for name in columns)
        cards[part] = text
        assert "perplexity on 4 held-out rows of" in text and f" | {row} |" in text and "3-bit" in text
    assert printed_by_card(cards["base"], run / "base")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(finished / "base")
    config["base_model_name_or_path"] = "runs/not/here/base"
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert printed_by_card(cards["adapter"], run / "adapter")
    loaded = load(str(run / "adapter"))
    assert loaded.get_base_model().name_or_path == str(run / "base")


def test_started_again_a_finished_run_prints_its_table(finished, capsys):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    again = ["--output_dir", str(finished), "--use_cpu", "True", "--per_device_train_batch_size", "2"]
    for name in ("model", "bits", "max_steps", "block_size", "held_out_blocks", "calibration_blocks"):
        again += [f"--{name}", str(config[name])]
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(["tune", *again]) == 0
    shown = capsys.readouterr()
    assert "is finished already" in shown.err and "perplexity, tuned" in shown.out and "1,024" in shown.out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_other_arguments_do_not_overwrite_a_run(finished, flags, capsys):
    assert main(["tune", *flags, "--output_dir", str(finished), "--bits", "2"]) == 2
    assert "holds a run with other settings" in capsys.readouterr().err


def test_eval_and_generate(finished, tmp_path, capsys):
    assert (
        main(["eval", str(finished), "--block_size", "32", "--blocks", "4", "--output", str(tmp_path / "e.json")]) == 0
    )
    metrics = json.loads((finished / "metrics.json").read_text())
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["perplexity"] == pytest.approx(metrics["perplexity"]["tuned"], rel=1e-3)
    assert main(["generate", str(finished), "--prompt", "one", "two words", "--max_new_tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "--- one\none" in out and "--- two words\ntwo words" in out


def test_base_and_adapter_by_name(finished, tmp_path):
    arguments = ["--model", str(finished / "base"), "--adapter", str(finished / "adapter")]
    common = ["--block_size", "32", "--blocks", "4", "--output", str(tmp_path / "e.json")]
    assert main(["eval", *arguments, *common]) == 0
    assert main(["eval", *arguments[:2], *common]) == 0


def test_a_packed_base_keeps_its_codes(finished, flags, tmp_path):
    run = tmp_path / "second"
    position = flags.index("--model")
    flags[position + 1] = str(finished / "base")
    assert main(["tune", *flags, "--bits", "3", "--output_dir", str(run)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["perplexity"]["float"] is None
    # the header's metadata, of which safetensors writes in any order, aside
    kept, first = (load_file(folder / "base" / "model.safetensors") for folder in (run, finished))
    assert kept.keys() == first.keys() and all(torch.equal(kept[name], first[name]) for name in first)


def test_a_packed_base_of_several_formats(tiny_folder, flags, tmp_path):
    """Each layer keeps its own width, and half of the adapter is of each."""
    config = PeqaConfig(bits=4, bits_pattern={"mlp": 3}, group_size=32, group_size_pattern={"q_proj": 16})
    base = get_peft_model(load(str(tiny_folder)), config).unload()
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(str(tiny_folder)).save_pretrained(tmp_path / "base")
    flags[flags.index("--model") + 1] = str(tmp_path / "base")
    assert main(["tune", *flags, "--output_dir", str(tmp_path / "run")]) == 0
    stored = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert stored["bits"] == "base" and stored["group_size"] is None
    assert main(["tune", *flags, "--method", "alphatuning", "--output_dir", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_yaml_and_flags(flags, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("bits: 2\ngroup_size: 32\ninit_method: minmax\n")
    assert main(["tune", "--config", str(config), *flags, "--bits", "4", "--output_dir", str(tmp_path / "run")]) == 0
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (stored["bits"], stored["group_size"], stored["init_method"]) == (4, 32, "minmax")
    config.write_text("bitz: 2\n")
    assert main(["tune", "--config", str(config), *flags, "--output_dir", str(tmp_path / "other")]) == 2
    assert "bitz" in capsys.readouterr().err


def test_a_killed_run_goes_on(flags, tmp_path, monkeypatch):
    from transformers import Trainer

    flags += ["--save_steps", "1", "--output_dir", str(tmp_path / "run")]
    steps = []
    original = Trainer.training_step

    def killed(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", killed)
    assert main(["tune", *flags]) == 130  # Ctrl-C
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert main(["generate", str(tmp_path / "run"), "--prompt", "x"]) == 2
    assert main(["tune", *flags]) == 0
    assert steps == [0, 1, 2, 2]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 3


LAUNCHERS = {
    "accelerate-launch": ("accelerate.commands.launch", "--cpu", "--num_processes", 1, "--module", "peft_ext.cli"),
    # accelerate starts several CPU processes only through mpirun; torchrun needs nothing else
    "torchrun-two-processes": ("torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "peft_ext.cli"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_tune_under_a_launcher(launcher, launch, flags, tmp_path):
    module, *rest = LAUNCHERS[launcher]
    launch(module, *rest, "tune", *flags, "--bits", 3, "--output_dir", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == len(metrics["losses"]) == 3
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"adapter", "base", "loss.png"}
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--init_method", "best"], "init_method='best'"),
        (["--calibration_blocks", "0"], "calibration_blocks=0"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0"),
        (["--bits", "four"], "bits='four'"),
        (["--bits", "base"], "has no packed layers"),
        (["--split", "train"], "split='train'"),
        (["--packing", "True", "--max_length", "1"], "max_length=1"),
        (["--padding_free", "True"], "padding_free=True"),
        (["--method", "alphatuning", "--bits", "9"], "bits=9"),
        (["--method", "alphatuning", "--trained_alphas", "second"], "trained_alphas='second'"),
        (["--method", "alphatuning", "--sym", "True"], "sym=True"),
        (["--method", "alphatuning", "--zero", "float"], "zero='float'"),
        (["--method", "lora", "--trained", "scales+zeros"], "trained='scales+zeros' is for method='peqa'"),
        (["--trained", "zeros"], "trained='zeros' is unknown"),
        (["--zero", "half"], "zero='half' is unknown"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "eval_strategy="),
        (["--output_dir", "{tmp}/short.txt"], "is a file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line_and_leave_nothing(flags, mistake, message, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short")
    before = sorted(tmp_path.rglob("*"))
    mistake = [part.format(tmp=tmp_path) for part in mistake]
    assert main(["tune", *flags, "--output_dir", str(tmp_path / "run"), *mistake]) == 2
    error = capsys.readouterr().err
    assert "peft-ext tune: error:" in error and message in error and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def gpt2_flags(flags, tmp_path):
    """GPT-2, whose Conv1D layers compressed-tensors has no room for."""
    flags[flags.index("--model") + 1] = str(save_tiny_gpt2(tmp_path / "gpt2"))
    return flags


@pytest.mark.parametrize("method", ["peqa", "alphatuning"])
def test_gpt2(method, gpt2_flags, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["tune", *gpt2_flags, "--method", method, "--bits", "3", "--output_dir", str(run)]) == 0
    assert json.loads((run / "base" / "config.json").read_text())["quantization_config"]["quant_method"] == "bcq"
    assert main(["eval", str(run), "--block_size", "32", "--blocks", "4", "--output", str(tmp_path / "e.json")]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["perplexity"] == pytest.approx(metrics["perplexity"]["tuned"], rel=1e-3)


@pytest.mark.parametrize("trained_alphas, count", [("first", 1), ("all", 2)])
def test_alphatuning(trained_alphas, count, flags, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["--method", "alphatuning", "--trained_alphas", trained_alphas, "--bits", "2"]
    assert main(["tune", *flags, *arguments, "--output_dir", str(run)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["trained_parameters"] == 2 * (4 * 64 + 2 * 96 + 64) * count
    assert main(["generate", str(run), "--prompt", "one", "--max_new_tokens", "3"]) == 0
    assert "--- one\none" in capsys.readouterr().out
    assert main(["tune", *flags, *arguments, "--output_dir", str(run)]) == 0
    assert "is finished already" in capsys.readouterr().err


@pytest.mark.parametrize(("checkpoint_format", "zero"), [("pack-quantized", "int"), ("bcq", "int"), ("bcq", "float")])
def test_quantize(checkpoint_format, zero, quantize_flags, tmp_path, capsys):
    folder = tmp_path / "packed"
    arguments = [
        *quantize_flags,
        "--format",
        checkpoint_format,
        "--zero",
        zero,
        "--bits",
        "3",
        "--output_dir",
        str(folder),
    ]
    assert main(["quantize", *arguments]) == 0
    out = capsys.readouterr().out
    assert "perplexity, 3 bits" in out and "packed checkpoint" in out
    assert main(["generate", "--model", str(folder), "--prompt", "one", "--max_new_tokens", "2"]) == 0
    # a base that is packed already is tuned as it is
    method = "alphatuning" if (checkpoint_format, zero) == ("bcq", "int") else "peqa"
    position = quantize_flags.index("--model")
    quantize_flags[position + 1] = str(folder)
    training = ["--method", method, "--bits", "3", "--max_steps", "1", "--use_cpu", "True"]
    training += ["--trained", "scales+zeros"] if method == "peqa" else []
    assert main(["tune", *quantize_flags, *training, "--output_dir", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["perplexity"]["float"] is None and metrics["perplexity"]["tuned"] > 1


@pytest.fixture
def quantize_flags(flags):
    at = [flags.index(name) for name in ("--max_steps", "--use_cpu", "--disable_tqdm")]
    return [part for index, part in enumerate(flags) if index not in at and index - 1 not in at]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--format", "gguf"], "format='gguf' is unknown"),
        (["--format", "bcq", "--bits", "0"], "bits=0"),
        (["--format", "bcq", "--bits", "9"], "bits=9"),
        (["--format", "bcq", "--sym", "True"], "sym=True"),
        (["--zero", "half"], "zero='half' is unknown"),
        (
            ["--zero", "float"],
            "zero='float': format='pack-quantized' has no room for float zero points; pass --format bcq",
        ),
        (["--format", "bcq", "--zero", "half"], "zero='half' is unknown"),
        (["--format", "bcq", "--zero", "float", "--sym", "True"], "sym=True"),
        (["--format", "bcq", "--init_method", "minmax"], "init_method='minmax'"),
        (["--group_size", "48"], "group_size=48 does not divide"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--output_dir", "{tmp}/full"], "not empty"),
        (["--output_dir", "/proc/nowhere"], "can't be written"),
        (["--output_dir", ""], "pass --output_dir"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_when_quantising(quantize_flags, mistake, message, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    mistake = [part.format(tmp=tmp_path) for part in mistake]
    assert main(["quantize", *quantize_flags, "--output_dir", str(tmp_path / "out"), *mistake]) == 2
    error = capsys.readouterr().err
    assert "peft-ext quantize: error:" in error and message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_quantising_gpt2_says_which_format_has_room(gpt2_flags, tmp_path, capsys):
    position = gpt2_flags.index("--max_steps")
    arguments = [*gpt2_flags[:position], *gpt2_flags[position + 2 : gpt2_flags.index("--use_cpu")]]
    assert main(["quantize", *arguments, "--output_dir", str(tmp_path / "out")]) == 2
    assert "Conv1D" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_a_killed_run_left_is_swept_away(finished, tmp_path):
    from peft_ext.files import sweep, written_whole

    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "base") as partial:
        partial.mkdir()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with written_whole(tmp_path / "base") as partial:  # killed before it could clean up
        left = tmp_path / partial.parent.name.replace("partial-", "partial-old")
        left.mkdir()
        partial.mkdir()
    (tmp_path / ".hidden").touch()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "base"]


@pytest.mark.parametrize("output, message", [("missing/e.json", "does not exist"), ("", "is a folder")])
def test_eval_checks_its_output_first(output, message, finished, tmp_path, capsys):
    assert main(["eval", str(finished), "--output", str(tmp_path / output)]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_run(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    adapter = run / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-10])
    assert main(["generate", str(run), "--prompt", "x"]) == 2
    assert "truncated, damaged" in capsys.readouterr().err
    assert main(["generate", str(run), "--prompt", ""]) == 2
    assert "empty" in capsys.readouterr().err


def test_output_dir_is_asked_for(flags, capsys):
    assert main(["tune", *flags]) == 2
    assert "pass --output_dir" in capsys.readouterr().err


def test_help_version_and_unknown_commands(capsys):
    assert main(["--help"]) == main([]) == main(["--version"]) == 0
    assert "tune" in capsys.readouterr().out
    assert main(["tun"]) == 2
    assert "unknown command 'tun'" in capsys.readouterr().err


def test_generate_without_a_prompt(finished, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", [])
    assert main(["generate", str(finished)]) == 2
    assert "pass --prompt" in capsys.readouterr().err
    assert main(["generate", str(finished), "--prompt", "x", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_eval_reads_what_the_run_held_out(finished, tmp_path, monkeypatch, capsys):
    from peft_ext.commands import eval as eval_command

    run, found = tmp_path / "run", []
    shutil.copytree(finished, run)
    (tmp_path / "mine.txt").write_text("words of a text\n" * 200)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(
        yaml.safe_dump({**config, "held_out": 0.05, "data": str(tmp_path / "mine.txt"), "block_size": 16})
    )
    original = eval_command.held_out_data
    monkeypatch.setattr(
        eval_command,
        "held_out_data",
        lambda args, *rest: found.append((args.data, args.block_size, rest[2])) or original(args, *rest),
    )
    assert main(["eval", str(run), "--blocks", "2"]) == 0
    assert main(["eval", str(run), "--blocks", "2", "--held_out", "0.2", "--data", "python-docs"]) == 0
    assert found == [(str(tmp_path / "mine.txt"), 16, 0.05), ("python-docs", 256, 0.2)]
