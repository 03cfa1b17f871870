# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks' core: experiments, stored rows, claims, and the one command, on tasks that take no time."""

from __future__ import annotations

import json
import sys
import types

import pytest


pytest.importorskip("torch")

from benchmarks.core import environment, experiments, runner  # noqa: E402
from benchmarks.core.claims import Claim, markdown_table, unless  # noqa: E402
from benchmarks.core.run import NotHere, Run, data_folder  # noqa: E402
from benchmarks.core.task import Task, claims_of_each, tables_of_each  # noqa: E402
from benchmarks.core.worker import fresh_process  # noqa: E402
from peft_ext.command_line import run_main  # noqa: E402


CONFIG = {"steps": 3, "model": "large", "seed": 0, "quick": {"steps": 2}, "smoke": {"steps": 1, "model": "tiny"}}


def _measure(run):
    for step in range(run.steps):
        if run.find({"step": step}) is None:
            if step == run.settings.get("dies_at"):
                raise KeyboardInterrupt
            run.add({"step": step}, {"value": 10.0 * step})


def _claims(run):
    found = run.find({"step": 1})
    return [Claim("value of the second step", found and found["value"], 5.0)]


TASK = Task(
    _measure,
    tables_of_each(
        lambda run: {
            "Steps": markdown_table(["step", "value"], [[r["key"]["step"], r["result"]["value"]] for r in run.rows])
        }
    ),
    claims_of_each(_claims),
)


def _fails(run):
    raise ZeroDivisionError("a bug")


def _not_here(run):
    raise NotHere("no data; set PEFT_EXT_DATA")


def _dies(run):
    import os

    os._exit(9)


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """Experiments and modules of four tasks: one that works, and three that don't."""
    tasks = {"steps": TASK}
    for name, measure in (("fails", _fails), ("not_here", _not_here), ("dies", _dies)):
        tasks[name] = TASK._replace(measure=measure)
    folder = tmp_path / "experiments"
    for name, task in tasks.items():
        module = types.ModuleType(f"toy_{name}")
        module.TASK = task
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for experiment in ("one", "two") if name == "steps" else ("one",):
            (folder / name / experiment).mkdir(parents=True)
            (folder / name / experiment / "config.json").write_text("{}")
        (folder / name / "defaults.json").write_text(json.dumps(CONFIG))
    (folder / "steps" / "two" / "config.json").write_text(json.dumps({"about": "four", "steps": 4, "quick": None}))
    return folder


def _tasks(*names):
    return {name: runner.Entry(f"about {name}", f"toy_{name}") for name in names}


def _main(argv, configs, *names):
    return run_main(lambda rest: runner.main(rest, _tasks(*names), configs), argv, runner.PROGRAM)


def test_sizes_replace_settings(configs):
    assert experiments.settings("steps", "one", folder=configs) == {"steps": 3, "model": "large", "seed": 0}
    assert experiments.settings("steps", "two", folder=configs)["steps"] == 4
    assert experiments.settings("steps", "one", "smoke", configs) == {"steps": 1, "model": "tiny", "seed": 0}
    assert experiments.chosen("steps", (), "full", configs) == ["one", "two"]
    assert experiments.chosen("steps", (), "quick", configs) == ["one"]
    assert experiments.chosen("steps", ("t*",), "quick", configs) == ["two"]
    (configs / "steps" / "one" / "config.json").write_text('{"quick": {"stepz": 1}}')
    with pytest.raises(ValueError, match="'quick' replaces 'stepz', which is no setting"):
        experiments.settings("steps", "one", "quick", configs)


def test_rows_survive_a_kill(tmp_path):
    settings = {"steps": 4, "dies_at": 2}
    with pytest.raises(KeyboardInterrupt):
        _measure(Run("steps", "one", settings, folder=tmp_path))
    run = Run("steps", "one", settings, folder=tmp_path)
    assert [row["key"]["step"] for row in run.rows] == [0, 1]
    dates = [row["date"] for row in run.rows]
    del run.settings["dies_at"]
    _measure(run)
    assert [row["key"]["step"] for row in run.rows] == [0, 1, 2, 3] and [row["date"] for row in run.rows[:2]] == dates


