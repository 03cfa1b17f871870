# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Whole studies on tiny models: every method, resuming, failures, two workers, the report."""

from __future__ import annotations

import json

import pytest
import yaml
from safetensors.numpy import load_file

from peft_ext import cli
from peft_ext.ood import metrics
from peft_ext.ood.study import results, runner
from peft_ext.ood.study.answers import quantisation_answer, size_answer, tuning_answer
from peft_ext.ood.study.grid import read_config
from peft_ext.ood.study.manifest import Manifest
from peft_ext.ood.study.methods import METHODS
from peft_ext.ood.study.report import grouped, make_tables, write_report
from peft_ext.ood.study.results import CellResult


def main(arguments):
    return cli.main(["ood", *arguments])


TRAINING = {"epochs": 1, "batch_size": 16, "calibration_examples": 8}


@pytest.fixture
def write(tmp_path, data_dir, bert_folder):
    """Writes a study's YAML file, and reads it."""

    def made(**changes):
        values = {
            "output_dir": str(tmp_path / "out"),
            "data_dir": data_dir,
            "models": [{"name": "tiny", "path": bert_folder}],
            "sets": ["clinc150_oos"],
            "methods": ["linear", "lora"],
            "budgets": [0.03],
            "seeds": [0],
            "training": TRAINING,
            "resamples": 20,
            **changes,
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
        return read_config(tmp_path / "study.yaml")

    return made


def _run(config, **kwargs):
    return runner.run(config, wait=0.05, log=lambda line: None, **kwargs)


def _statuses(config) -> dict[str, str]:
    events = Manifest(config.output_dir).last()
    return {f"{cell.method}-{cell.seed}": events[cell.id]["status"] for cell in config.cells() if cell.id in events}


def test_every_method_and_the_report(write, tmp_path):
    config = write(methods=list(METHODS), sets=["clinc150_oos", {"name": "clinc150_near", "ratio": 0.5}])
    assert _run(config) == {"done": 18, "failed": 0, "skipped": 0}
    for cell in config.cells():
        result = results.result_of(config, cell)
        scores = load_file(results.scores_path(config, cell))
        for name, measured in result["detectors"].items():
            inside, outside = scores[f"{name}.id"], scores[f"{name}.outside"]
            assert measured["auroc"] == pytest.approx(metrics.auroc(inside, outside))
            assert measured["auroc_interval"][0] <= measured["auroc"] <= measured["auroc_interval"][1]
        assert set(result["detectors"]) == {
            "msp", "energy", "mahalanobis", "relative_mahalanobis", "cosine", "knn", "vim", "mahalanobis_cosine",
        }  # fmt: skip
        assert result["examples"]["test"] == (36 if cell.setting.name == "clinc150_oos" else 18)
    report = write_report(config)
    text, page = report.read_text(), report.with_suffix(".html").read_text()
    for method in METHODS.values():
        assert method.title in text and method.title in page
    assert "18 of 18 cells" in text and "None." in text and "Ranks of the methods" in text
    plots = sorted(path.name for path in (tmp_path / "out" / "plots").iterdir())
    assert plots == sorted(
        f"{kind}_{s}.png" for kind in ("roc", "scores", "sizes") for s in ("clinc150_near", "clinc150_oos")
    )
    assert all(f"plots/{name}" in text and f"plots/{name}" in page for name in plots)
    assert _run(config) == {"done": 0, "failed": 0, "skipped": 0}, "finished cells were run again"
    for cell in config.cells():
        if cell.setting.name == "clinc150_near":
            results.scores_path(config, cell).unlink()
    text = write_report(config).read_text()
    assert "roc_clinc150_oos.png" in text and "sizes_clinc150_near.png" in text and "roc_clinc150_near" not in text


def test_one_size_under_several_budgets_is_drawn_against_the_budget(write, tmp_path):
    config = write(budgets=[0.05, 0.1], methods=["linear", "lora"], detectors=["msp"])
    assert _run(config) == {"done": 3, "failed": 0, "skipped": 0}
    text = write_report(config).read_text()
    name = config.cells()[0].setting.name
    assert f"plots/budgets_{name}.png" in text and f"plots/sizes_{name}.png" not in text
    assert (tmp_path / "out" / "plots" / f"budgets_{name}.png").is_file()


def test_a_failing_cell_stops_no_other(write, tmp_path, monkeypatch):
    config = write(
        models=[{"name": "missing", "path": str(tmp_path / "nowhere")}, *write().models], detectors=["msp", "knn"]
    )
    assert _run(config) == {"done": 2, "failed": 2, "skipped": 0}
    text = write_report(config).read_text()
    assert "**failed**" in text and "FileNotFoundError" in text and "2 of 4 cells" in text
    assert _run(config) == {"done": 0, "failed": 0, "skipped": 0}
    assert _run(config, retry=True) == {"done": 0, "failed": 2, "skipped": 0}


def test_a_method_that_is_not_possible_is_a_stated_skip(write):
    config = write(budgets=[0.00001], methods=["lora", "linear"])
    assert _run(config) == {"done": 1, "failed": 0, "skipped": 1}
    assert "**skipped**" in (text := write_report(config).read_text()) and "no size near a budget" in text


def test_states_of_several_layers(write):
    """Detectors of features are measured on them beside, under a name of their own, and the cell stays the one it was."""
    config = write(methods=["linear"], detectors=["msp", "mahalanobis_cosine"], layers=[-2])
    assert [cell.id for cell in config.cells()] == [cell.id for cell in write(methods=["linear"]).cells()]
    assert _run(config) == {"done": 1, "failed": 0, "skipped": 0}
    result = results.result_of(config, config.cells()[0])
    assert set(result["detectors"]) == {"msp", "mahalanobis_cosine", "mahalanobis_cosine_layers"} and result[
        "layers"
    ] == [1]
    scores = load_file(results.scores_path(config, config.cells()[0]))
    assert (scores["mahalanobis_cosine.id"] != scores["mahalanobis_cosine_layers.id"]).any()


def test_the_contrastive_term(write):
    """It changes what is learned and names another cell; its options name none where it isn't used."""
    plain, same = write(methods=["lora"]), write(methods=["lora"], training={**TRAINING, "together": 2})
    config = write(methods=["lora"], training={**TRAINING, "contrastive": 1.0, "together": 2})
    ids = [study.cells()[0].id for study in (plain, same, config)]
    assert ids[0] == ids[1] != ids[2]
    for study in (plain, config):
        assert _run(study) == {"done": 1, "failed": 0, "skipped": 0}
    found = [results.result_of(study, study.cells()[0])["detectors"] for study in (plain, config)]
    assert found[0]["cosine"]["auroc"] != found[1]["cosine"]["auroc"]
    with pytest.raises(ValueError, match="together=17.*batch size, 16"):
        write(training={**TRAINING, "together": 17})


def test_a_detector_that_fails_is_shown_as_failed(write):
    config = write(methods=["linear"], detectors=["msp", {"name": "knn", "k": 1000}])
    assert _run(config) == {"done": 1, "failed": 0, "skipped": 0}
    text = write_report(config).read_text()
    assert "| failed |" in text and "k=1000 neighbours of 60" in text


def test_the_first_seed_chooses_the_learning_rate(write):
    training = {**TRAINING, "epochs": 2, "learning_rates": {"lora": [1e-7, 1e-2]}, "head_learning_rate": 1e-4}
    config = write(methods=["lora"], seeds=[3, 4], training=training)
    assert _run(config) == {"done": 2, "failed": 0, "skipped": 0}
    first, second = (results.result_of(config, cell) for cell in config.cells())
    assert set(first["searched"]) == {"1e-07", "0.01"} and len(second["searched"]) == 1
    assert (
        first["learning_rate"] == second["learning_rate"] == float(max(first["searched"], key=first["searched"].get))
    )
    assert first["validation_accuracy"] == max(first["searched"].values())


def test_seeds_wait_for_a_search_that_another_works_on(write):
    config = write(methods=["lora"], seeds=[3, 4], training={**TRAINING, "learning_rates": {"lora": [1e-3, 1e-2]}})
    first, second = config.cells()
    claim = Manifest(config.output_dir).claim([first.id])
    assert runner._claim(config, Manifest(config.output_dir), {c.id: c for c in config.cells()}, set()) is None
    claim.finish("failed", reason="killed")
    assert _run(config) == {"done": 0, "failed": 0, "skipped": 1}
    assert "has no result" in Manifest(config.output_dir).last()[second.id]["reason"]


def test_results_do_not_depend_on_the_order_or_the_worker(write, tmp_path, run_module):
    """Two processes at once: every cell once, with the numbers that one process gives."""
    config = write(methods=["linear", "lora", "bottleneck"], seeds=[0, 1], detectors=["msp", "mahalanobis"])
    run_module("peft_ext.ood", "run", "--config", tmp_path / "study.yaml", processes=2)
    events = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert len([event for event in events if event["status"] == "done"]) == 6 == len(config.cells())
    cell = next(cell for cell in config.cells() if cell.method == "lora")
    parallel = results.result_of(config, cell)
    alone = write(methods=["lora"], detectors=["msp", "mahalanobis"], output_dir=str(tmp_path / "alone"))
    assert _run(alone)["done"] == 1
    single = results.result_of(alone, alone.cells()[0])
    assert single["cell"] == parallel["cell"] and single["id_accuracy"] == parallel["id_accuracy"]
    assert single["detectors"]["mahalanobis"]["auroc"] == pytest.approx(
        parallel["detectors"]["mahalanobis"]["auroc"], abs=0.01
    )


def test_a_launchers_processes_train_a_cell_together(write, tmp_path, run_module):
    config = write(methods=["linear", "full"], detectors=["msp", "mahalanobis"])
    out = run_module("peft_ext.ood", "run", "--config", tmp_path / "study.yaml", processes=2, ranks=True)
    assert out.count("2 done, 0 failed, 0 skipped") == 1
    events = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert len(events) == 4 and len({event["process"] for event in events}) == 1
    alone = write(methods=["linear"], detectors=["msp", "mahalanobis"], output_dir=str(tmp_path / "alone"))
    assert _run(alone)["done"] == 1
    one, two = (results.result_of(c, c.cells()[0]) for c in (alone, config))
    assert one["examples"] == two["examples"] and one["id_accuracy"] == two["id_accuracy"]
    assert one["detectors"]["mahalanobis"]["auroc"] == pytest.approx(
        two["detectors"]["mahalanobis"]["auroc"], abs=0.01
    )


def test_features_are_kept_if_asked(write):
    config = write(methods=["linear"], keep_features=True)
    _run(config)
    folder = results.scores_path(config, config.cells()[0]).parent
    tensors = load_file(folder / results.FEATURES)
    assert tensors["train.features"].shape == (60, 32) and tensors["outside.logits"].shape == (6, 6)


def test_the_command_line(write, tmp_path, run_module, capsys):
    write(methods=["linear"], detectors=["msp"])
    arguments = ("--config", str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "elsewhere"))
    out = run_module("peft_ext.ood", "run", *arguments)
    assert "1 done, 0 failed, 0 skipped" in out and (tmp_path / "elsewhere" / "report.md").is_file()
    assert main(["report", *arguments]) == 0 and "report.md" in capsys.readouterr().out
    assert main(["run", "--config", str(tmp_path / "nothing.yaml")]) == 2
    error = capsys.readouterr().err
    assert "error: config=" in error and "no such file" in error and "Traceback" not in error
    assert main(["run", *arguments, "--data_dir", str(tmp_path / "typo")]) == 2
    assert "typo' is no folder" in capsys.readouterr().err


