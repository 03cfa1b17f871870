# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The whole recipe on a tiny model: every stage, killed at any point, refusals, the plan."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import yaml

import trl_ext.almost
from peft_ext import command_line
from peft_ext.rows import read_rows
from tests.tiny.folders import save_long_model
from trl_ext.almost.data.self_play import self_play
from trl_ext.almost.pipeline import FILES, Pipeline
from trl_ext.almost.plan import plan
from trl_ext.almost.recipe import STAGES, AlmostConfig, check_recipe, load_recipe, override
from trl_ext.almost.writing.loading import backend_of
from trl_ext.scripts import almost
from trl_ext.scripts.almost_queries import QueriesArguments


TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "max_length": 256,
}
# A model of random weights writes rubbish, so that the filters have to let rubbish through.
RECIPE = {
    "seed": 1,
    "batch_size": 4,
    "chat_format": "plain",
    "queries": {"count": 12, "shots": 1, "max_new_tokens": 12, "min_chars": 0, "rouge_threshold": 1.0},
    "rlsf_queries": {"count": 4},
    "responses": {
        "max_new_tokens": 8,
        "generators": [{"prompt": "hhh", "shots": 1}, {"prompt": "hhh", "shots": 0}, {"shots": 0, "bits": 2}],
    },
    "comparisons": {"heuristic_filter": False, "length_aware": False, "heldout_share": 0.2},
    "reward_model": TRAINING,
    "self_play": {"count": 6, "samples": 2, "max_turns": 2, "shots": 0, "max_new_tokens": 8, "user_max_new_tokens": 6},
    "sft": {**TRAINING, "use_peft": True, "lora_target_modules": "all-linear"},
    "rlsf": {
        **{name: value for name, value in TRAINING.items() if name != "max_length"},
        "num_generations": 2,
        "max_completion_length": 6,
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_long_model(tmp_path_factory.mktemp("almost") / "base"))


def recipe(base, run_dir, **changes):
    return AlmostConfig(**{**RECIPE, "model_name_or_path": base, "run_dir": str(run_dir), **changes})


def test_a_device_is_every_stage_s(base, tmp_path):
    config = recipe(base, tmp_path / "run", device="cpu", sft={**RECIPE["sft"], "device": "cuda:7"})
    assert {stage: config.block(stage)["device"] for stage in STAGES} == {
        **dict.fromkeys(STAGES, "cpu"),
        "sft": "cuda:7",
    }
    assert "device" not in Pipeline(recipe(base, tmp_path / "run", device="cpu")).settings("queries"), "a run may move"
    with pytest.raises(ValueError, match="sft: device='cuda:7' can't be used here"):
        check_recipe(config)


def test_a_chat_template_that_self_play_will_want_is_missed_before_anything_runs(base, tmp_path):
    own = {"samples": 2, "prompt": "own"}
    pipeline = Pipeline(recipe(base, tmp_path / "run", skip=["evaluation"], chat_format="auto", self_play=own))
    with pytest.raises(ValueError, match="self_play: prompt='own' needs a chat template, and the model has none"):
        pipeline.run()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="self_play: chat_format='plain': prompt='own'"):
        Pipeline(recipe(base, tmp_path / "run", self_play=own))