def test_the_environment_is_stored_once(tmp_path):
    for experiment in ("one", "two"):
        _measure(Run("steps", experiment, {"steps": 3}, folder=tmp_path))
    (name,) = json.loads((tmp_path / environment.FILE).read_text())
    rows = [row for path in (tmp_path / "steps").glob("*.json") for row in json.loads(path.read_text())["rows"]]
    assert len(rows) == 6 and {row["environment"] for row in rows} == {name}
    assert "commit" in Run("steps", "one", {"steps": 3}, folder=tmp_path).described


def test_other_settings_are_refused_at_full_size(tmp_path):
    _measure(Run("steps", "one", {"steps": 3}, folder=tmp_path))
    with pytest.raises(ValueError, match=r"one.json was measured under other settings \(steps: was 3, is 4\)"):
        Run("steps", "one", {"steps": 4}, folder=tmp_path)
    assert Run("steps", "one", {"steps": 4}, "quick", tmp_path).rows == []


def test_a_damaged_file_is_said(tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "one.json").write_text('{"rows": [')
    with pytest.raises(ValueError, match="one.json is damaged"):
        Run("steps", "one", {}, folder=tmp_path)


def test_rows_of_another_source_are_measured_again_at_small_sizes(tmp_path, monkeypatch):
    run = Run("steps", "one", {"steps": 2}, "quick", tmp_path)
    _measure(run)
    run.forget_others()
    assert len(run.rows) == 2
    monkeypatch.setattr(environment, "commit", lambda: "another")
    run.forget_others()
    assert run.rows == []


def test_changed_sources_are_told_from_commits():
    assert environment.is_clean({"commit": "0123456789ab"})
    assert not environment.is_clean({"commit": "0123456789ab+1f2e3d4c"}) and not environment.is_clean(
        {"commit": "unknown"}
    )


def test_dirty_rows_are_told(tmp_path, monkeypatch):
    run = Run("steps", "one", {"steps": 2}, folder=tmp_path)
    monkeypatch.setattr(environment, "commit", lambda: "0123456789ab")
    run.add({"step": 0}, {"value": 1})
    monkeypatch.setattr(environment, "commit", lambda: "0123456789ab+1f2e3d4c")
    run.add({"step": 1}, {"value": 1})
    assert [row["key"] for row in run.dirty] == [{"step": 1}]
    run.forget_dirty()
    assert [row["key"] for row in run.rows] == [{"step": 0}]


def test_the_repository_s_results_come_from_commits(configs, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "commit", lambda: "0123456789ab+1f2e3d4c")
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    assert _main(["steps"], configs, "steps") == 2
    assert "come from commits alone" in capsys.readouterr().err and not (tmp_path / "results").exists()
    assert _main(["steps", "--output_dir", str(tmp_path / "out")], configs, "steps") == 0


def test_names_that_runs_have_are_no_settings(tmp_path):
    with pytest.raises(ValueError, match="no setting can be called 'rows'"):
        Run("steps", "one", {"rows": 1}, folder=tmp_path)


def test_claims():
    claim = Claim("time over LoRA's", 0.634, 1.0)
    assert claim.met and claim.line == "- time over LoRA's: 0.634 (at most 1): met"
    assert Claim("a", 0.634, 1.0, " s", at_least=True).line == "- a: 0.634 s (at least 1 s): **not met**"
    assert Claim("a", None, 1.0).met is None and Claim("a", None, 1.0).line == "- a: not measured (at most 1)"
    assert unless(False, "5 %") == "**5 %**" and unless(True, "5 %") == "5 %"


