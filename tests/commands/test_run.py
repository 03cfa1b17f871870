# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext run`: programs, modules and files find our methods, and so do the processes that they start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from peft_ext.cli import main
from peft_ext.commands.run import STARTUP
from tests.conftest import ROOT


# Of the process that runs it, and of one that it starts: whether our methods are there.
REPORT = """
import subprocess, sys
import peft
from peft import PeftType

print(sys.argv[1:], "PEQA" in PeftType.__members__, flush=True)
if sys.argv[1:2] == ["start"]:
    sys.exit(subprocess.run([sys.executable, sys.argv[2], "started"]).returncode)
sys.exit(int(sys.argv[2]) if sys.argv[2:] else None)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "report.py"
    path.write_text(REPORT)
    return path


def environment(**more):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def python(*arguments, **more):
    """A fresh interpreter, which has imported nothing."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment(**more)
    )


def run(*arguments):
    return main(["run", *map(str, arguments)])


def state():
    return list(sys.argv), list(sys.path), os.environ.get("PYTHONPATH")


@pytest.mark.parametrize("dashes", [[], ["--"]])
def test_a_file_and_its_status(script, capfd, dashes):
    before = state()
    assert run(*dashes, script, "a", "3") == 3
    assert capfd.readouterr().out == "['a', '3'] True\n"
    assert state() == before


def test_a_module(script, capfd, monkeypatch):
    monkeypatch.chdir(script.parent)
    before = state()
    assert run("--", "-m", "report", "--flag") == 0
    assert capfd.readouterr().out == "['--flag'] True\n"
    assert state() == before


def test_a_program_of_the_environment(capfd):
    with_status = run("--", "transformers", "--help")
    assert with_status == 0 and "serve" in capfd.readouterr().out


def test_what_is_no_python_runs_too_and_so_do_processes_that_it_starts(script, capfd):
    assert run("sh", "-c", f"{sys.executable} {script} of-a-shell; exit 5") == 5
    assert capfd.readouterr().out == "['of-a-shell'] True\n"
    assert run("sh", "-c", "kill -9 $$") == 128 + 9


@pytest.mark.slow
def test_a_fresh_process_and_what_it_starts(script):
    alone = python(script, "start", script)
    assert alone.stdout == "['start', " + repr(str(script)) + "] False\n['started'] False\n"
    done = python("-m", "peft_ext.cli", "run", "--", script, "start", script)
    assert done.stdout == "['start', " + repr(str(script)) + "] True\n['started'] True\n", done.stderr


# What transformers, PEFT, compressed-tensors and we are to each other, without what they cost.
STAND_INS = {
    "transformers": "import sys\nNAME = 'the library'\nsys.runs = getattr(sys, 'runs', 0) + 1",
    "peft": "import sys, transformers\nMEMBERS = []\nsys.runs = getattr(sys, 'runs', 0) + 1",
    "compressed_tensors": "from transformers import NAME",
    "peft_ext": "import peft, transformers\nfrom compressed_tensors import NAME\npeft.MEMBERS.append('PEQA')",
}


@pytest.fixture
def stand_ins(tmp_path):
    for name, source in STAND_INS.items():
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(source + "\n")
    return tmp_path / "packages"


def started(code, *paths):
    """What a process prints whose PYTHONPATH begins with our folder."""
    paths = os.pathsep.join(map(str, [STARTUP, *paths]))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": paths}, cwd=STARTUP)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_nothing_is_imported_before_it_is_needed(stand_ins):
    code = (
        "import sys; print('peft_ext' in sys.modules)\n"
        "import transformers; print('peft_ext' in sys.modules, transformers.NAME, transformers.__spec__.origin)\n"
        "print(sys.modules['transformers'] is transformers, type(transformers.__loader__).__name__)"
    )
    first, second, third = started(code, stand_ins)
    assert first == "False"
    assert second == f"True the library {stand_ins / 'transformers' / '__init__.py'}"
    assert third == "True SourceFileLoader"