def test_the_command_line_tells_of_failed_cells(write, tmp_path, capsys):
    write(models=[{"name": "missing", "path": str(tmp_path / "nowhere")}], methods=["linear"], detectors=["msp"])
    arguments = ["run", "--config", str(tmp_path / "study.yaml")]
    for _ in range(2):  # the second call runs nothing; the study is as incomplete as before
        assert main(arguments) == 1
        assert "1 cell of the study failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"sets": ["clinc"]}, ValueError, "set 'clinc' is unknown.*clinc150_oos"),
        ({"methods": ["adapter"]}, ValueError, "method 'adapter' is unknown.*bottleneck"),
        ({"detectors": ["odin"]}, ValueError, "detector 'odin' is unknown.*knn"),
        ({"training": {"epoch": 3}}, ValueError, "training: 'epoch' is unknown.*epochs"),
        ({"training": {"learning_rates": {"adapter": [1]}}}, ValueError, "method 'adapter' is unknown"),
        ({"models": [{"folder": "x"}]}, ValueError, "model: 'folder' is unknown.*path"),
        ({"models": [{"path": "x", "pooling": "max"}]}, ValueError, "pooling='max'"),
        ({"seeds": []}, ValueError, "seeds=.* must be a list with at least one"),
        ({"grids": [{"seed": [1]}]}, ValueError, "grid 1: 'seed' is unknown"),
        ({"grids": [{}, {"training": {"epoch": 3}}]}, ValueError, "grid 2: training: 'epoch' is unknown.*epochs"),
        ({"model": ["x"]}, ValueError, "'model' is unknown"),
        ({"output_dir": ""}, ValueError, "no output_dir"),
    ],
)
def test_bad_files(changes, error, match, write):
    with pytest.raises(error, match=match):
        write(**changes)