def test_the_command(configs, tmp_path, capsys):
    arguments = ["steps", "o*", "--output_dir", str(tmp_path / "out")]
    assert _main(arguments, configs, "steps") == 0
    shown = capsys.readouterr().out
    assert (
        "### Steps\n\n| step | value |" in shown
        and "- one: value of the second step: 10 (at most 5): **not met**" in shown
    )
    assert _main([*arguments, "--table"], configs, "steps") == 0
    assert capsys.readouterr().out == shown
    assert _main([*arguments, "--seed", "7"], configs, "steps") == 0
    assert {path.name for path in (tmp_path / "out" / "steps").iterdir()} == {"one.json", "one_seed7.json"}
    capsys.readouterr()
    assert _main([*arguments, "--table", "--json"], configs, "steps") == 0
    assert json.loads(capsys.readouterr().out)["claims"][0]["value"] == 10
    assert _main(["--list"], configs, "steps", "fails") == 0
    assert "steps: about steps\n    one\n    two: four\nfails" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stepz"], "there is no benchmark 'stepz'; did you mean 'steps'?"),
        (["steps", "onne"], "steps has no experiment 'onne'; did you mean 'one'?"),
        (["steps", "--quik"], "there is no flag --quik; did you mean --quick?"),
        (["steps", "--quick", "--smoke"], "--quick and --smoke are two sizes; pass one."),
        (["not_here", "--smoke"], "no data; set PEFT_EXT_DATA"),
    ],
)
def test_mistakes_are_told_in_a_line(configs, tmp_path, capsys, arguments, said):
    assert _main([*arguments, "--output_dir", str(tmp_path / "out")], configs, "steps", "not_here") == 2
    assert capsys.readouterr().err.strip() == f"python -m benchmarks: error: {said}"


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_all_goes_on_after_a_task_that_fails(configs, tmp_path, capfd):
    arguments = ["all", "--quick", "--output_dir", str(tmp_path / "out")]
    assert _main(arguments, configs, "fails", "dies", "not_here", "steps") == 1
    shown = capfd.readouterr().out
    assert "| steps | one: value of the second step | 10 | at most 5 | **not met** |" in shown
    assert "- fails: failed: a bug" in shown and "- dies: its process ended with 9" in shown
    assert "- not_here: not possible here: no data" in shown
    assert (tmp_path / "out" / "claims.md").read_text() == shown
    assert _main(arguments, configs, "not_here", "steps") == 0, "what isn't here is no failure"


def test_workers(tmp_path):
    assert fresh_process("json:loads", {"s": "[1, 2]"}, "reading") == [1, 2]
    with pytest.raises(RuntimeError, match="(?s)reading ended with 1:.*JSONDecodeError"):
        fresh_process("json:loads", {"s": "[1"}, "reading")
    loaded = fresh_process("benchmarks.core.worker:loaded_modules", {}, "listing")
    assert not {"torch", "transformers", "peft_ext"} & set(loaded), "memory is measured from an empty process"


def test_data_that_isnt_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_EXT_DATA", str(tmp_path))
    with pytest.raises(NotHere, match="has no folder 'wikitext2'"):
        data_folder("wikitext2")
    (tmp_path / "wikitext2").mkdir()
    assert data_folder("wikitext2") == tmp_path / "wikitext2"


def test_what_only_the_full_size_has_is_said(configs, tmp_path, capsys, monkeypatch):
    path = configs / "steps" / "two" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quick": None}))
    full = tmp_path / "full"
    assert _main(["steps", "two", "--output_dir", str(full)], configs, "steps") == 0
    before = runner.open_runs
    monkeypatch.setattr(runner, "open_runs", lambda name, names=(), size="full", folder=full, *rest, **more: before(
        name, names, size, folder, *rest, **more))  # fmt: skip
    capsys.readouterr()
    assert _main(["all", "--quick", "--output_dir", str(tmp_path / "out")], configs, "steps") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "two: value" in line]
    assert "| full size only | at most 5 | - |" in line and "not measured" not in line


def test_what_was_made_under_other_settings_is_not_taken(tmp_path, capfd):
    run = Run("steps", "one", {"steps": 2}, folder=tmp_path)
    (run.work / "critic").write_text("of two steps")
    assert (Run("steps", "one", {"steps": 2}, folder=tmp_path).work / "critic").is_file()
    assert not (Run("steps", "one", {"steps": 3}, folder=tmp_path).work / "critic").exists()
    # hours of work, perhaps: at full size they are set aside, and every time
    assert (tmp_path / "steps" / "one.earlier-1.work" / "critic").read_text() == "of two steps"
    assert "settings (steps: was 2, is 3); it is one.earlier-1.work now" in capfd.readouterr().err
    assert Run("steps", "one", {"steps": 2}, folder=tmp_path).work.is_dir()
    assert (tmp_path / "steps" / "one.earlier-2.work").is_dir()