def test_all_stages(base, tmp_path):
    pipeline = Pipeline(recipe(base, tmp_path / "run", skip=["evaluation"], launcher="inline"))
    assert [line.status for line in plan(pipeline)] == ["to do"] * 9 and not (tmp_path / "run").exists()
    counts = pipeline.run()
    assert list(counts) == [stage for stage in STAGES if stage != "evaluation"]
    for stage in counts:
        assert all((tmp_path / "run" / name).exists() for name in FILES[stage].outputs)
    assert counts["queries"]["accepted"] == 12 and counts["responses"]["responses"] == 36
    queries, others = (
        {row["query"] for row in read_rows(tmp_path / "run" / name)}
        for name in ("queries.jsonl", "rlsf_queries.jsonl")
    )
    assert len(queries) == 12 and not queries & others
    assert (
        counts["reward_model"]["pairs"] + counts["reward_model_2"]["pairs"]
        == counts["comparisons"]["comparisons.jsonl"]
    )
    assert counts["self_play"]["conversations"] + counts["self_play"]["without an answer"] == 6
    assert counts["rlsf"]["steps"] == 2
    again = Pipeline(recipe(base, tmp_path / "run", skip=["evaluation"], launcher="inline"))
    assert {line.status for line in plan(again)} == {"done"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert again.run() == json.loads(json.dumps(counts))
    del before[tmp_path / "run" / ".lock"]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_training_stage_is_its_script(base, tmp_path, monkeypatch):
    pipeline = Pipeline(recipe(base, tmp_path / "run", until="reward_model"))
    calls = []

    class Ended:
        returncode = 3

    monkeypatch.setattr(
        "trl_ext.almost.pipeline.subprocess.run", lambda command, **kwargs: calls.append(command) or Ended
    )
    with pytest.raises(ChildProcessError, match="stage 'reward_model' ended with status 3.*goes on from here"):
        pipeline.run()
    (command,) = calls
    assert command[1:3] == ["-m", "trl_ext.scripts.almost_reward"]
    block = yaml.safe_load(open(command[-1], encoding="utf-8"))
    assert block["dataset_name"] == str(tmp_path / "run" / "comparisons.jsonl") and block["half"] == 1
    assert not pipeline.is_done("reward_model") and pipeline.is_done("comparisons")


def data_stages(base, run_dir):
    """All stages that write texts; rewards are lengths."""
    responses = {**RECIPE["responses"], "generators": RECIPE["responses"]["generators"][:2]}
    pipeline = Pipeline(recipe(base, run_dir, until="comparisons", responses=responses))
    pipeline.run()
    config = pipeline.config.data_config("self_play")
    path = pipeline.run_files.path("demonstrations.jsonl")
    reward = lambda prompts, responses: [float(len(response)) for response in responses]  # noqa: E731
    self_play(backend_of(config), config, read_rows(pipeline.run_files.path("queries.jsonl")), path, reward)


def killed_after(count, work):
    """Run in a process that kills itself in the middle of a write, once it has written so many bytes; True if it did."""
    child = os.fork()
    if child == 0:
        try:
            left, write = [count], os.write

            def counted(handle, data):
                if len(data) >= left[0]:
                    write(handle, data[: left[0]])
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= len(data)
                return write(handle, data)

            os.write = counted
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_ten_random_points(base, tmp_path, capfd):
    data_stages(base, tmp_path / "whole")
    names = ["queries.rounds.jsonl", "queries.jsonl", "rlsf_queries.jsonl", "responses.jsonl", "comparisons.jsonl"]
    names += ["comparisons.heldout.jsonl", "demonstrations.jsonl"]
    total = sum((tmp_path / "whole" / name).stat().st_size for name in names if "comparisons" not in name)
    points = random.Random(0)
    for _ in range(10):  # about half of what is left each time, so that no try gets to the end
        torn = sum(path.stat().st_size for path in (tmp_path / "torn").glob("*.jsonl"))
        assert killed_after(
            points.randint(1, max(1, (total - torn) // 3)), lambda: data_stages(base, tmp_path / "torn")
        )
    data_stages(base, tmp_path / "torn")
    for name in names:
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        rows = read_rows(tmp_path / "torn" / name)
        assert len({row["id"] for row in rows}) == len(rows)


def test_another_config_is_refused_before_anything_runs(base, tmp_path):
    Pipeline(recipe(base, tmp_path / "run", until="queries")).run()
    changed = {**RECIPE["queries"], "shots": 2}
    with pytest.raises(ValueError, match=r"queries.shots: was 1, is 2(.|\n)*run_dir='.*run-2'"):
        Pipeline(recipe(base, tmp_path / "run", queries=changed))
    # what later stages are to do may still change
    Pipeline(recipe(base, tmp_path / "run", comparisons={"heldout_share": 0.3}))


def test_another_base_is_refused_also_where_its_path_begins_as_the_runs(base, tmp_path):
    """The fault: paths were compared as texts, so that `run-base` was taken for something in `run`."""
    shutil.copytree(base, tmp_path / "run-base")
    Pipeline(recipe(str(tmp_path / "run-base"), tmp_path / "run", until="queries")).run()
    with pytest.raises(ValueError, match=r"queries.model_name_or_path: was .*run-base\", is .*base"):
        Pipeline(recipe(base, tmp_path / "run"))
    pipeline = Pipeline(recipe(base, tmp_path / "other"))
    assert "model_name_or_path" in pipeline.settings("sft") and "model_name_or_path" not in pipeline.settings("rlsf")


def test_what_a_finished_stage_wrote_is_compared(base, tmp_path):
    Pipeline(recipe(base, tmp_path / "run", until="queries")).run()
    path = tmp_path / "run" / "queries.jsonl"
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines[:3]))
    with pytest.raises(
        ValueError, match="stage 'queries' .* is done, but what it wrote has changed since: queries.jsonl"
    ):
        Pipeline(recipe(base, tmp_path / "run", until="rlsf_queries")).run()
    path.write_text("".join(lines))
    Pipeline(recipe(base, tmp_path / "run", until="rlsf_queries")).run()


def test_two_processes_do_not_share_a_run(base, tmp_path):
    from filelock import FileLock

    pipeline = Pipeline(recipe(base, tmp_path / "run", until="queries"))
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match="another process works on this run"):
        pipeline.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": {"counts": 3}}, "queries: 'counts' is no setting"),
        ({"queries": {"count": 0}}, "queries: count=0"),
        ({"queries": {"dtype": "float8x"}}, "queries: dtype='float8x' is no float type"),
        ({"self_play": {"reward_dtype": "int8"}}, "self_play: reward_dtype='int8' is no float type"),
        ({"responses": {"generators": ["shots=1"]}}, "at least two ranks"),
        ({"sft": {"learning_rat": 1}}, "sft: .*learning_rat"),
        ({"rlsf": {"trainer": "ppo"}}, "rlsf: trainer='ppo'"),
        ({"reward_model": {"max_steps": "many"}}, "reward_model: .*max_steps"),
        ({"evaluation": {"judges": 1}}, "evaluation: 'judges' is no setting"),
        ({"evaluation": {"tasks": ["other"]}}, "tasks: 'other'"),
    ],
)
def test_a_wrong_block_is_found_before_anything_runs(base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(recipe(base, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "evaluation: data_dir is missing.*--set evaluation.data_dir=FOLDER, or --skip evaluation"),
        ({"data_dir": "/nowhere"}, "evaluation: data_dir='/nowhere' has no hhh/test.jsonl"),
        ({"tasks": ["win_rate"], "questions": "/no.jsonl"}, "evaluation: questions='/no.jsonl'"),
    ],
)
def test_missing_evaluation_data_is_found_before_anything_runs(base, tmp_path, block, message):
    pipeline = Pipeline(recipe(base, tmp_path / "run", evaluation=block))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipeline.run()
    assert not (tmp_path / "run" / "queries.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": ["queries"]}, "skip='queries'"),
        ({"skip": ["sft"]}, "skip both"),
        ({"until": "tomorrow"}, "until='tomorrow'"),
        ({"sft": [1]}, "sft=.* must be a mapping"),
    ],
)
def test_wrong_top_level_values(base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(base, tmp_path, **changes)


def test_blocks_inherit(tmp_path):
    config = AlmostConfig(run_dir=str(tmp_path), seed=5, queries={"shots": 3}, rlsf_queries={"count": 7})
    assert config.data_config("rlsf_queries").shots == 3 and config.data_config("rlsf_queries").count == 7
    assert config.data_config("queries").seed == 5 and config.data_config("rlsf_queries").seed == 6
    assert config.block("reward_model")["half"] == 1 and config.block("reward_model_2")["half"] == 2
    assert AlmostConfig(run_dir="r", skip=["reward_model_2"]).block("reward_model")["half"] == 0
    assert AlmostConfig(run_dir="r", skip=["rlsf_queries"]).stages[-2:] == ["sft", "evaluation"]
    changed = override(config, ["queries.shots=4", "batch_size=2", "queries.temperature=1e-1"])
    assert changed.data_config("queries").shots == 4 and changed.batch_size == 2
    assert changed.data_config("queries").temperature == 0.1
    for bad in ("queries=3", "shots", "nothing.count=1", "batch_size.x=1"):
        with pytest.raises(ValueError, match="must look like queries.count=100"):
            override(config, [bad])
    check_recipe(changed)


def test_settings_parse_the_same_once_flags_were_parsed(tmp_path):
    """transformers' parser puts classes in place of the names of a dataclass's types."""
    command_line.parse(["--output_file", "q.jsonl"], QueriesArguments)
    config = AlmostConfig(run_dir=str(tmp_path), queries={"temperature": "1e-1"})
    assert config.data_config("queries").temperature == 0.1


def test_a_recipe_and_a_run_of_before_say_ladder(base, tmp_path):
    """`ladder` is what `generators` were called; run directories and recipes keep that name."""
    path, generators = tmp_path / "recipe.yaml", RECIPE["responses"]["generators"]
    old = {**RECIPE["responses"], "ladder": generators}
    del old["generators"]
    path.write_text(yaml.safe_dump({**RECIPE, "model_name_or_path": base, "responses": old}))
    config = load_recipe(str(path), run_dir=str(tmp_path / "run"))
    assert config.data_config("responses").generators == generators
    assert override(config, ["responses.ladder=[a, b]"]).data_config("responses").generators == ["a", "b"]
    pipeline = Pipeline(config)
    settings = pipeline.settings("responses")
    pipeline.run_files.begin("responses", {"ladder": settings.pop("generators"), **settings})
    assert Pipeline(config).run_files.begin("responses", pipeline.settings("responses")), "the same settings"
    with pytest.raises(ValueError, match="responses.generators: was"):
        Pipeline(override(config, ["responses.generators=[shots=1, shots=0]"]))


def test_the_library_stands_without_its_scripts():
    files = Path(trl_ext.almost.__file__).parent.rglob("*.py")
    assert not [
        path for path in files if re.search(r"(from|import) trl_ext.scripts", path.read_text(encoding="utf-8"))
    ]


def test_the_script(base, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "model_name_or_path": base}))
    flags = ["--config", str(path), "--run_dir", str(tmp_path / "run"), "--until", "queries"]
    almost.main([*flags, "--dry_run"])
    shown = capsys.readouterr().out
    assert "| queries | to do | 12 |" in shown and "responses" not in shown and not (tmp_path / "run").exists()
    almost.main([*flags, "--set", "queries.count=5"])
    assert "queries: generated" in capsys.readouterr().out and len(read_rows(tmp_path / "run" / "queries.jsonl")) == 5
    assert load_recipe(str(path), ["queries.count=5"], run_dir="x").queries["count"] == 5
    with pytest.raises(ValueError, match="run_dir is missing"):
        almost.main(["--config", str(path)])
    path.write_text("nonsense: 1")
    with pytest.raises(ValueError, match="'nonsense'"):
        load_recipe(str(path), run_dir="x")
    with pytest.raises(FileNotFoundError):
        load_recipe(str(tmp_path / "none.yaml"), run_dir="x")