def test_grids_run_in_order_and_each_cell_once(write):
    config = write(grids=[{"seeds": [5]}, {"methods": ["linear"], "seeds": [5, 6]}, {"sets": ["snips_leave_2_out"]}])
    found = [(cell.setting.name, cell.method, cell.seed) for cell in config.cells()]
    assert found == [
        ("clinc150_oos", "linear", 5), ("clinc150_oos", "lora", 5), ("clinc150_oos", "linear", 6),
        ("snips_leave_2_out", "linear", 0), ("snips_leave_2_out", "lora", 0),
    ]  # fmt: skip
    changed = write(grids=[{"seeds": [5]}], training={**TRAINING, "epochs": 2})
    assert not {cell.id for cell in changed.cells()} & {cell.id for cell in config.cells()}


def test_a_grid_trains_in_its_own_way(write):
    rates = {"lora": [1e-3]}
    config = write(grids=[{"seeds": [5]}, {"seeds": [5, 6], "training": {"epochs": 2, "learning_rates": rates}}])
    found = [(cell.seed, cell.training.epochs, cell.training.batch_size) for cell in config.cells()]
    assert found == [(5, 1, 16)] * 2 + [(5, 2, 16)] * 2 + [(6, 2, 16)] * 2
    assert [dict(cell.training.learning_rates) for cell in config.cells()] == [{}] * 2 + [rates] * 4
    assert "At most 1 or 2 epochs" in make_tables(config, [])[0].text
    assert [len(group) for group in grouped([CellResult(cell, {}) for cell in config.cells()])] == [1, 1, 2, 2]


