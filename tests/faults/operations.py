# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The long pieces of work that `kills.py` kills, on tiny models: saves over an older version, and runs that go on."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tqdm import tqdm

from generation_ext.critic import Critic
from generation_ext.granularity import CDNPGForConditionalGeneration
from generation_ext.probing import FeatureExtractor
from peft_ext import AlphaTuningConfig, PeqaConfig, cli
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.ood.study import runner
from peft_ext.ood.study.grid import read_config
from tests.almost.training.trained import FLAGS, write_run
from tests.cases import move_adapter
from tests.faults import saved
from tests.faults.kills import Operation
from tests.generation_ext.critic.test_commands import REWARD
from tests.generation_ext.granularity.test_commands import PAIRS, SMALL
from tests.ood.conftest import LABELS, write_corpus
from tests.tiny.byte_models import model as byte_model
from tests.tiny.folders import save_tiny_model, save_word_model
from tests.tiny.models import tiny
from tests.tiny.tokenizers import tokenizer_for
from trl_ext.scripts import almost_reward, almost_rlsf, almost_sft


# All of them, so that nothing has to be made to know them.
NAMES = (
    "packed base over another format",
    "shards over one file",
    "adapter",
    "OOD pipeline",
    "detector",
    "PALP classifier",
    "critic",
    "C-DNPG model",
    "tune (peqa)",
    "tune (alphatuning)",
    "quantize",
    "critic with its roll-outs",
    "paraphrase model",
    "OOD study",
    "ALMoST: reward model",
    "ALMoST: reward model (PEQA)",
    "ALMoST: SFT (LoRA)",
    "ALMoST: RLSF",
    "ALMoST: texts",
    "features",
    "SG-ICL's demonstrations",
)