@pytest.mark.parametrize("name", ["transformers", "peft", "compressed_tensors", "peft_ext", "peft, transformers"])
def test_whatever_is_imported_first(name, stand_ins):
    code = (
        f"import {name}; import compressed_tensors, peft, sys; print(peft.MEMBERS, compressed_tensors.NAME, sys.runs)"
    )
    assert started(code, stand_ins) == ["['PEQA'] the library 2"]


def test_a_package_that_we_import_late(stand_ins):
    (stand_ins / "peft_ext" / "__init__.py").write_text("import peft\npeft.MEMBERS.append('PEQA')\n")
    code = "import compressed_tensors, peft; print(peft.MEMBERS, compressed_tensors.NAME)"
    assert started(code, stand_ins) == ["['PEQA'] the library"]


def test_an_environment_without_us_is_left_alone(stand_ins):
    (stand_ins / "peft_ext" / "__init__.py").unlink()
    (stand_ins / "peft_ext").rmdir()
    # which this one isn't
    code = (
        "import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)]\n"
        "import peft, transformers; print(peft.MEMBERS, transformers.NAME)"
    )
    assert started(code, stand_ins) == ["[] the library"]


def test_another_sitecustomize_still_runs(stand_ins, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('theirs')\nvalue = 3\n")
    code = "import sys, sitecustomize, peft; print(sitecustomize.value, peft.MEMBERS)"
    assert started(code, stand_ins, tmp_path) == ["theirs", "3 ['PEQA']"]


@pytest.mark.slow
def test_workers_that_are_spawned(tmp_path):
    script = tmp_path / "spawning.py"
    script.write_text(
        "import multiprocessing\n"
        "def member(_):\n"
        "    import peft\n"
        "    return 'PEQA' in peft.PeftType.__members__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(member, [0]))\n"
    )
    assert python("-m", "peft_ext.cli", "run", script).stdout == "[True]\n"


@pytest.mark.slow
def test_accelerate_launch(script):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = python(*launch, "-m", "peft_ext.cli", "run", "--", script, "launched")
    assert done.stdout == "['launched'] True\n", done.stderr


def test_the_program_s_own_error_keeps_its_traceback(tmp_path, capfd):
    script = tmp_path / "fails.py"
    script.write_text("def inner():\n    raise ValueError('of the program')\n\ninner()\n")
    assert run(script) == 1
    error = capfd.readouterr().err
    assert "ValueError: of the program" in error and "in inner" in error
    script.write_text("raise SystemExit('a message')\n")
    assert run(script) == 1
    assert capfd.readouterr().err == "a message\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "no-such-tool"], "there is no program 'no-such-tool'"),
        (["transformer"], "Did you mean transformers"),
        (["-m", "no_such_module.at_all"], "-m no_such_module.at_all: there is no such module"),
        (["-m", "json"], "-m json: the package has no __main__"),
        (["--flag", "tool"], "unknown flag '--flag'"),
        ([], "nothing to run"),
        (["--"], "nothing to run"),
        (["-m"], "nothing to run"),
    ],
)
def test_what_cannot_be_run(arguments, message, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("peft-ext run: error: ") and message in error.splitlines()[0]


def test_a_program_of_another_python(tmp_path, capsys, monkeypatch):
    other = tmp_path / "bin"
    other.mkdir()
    (other / "their_tool").write_text("#!/opt/other/bin/python3\nprint('ran')\n")
    (other / "their_tool").chmod(0o755)
    monkeypatch.setenv("PATH", str(other), prepend=os.pathsep)
    assert run("their_tool") == 2
    assert "is installed for another Python (/opt/other/bin/python3)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_harness_knows_our_model():
    pytest.importorskip("lm_eval")
    code = (
        "from lm_eval.api.registry import get_model; import lm_eval.models; print(lm_eval.models.__loader__.__class__.__name__);"
        "print(get_model('peft_ext').__name__, get_model('hf').__name__)"
    )
    done = python("-c", code, PYTHONPATH=os.pathsep.join([str(STARTUP), str(ROOT)]))
    assert done.stdout.splitlines() == ["SourceFileLoader", "SharedPrefixLM HFLM"], done.stderr
