# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`--bits_budget` of `peft-ext quantize`, `tune` and `plan`: who got what, what is written, and mistakes."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from peft_ext.cli import main
from peft_ext.models import load
from peft_ext.quant.conversion import packed_layers


def _widths(folder) -> dict[str, int]:
    return {name: layer.bits for name, layer in packed_layers(load(str(folder))).items()}


@pytest.mark.parametrize("sym", [True, False])
def test_quantize(sym, flags, tmp_path, capsys):
    out = tmp_path / "packed"
    assert (
        main(["quantize", *flags, "--bits_budget", "3.4", "--output_dir", str(out), *(["--sym"] if sym else [])]) == 0
    )
    captured = capsys.readouterr()
    assert "perplexity, 3.4 bits on average" in captured.out
    assert "bits on average: " in captured.err and "mlp.down_proj" in captured.err
    assert ("are written as bcq" in captured.err) is not sym
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == ("compressed-tensors" if sym else "bcq")
    assert len(set(_widths(out).values())) > 1


def test_binary_codings_without_data(flags, tmp_path, capsys):
    out = tmp_path / "packed"
    more = ["--format", "bcq", "--init_method", "greedy", "--bits_budget", "2.5", "--json", "--output_dir", str(out)]
    assert main(["quantize", *flags, *more]) == 0
    assert _widths(out) == json.loads(capsys.readouterr().out)["widths"]


def test_tune(flags, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["tune", *flags, "--max_steps", "2", "--use_cpu", "True", "--output_dir", str(run)]
    assert main([*arguments, "--bits_budget", "3"]) == 0
    assert "layers' widths" in capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["bits"] == "mixed" and metrics["bits_budget"] == 3 and metrics["widths"] == _widths(run / "base")
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert adapter["bits_pattern"] and adapter["bits"] in (2, 3, 4) and adapter["bits_budget"] is None
    assert (run / "bits.png").stat().st_size > 1000
    assert main([*arguments, "--bits_budget", "3"]) == 0  # finished: its figures again
    assert "is finished already" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "bits: was 'mixed', is 4" in capsys.readouterr().err.replace('"', "'")
    assert main(["generate", str(run), "--prompt", "Text", "--max_new_tokens", "2"]) == 0


def test_plan_counts_what_a_budget_takes(places, tmp_path, capsys):
    shutil.copy(places / "chat" / "config.json", tmp_path / "config.json")
    small = ["--max_length", "16", "--context_length", "16", "--json"]

    def weights(*arguments):
        assert (
            main(["plan", str(tmp_path / "config.json"), "--method", "peqa", "alphatuning", *arguments, *small]) == 0
        )
        serving = json.loads(capsys.readouterr().out)["serving"]
        return [each["weights"] for name, each in serving.items() if "vLLM" not in name]

    three, budgeted, four = weights("--bits", "3"), weights("--bits_budget", "3"), weights("--bits", "4")
    between = weights("--bits_budget", "3.5")
    for low, same, half, high in zip(three, budgeted, between, four):
        assert 0.98 * low <= same <= low < half < high
    assert main(["plan", str(tmp_path / "config.json"), "--bits", "3", "--bits_budget", "3"]) == 2
    assert "leave out one of the two" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bits", "2.5"], "bits='2.5' is no width of a weight; .* or as an average --bits_budget"),
        (["--bits_budget", "9"], "bits_budget=9.0 must be a number from 2 to 8"),
        (["--bits_budget", "1"], "bits_budget=1.0 must be a number from 2 to 8"),
        (
            ["--bits_budget", "3", "--bits", "4"],
            "bits_budget=3 chooses the widths of all layers, and bits='4' names one",
        ),
        (
            ["--bits_budget", "3", "--init_method", "lattice"],
            "bits_budget=3.0 rounds weights, and init_method='lattice'",
        ),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "tune"])
def test_mistakes_end_in_one_line(command, arguments, message, flags, tmp_path, capsys):
    assert main([command, *flags, *arguments, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()