def test_a_search_stays_within_its_grid(write):
    """The first seed searches anew where training differs."""
    rates = {"lora": [1e-3, 1e-2]}
    config = write(
        methods=["lora"],
        seeds=[3, 4],
        training={**TRAINING, "learning_rates": rates},
        grids=[{}, {"training": {"epochs": 2}}],
    )
    first, second, third, fourth = config.cells()
    assert config.searching_cell(first) is config.searching_cell(third) is None
    assert config.searching_cell(second) == first and config.searching_cell(fourth) == third


def test_answers_from_known_numbers(write):
    """Larger is better by 0.1 in every pair; LoRA is below full fine-tuning by 0.02 in every pair."""
    config = write(
        models=[{"name": "small", "path": "a"}, {"name": "large", "path": "b"}], methods=["full", "lora"], seeds=[0, 1]
    )
    finished = []
    for cell in config.cells():
        value = 0.8 + 0.1 * (cell.model.name == "large") - 0.02 * (cell.method == "lora") + 0.01 * cell.seed
        result = {
            "backbone_parameters": 2_000 if cell.model.name == "large" else 1_000,
            "parameters": 10, "size": None, "size_name": "", "learning_rate": 0.1, "validation_accuracy": 0.9,
            "id_accuracy": 0.9, "examples": {"train": 1}, "detectors": {"mahalanobis": {"auroc": value, "fpr95": 0.1}},
        }  # fmt: skip
        finished.append(CellResult(cell, result))
    sentence, rows = size_answer(finished)
    assert sentence.startswith("Yes") and rows[0][0] == "small to large"
    assert rows[0][1] == pytest.approx((0.1, 0.1, 0.1)) and rows[0][2] == 4
    elsewhere = write(models=[{"name": "huge", "path": "c"}], sets=["snips_leave_2_out"]).cells()[0]
    alone = CellResult(elsewhere, {**finished[0].result, "backbone_parameters": 5_000})
    assert size_answer([*finished, alone]) == (sentence, rows), "a model without peers in its sets was compared"
    sentence, rows = tuning_answer(finished)
    assert "Worse than full fine-tuning: LoRA" in sentence
    assert rows[0][1] == pytest.approx((-0.02, -0.02, -0.02)) and rows[0][2] == 4
    tables = {table.title: table for table in make_tables(config, finished)}
    assert tables["clinc150_oos: AUROC"].rows[0][:3] == ["small", "Full fine-tuning", ""]
    assert tables["clinc150_oos: AUROC"].rows[0][5] == "80.5 ± 0.7"
    ranks = {row[0]: row[3] for row in tables["Ranks of the methods"].rows}
    assert ranks == {"Full fine-tuning": "1.0", "LoRA": "2.0"}
    assert quantisation_answer(finished) == ("There is no method to compare with LoRA yet.", [])
    assert size_answer(finished[:1])[1] == [] and "no two models" in size_answer(finished[:1])[0]


def test_quantising_is_measured_against_lora_of_the_same_budget(write):
    """PEQA is 0.01 below LoRA at the small budget, 0.03 at the large one, where both are 0.1 better."""
    config = write(methods=["full", "lora", "peqa_4bit"], budgets=[0.001, 0.01], seeds=[0, 1])
    finished = []
    for cell in config.cells():
        value = 0.8 + 0.1 * (cell.budget == 0.01)
        if cell.method == "peqa_4bit":
            value -= 0.01 if cell.budget == 0.001 else 0.03
        finished.append(CellResult(cell, {"backbone_parameters": 1, "detectors": {"mahalanobis": {"auroc": value}}}))
    sentence, rows = quantisation_answer(finished)
    assert sentence == "Worse than LoRA: PEQA, 4 bits (detector mahalanobis)." and len(rows) == 1
    assert rows[0][1] == pytest.approx((-0.02, -0.02, -0.02)) and rows[0][2] == 2