def operations(room: Path) -> dict[str, Operation]:
    """Those of `NAMES`; models and data that they share are written into `room`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a tokenizer's training breaks ties at random on several threads
    os.environ["RAYON_NUM_THREADS"] = "1"
    tqdm.monitor_interval = 0  # a thread of the process that forks, whose locks would stay locked in a fork
    shared = room / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    saved.set_room(shared)
    saves = {name: _within(operation) for name, operation in _saves().items()}
    found = {**saves, **_runs(shared), **_almost(shared), **_texts()}
    return {name: found[name] for name in NAMES}


# ---- saves over an older version


def _within(operation: Operation) -> Operation:
    """On a folder in the folder that is watched, since what is written lies beside its target."""

    def inside(function: Any) -> Any:
        def of_saved(folder: Path) -> Any:
            folder.mkdir(parents=True, exist_ok=True)
            return function(folder / "saved")

        return function and of_saved

    return Operation(*map(inside, operation[:3]), operation.skip)


def _saves() -> dict[str, Operation]:
    return {
        "packed base over another format": Operation(
            _base(PeqaConfig(bits=4, group_size=8), None), _base(AlphaTuningConfig(bits=2), "bcq"), _use("bcq base")
        ),
        "shards over one file": Operation(
            _base(PeqaConfig(bits=4, group_size=8), None, max_shard_size="20KB"),
            _base(PeqaConfig(bits=3), None),
            _use("bcq base"),
        ),
        "adapter": Operation(_adapter(0.1), _adapter(0.5), _use("PEQA adapter")),
        "OOD pipeline": _over("OOD pipeline", 0, 1),
        "detector": _over("detector", 0, 1),
        "PALP classifier": _over("PALP", 0, 1),
        "critic": Operation(_again("critic", Critic), saved.KINDS["critic"][0].build, saved.KINDS["critic"][0].use),
        "C-DNPG model": Operation(
            _again("granularity", CDNPGForConditionalGeneration),
            saved.KINDS["granularity"][0].build,
            saved.KINDS["granularity"][0].use,
        ),
    }


def _use(kind: str) -> Callable[[Path], np.ndarray]:
    return saved.KINDS[kind][0].use


def _over(kind: str, old: int, new: int) -> Operation:
    variants = saved.KINDS[kind]
    return Operation(variants[new].build, variants[old].build, variants[new].use)


def _base(config: Any, checkpoint_format: Any, **options: Any) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        config.task_type = "CAUSAL_LM"
        model = get_peft_model(tiny("llama"), copy.deepcopy(config)).unload()
        make_saveable(model, checkpoint_format)
        model.save_pretrained(folder, **options)

    return work


def _adapter(strength: float) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        model = get_peft_model(copy.deepcopy(saved._loaded("peqa")), copy.deepcopy(saved.PEQA))
        move_adapter(model, strength=strength)
        model.save_pretrained(folder)

    return work


def _again(kind: str, model: Any) -> Callable[[Path], None]:
    """Loads what is there and saves it with other numbers; always the same ones, however often it is started."""

    def work(folder: Path) -> None:
        whole = folder.parent.with_name(f"{kind} as it was")
        if not whole.exists():
            saved.KINDS[kind][0].build(whole)
        changed = model.from_pretrained(whole)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(1.5)
        changed.save_pretrained(folder)

    return work


# ---- runs that go on


def _runs(shared: Path) -> dict[str, Operation]:
    save_tiny_model(shared / "bytes")
    (shared / "prompts.txt").write_text("a b\nthe cat\n\nonce upon\nb a c\nhm\n", encoding="utf-8")
    (shared / "judge.py").write_text(REWARD, encoding="utf-8")
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in PAIRS)
    (shared / "pairs.jsonl").write_text(lines, encoding="utf-8")
    small = ["--block_size", "32", "--held_out_blocks", "4", "--calibration_blocks", "8", "--use_cpu", "True"]
    tune = [*small, "--max_steps", "4", "--save_steps", "1", "--disable_tqdm", "True", "--bits", "3"]
    model = ["--model", str(shared / "bytes")]
    critic = {
        "prompts": shared / "prompts.txt", "reward": f"{shared / 'judge.py'}:vowels", "num_iterations": 2,
        "rollouts_per_iteration": 8, "epochs_per_iteration": 2, "rollout_batch_size": 4, "eval_rollouts": 4,
        "max_new_tokens": 4, "per_device_train_batch_size": 4, "save_steps": 2, "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    flags = [str(part) for name, value in critic.items() for part in (f"--{name}", value)]
    paraphrase = ["--data", str(shared / "pairs.jsonl"), "--max_steps", "4", "--eval_steps", "1", *SMALL]
    done = ("config.yaml",)
    return {
        **{
            f"tune ({method})": Operation(
                _command("tune", *model, *tune, "--method", method),
                use=_numbers_in("adapter/adapter_model.safetensors"),
                skip=("config.yaml", "metrics.json", "adapter_model.safetensors"),
                tolerance=1e-5,  # a checkpoint holds the scales themselves, of which the trained numbers are a function
            )
            for method in ("peqa", "alphatuning")
        },
        "quantize": Operation(_once(_command("quantize", *model, *small[:-2], "--bits", "4")), skip=done),
        "critic with its roll-outs": Operation(
            _command("critic", "train", *model, *flags),
            use=_numbers_in("critic/model.safetensors"),
            skip=("config.yaml", "metrics.json", "critic/config.json", "model.safetensors", "000.safetensors"),
            tolerance=1e-4,  # hidden states of saved roll-outs are computed in other batches
        ),
        "paraphrase model": Operation(_command("paraphrase", "train", *paraphrase), skip=done),
        "OOD study": Operation(
            _study(shared),
            use=_scores_of_cells,
            skip=("manifest.jsonl", "scores.safetensors"),
            tolerance=1e-5,  # one run of seventy had scores of other last bits, and the same measures
        ),
    }


def _scores_of_cells(folder: Path) -> np.ndarray:
    """The scores of all cells of a study, in the order of their folders."""
    files = [load_file(path) for path in sorted(folder.rglob("scores.safetensors"))]
    return torch.cat([file[name].float().ravel() for file in files for name in sorted(file)]).numpy()


def _numbers_in(*names: str) -> Callable[[Path], np.ndarray]:
    """All tensors of files of a run, in the order of their names."""

    def use(folder: Path) -> np.ndarray:
        files = [load_file(folder / "run" / name) for name in names]
        return torch.cat([file[name].float().ravel() for file in files for name in sorted(file)]).numpy()

    return use


def _command(*arguments: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        status = cli.main([*arguments, "--output_dir", str(folder / "run")])
        if status:
            raise SystemExit(status)

    return work


def _once(work: Callable[[Path], None]) -> Callable[[Path], None]:
    """A command that refuses a folder that is there; which is whole, then."""

    def unless_done(folder: Path) -> None:
        if not (folder / "run").exists():
            work(folder)

    return unless_done


def _study(shared: Path) -> Callable[[Path], None]:
    write_corpus(shared / "data" / "clinc150", LABELS, outside=True)
    (shared / "data" / "clinc150" / "domains.json").write_text(json.dumps({"all": LABELS}))
    backbone = save_word_model("bert", shared / "backbone")

    def work(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "output_dir": str(folder / "out"), "data_dir": str(shared / "data"), "sets": ["clinc150_oos"],
            "models": [{"name": "tiny", "path": backbone}], "methods": ["linear", "lora"], "budgets": [0.03],
            "seeds": [0], "training": {"epochs": 1, "batch_size": 16}, "resamples": 5, "detectors": ["msp", "knn"],
        }  # fmt: skip
        (shared / "study.yaml").write_text(json.dumps(values))
        counts = runner.run(read_config(shared / "study.yaml"), wait=0.05, log=lambda line: None)
        if counts["failed"]:
            raise SystemExit(1)

    return work


# ---- ALMoST


def _almost(shared: Path) -> dict[str, Operation]:
    data = write_run(shared / "almost")
    common = ["--learning_rate", "1e-2", "--max_steps", "3", "--save_steps", "1", *FLAGS]
    policy = ["--model_name_or_path", str(data / "base")]
    pairs = ["--dataset_name", str(data / "comparisons.jsonl")]
    talks = ["--dataset_name", str(data / "demonstrations.jsonl")]
    lora = ["--use_peft", "--lora_target_modules", "all-linear"]

    def stage(script: Any, *flags: str) -> Operation:
        def work(folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            script.main([*policy, *flags, "--output_dir", str(folder / "run"), *common])

        paths = ("settings.json", "adapter_config.json")
        if "--peqa_bits" not in flags:
            return Operation(work, skip=paths)
        # as of `tune`: a checkpoint holds scales
        rounded = ("training.json", "config.json", ".safetensors")
        numbers = _numbers_in("adapter/adapter_model.safetensors")
        return Operation(work, use=numbers, skip=(*paths, *rounded), tolerance=1e-5)

    scorer = data / "scorer"
    if not scorer.exists():
        saved.save_long_model(scorer, scores=True)
    queries = ["--dataset_name", str(data / "rlsf_queries.jsonl"), "--reward_model", str(scorer)]
    short = ["--num_generations", "2", "--max_completion_length", "4"]
    return {
        "ALMoST: reward model": stage(almost_reward, *pairs),
        "ALMoST: reward model (PEQA)": stage(almost_reward, *pairs, "--peqa_bits", "4"),
        "ALMoST: SFT (LoRA)": stage(almost_sft, *talks, *lora),
        "ALMoST: RLSF": stage(almost_rlsf, *queries, *short, *lora),
        "ALMoST: texts": Operation(lambda folder: saved.KINDS["ALMoST run"][0].build(folder), skip=("config.yaml",)),
    }


# ---- texts and features


def _texts() -> dict[str, Operation]:
    return {
        "features": Operation(
            _features,
            use=lambda folder: np.load(folder / "features.npy"),
            skip=(".npy", ".npy.json"),
            tolerance=1e-5,  # what is missing goes through the model in other batches
        ),
        "SG-ICL's demonstrations": Operation(_pools),
    }


def _features(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"a text of number {number} " + "and more " * (number % 5) for number in range(24)]
    extractor = FeatureExtractor(byte_model("llama"), tokenizer_for("llama"), memory_limit=100_000)
    extractor.extract(texts, output=folder / "features.npy")


def _pools(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    saved._sgicl().generate([f"input {number}" for number in range(6)], folder / "pools.jsonl")
