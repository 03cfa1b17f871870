# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Writes the files of `tests/earlier/files`, a kind of saved folder or run directory after the other, from tiny models.

They stand for what users have on their disks, so they are not written anew when the code changes: what stands there was
written by commit c25e62e. A later version, which has a format of its own to keep, writes a folder of its own:

    PYTHONPATH=<checkout of that version> python -m tests.earlier.write tests/earlier/<folder>

Each `write_<kind>` works in the current folder, and `read_<kind>` gives back numbers and texts of what was written;
`expected.json` holds what it gave when the files were new, `test_earlier_files.py` asks again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from generation_ext.critic import rollout_files
from generation_ext.critic.value import Critic
from generation_ext.granularity.modeling import CDNPGForConditionalGeneration
from generation_ext.in_context.self_generated import SelfGeneratedICL
from generation_ext.probing.features import FeatureExtractor
from generation_ext.probing.palp import PALPClassifier
from generation_ext.prompts import SST2
from peft_ext import AlphaTuningConfig, BottleneckConfig, PeqaConfig, calibrate
from peft_ext.cli import main as peft_ext_main
from peft_ext.ood.classifier import PooledClassifier
from peft_ext.ood.pipeline import OODPipeline
from tests.tiny.tokenizers import byte_tokenizer
from trl_ext.almost.rewards import RewardModel
from trl_ext.scripts import almost, almost_reward


IDS = torch.tensor([[5, 17, 40, 8, 90, 3, 77, 4]])
GOOD, BAD = ["fine film", "great fun", "a joy", "so fine"], ["bad film", "poor bore", "a waste", "so poor"]
TEXTS = ["what a joy", "so so", "a bad bore"]


# ---- models and adapters


def write_base() -> None:
    """The language model under all others, and texts."""
    byte_tokenizer().save_pretrained("base")
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(byte_tokenizer()),
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=byte_tokenizer().eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained("base")
    Path("text.txt").write_text("".join(f"line {i} of {i * i % 97} words\n" for i in range(60)), encoding="utf-8")


def read_base() -> Any:
    return _logits(_base())


def write_peqa() -> None:
    """A calibrated packed base (compressed-tensors), and an adapter on it."""
    config = PeqaConfig(bits=3, init_method="calibrated", task_type="CAUSAL_LM")
    _write_tuned(calibrate(_base(), config, [{"input_ids": torch.arange(96).view(4, 24)}], progressbar=False), config)


def read_peqa() -> Any:
    return _read_tuned("peqa")


def write_peqa_on_floats() -> None:
    """An adapter whose integers are made anew from the float base."""
    model = get_peft_model(_base(), PeqaConfig(bits=4, group_size=8, task_type="CAUSAL_LM", init_weights=False))
    model.save_pretrained("peqa_on_floats")


def read_peqa_on_floats() -> Any:
    return _logits(PeftModel.from_pretrained(_base(), "peqa_on_floats"))


def write_alphatuning() -> None:
    """A base in binary coding (bcq), and an adapter of its first alphas."""
    config = AlphaTuningConfig(bits=2, group_size=8, init_method="greedy", task_type="CAUSAL_LM")
    _write_tuned(_base(), config)


def read_alphatuning() -> Any:
    return _read_tuned("alphatuning")


def write_bcq_of_integers() -> None:
    """Integers that compressed-tensors has no room for: GPT-2's `Conv1D`."""
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=100, initializer_range=0.2)
    model = get_peft_model(GPT2LMHeadModel(config), PeqaConfig(bits=4, task_type="CAUSAL_LM"))
    model.unload().save_pretrained("bcq_of_integers")


def read_bcq_of_integers() -> Any:
    return _logits(AutoModelForCausalLM.from_pretrained("bcq_of_integers"))


def write_bottleneck() -> None:
    config = BottleneckConfig(bottleneck_dim=2, task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(_base(), config).save_pretrained("bottleneck")


def read_bottleneck() -> Any:
    return _logits(PeftModel.from_pretrained(_base(), "bottleneck"))


def write_tune() -> None:
    """A finished run of `peft-ext tune`."""
    assert _tune() == 0
    Path("tune", "loss.png").unlink()


def read_tune() -> Any:
    _said(lambda: _tune(), "is finished already")
    flags = ["--data", "text.txt", "--block_size", "16", "--blocks", "4", "--output", "evaluated.json"]
    assert peft_ext_main(["eval", "tune", *flags]) == 0
    return json.loads(Path("evaluated.json").read_text(encoding="utf-8"))["perplexity"]


def _tune() -> int:
    flags = {"model": "base", "data": "text.txt", "output_dir": "tune", "bits": 3, "max_steps": 2, "block_size": 16}
    flags |= {"held_out_blocks": 4, "calibration_blocks": 4, "use_cpu": True, "disable_tqdm": True}
    return peft_ext_main(["tune", *_flags(flags)])


# ---- CriticControl


def write_critic() -> None:
    """A critic with a LoRA of its own."""
    paper = {"layer": -1, "running_mean": False}  # as versions before 28 had it
    critic = Critic.for_model(_base(), **paper, lora_rank=2, action_values=True, action_rank=2)
    for parameter in critic.parameters():
        parameter.data.normal_(std=0.3)
    critic.save_pretrained("critic")


def read_critic() -> Any:
    return _values("critic")


def write_critic_run() -> None:
    """A finished run of `peft-ext critic train`."""
    Path("prompts.txt").write_text("a b\nthe cat\nonce upon\nb a c\n", encoding="utf-8")
    reward = "def vowels(completions, **columns):\n    return [min(len(text), 9) / 9 for text in completions]\n"
    Path("judge.py").write_text(reward, encoding="utf-8")
    assert _train_critic() == 0


def read_critic_run() -> Any:
    _said(_train_critic, "is finished already")
    rollouts = rollout_files.read_rollouts("critic_run/rollouts")
    return {
        "rollouts": len(rollouts),
        "rewards": [rollout.reward for rollout in rollouts],
        **_values("critic_run/critic"),
    }


def _train_critic() -> int:
    flags = {"model": "base", "prompts": "prompts.txt", "reward": "judge.py:vowels", "output_dir": "critic_run"}
    flags |= {"num_iterations": 1, "rollouts_per_iteration": 4, "rollout_batch_size": 4, "eval_rollouts": 4}
    flags |= {"max_new_tokens": 4, "per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True}
    return peft_ext_main(["critic", "train", *_flags(flags)])


@torch.no_grad()
def _values(folder: str) -> dict[str, Any]:
    model = _base()
    critic = Critic.from_pretrained(folder).attach(model)
    with critic.adapted(model):
        hidden = model.model(IDS).last_hidden_state
    return {"values": critic.value(hidden).flatten().tolist()}


# ---- PALP, label scoring


def write_palp() -> None:
    """A classifier that `peft-ext probe train` has saved."""
    rows = [{"text": text, "label": label} for texts, label in ((GOOD, "good"), (BAD, "bad")) for text in texts]
    _write_rows("labelled.jsonl", rows)
    _write_rows("unlabelled.jsonl", [{"text": text} for text in TEXTS])
    flags = {"model": "base", "data": "labelled.jsonl", "template": "Review: {text} Sentiment:", "output_dir": "palp"}
    assert peft_ext_main(["probe", "train", *_flags({**flags, "demonstrations": "per-class"})]) == 0


def read_palp() -> Any:
    assert (
        peft_ext_main(["probe", "predict", "palp", "--data", "unlabelled.jsonl", "--output", "predicted.jsonl"]) == 0
    )
    rows = [json.loads(line) for line in Path("predicted.jsonl").read_text(encoding="utf-8").split("\n") if line]
    return {"classifier": PALPClassifier.from_pretrained("palp").predict_proba(TEXTS).tolist(), "command": rows}


def write_features() -> None:
    _extract()


def read_features() -> Any:
    return _extract()[:, :4].tolist()


def _extract() -> Any:
    return FeatureExtractor(_base(), _tokenizer()).extract(TEXTS, "Review: ", output="features.npy")


def write_pools() -> None:
    _score()


def read_pools() -> Any:
    before = Path("pools.jsonl").read_bytes()
    found = _score()
    assert Path("pools.jsonl").read_bytes() == before, "pools were generated anew"
    return found


def _score() -> Any:
    scorer = SelfGeneratedICL(_base(), _tokenizer(), SST2, samples=2, shots=2)
    return scorer.score(TEXTS, "pools.jsonl").probabilities().tolist()


# ---- granularity


def write_granularity() -> None:
    """A finished run of `peft-ext paraphrase train`."""
    nouns, verbs = ("song", "cake", "house", "trick"), ("learn", "make", "find", "sell")
    pairs = [
        {"source": f"how do i {verb} a {noun}?", "target": f"what is the way to {verb} a {noun}?"}
        for verb in verbs
        for noun in nouns
    ]
    _write_rows("pairs.jsonl", pairs)
    assert _train_paraphraser() == 0


def read_granularity() -> Any:
    _said(_train_paraphraser, "is finished already")
    command = ["paraphrase", "granularity", "--texts", "how do i make a cake?", "--num_beams", "1"]
    said = _said(lambda: peft_ext_main(["paraphrase", *command]), "")
    model = CDNPGForConditionalGeneration.from_pretrained("granularity/model").eval()
    with torch.no_grad():
        logits = model(input_ids=IDS % 40, decoder_input_ids=IDS[:, :3] % 40).logits
    return {"paraphrase": said, "logits": logits[0, -1, :8].tolist()}


def _train_paraphraser() -> int:
    flags = {"data": "pairs.jsonl", "output_dir": "granularity", "hidden_size": 8, "heads": 2, "layers": 1}
    flags |= {"ffn_size": 16, "vocab_size": 80, "batch_size": 4, "max_steps": 2, "eval_steps": 2, "warmup_steps": 1}
    return peft_ext_main(["paraphrase", "train", *_flags(flags)])


# ---- out-of-distribution detection


def write_ood_pipeline() -> None:
    _pipeline(PooledClassifier.from_backbone("base", 2)).save_pretrained("ood_pipeline")


def read_ood_pipeline() -> Any:
    return OODPipeline.from_pretrained("ood_pipeline")(TEXTS)


def write_ood_adapter() -> None:
    """A pipeline of which the adapter alone was saved."""
    lora = LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)
    _pipeline(get_peft_model(PooledClassifier.from_backbone("base", 2), lora)).save_pretrained("ood_adapter")


def read_ood_adapter() -> Any:
    return OODPipeline.from_pretrained("ood_adapter")(TEXTS)


def _pipeline(model: Any) -> OODPipeline:
    model.config.pad_token_id = 0
    labels = [0] * len(GOOD) + [1] * len(BAD)
    return OODPipeline.fit(
        model, _tokenizer(), GOOD + BAD, labels, ["fine fun", "a poor film"], label_names=["a", "b"]
    )


def write_ood_study() -> None:
    """A study of two cells, one of them done and one that was not possible."""
    for split in ("train", "validation", "test"):
        rows = [{"text": text, "label": label} for texts, label in ((GOOD, "good"), (BAD, "bad")) for text in texts]
        _write_rows(f"sets/clinc150/{split}.jsonl", [*rows, *({"text": text, "label": "oos"} for text in TEXTS)])
    study = {
        "output_dir": "ood_study",
        "data_dir": "sets",
        "models": [{"name": "tiny", "path": "base"}],
        "sets": ["clinc150_oos"],
        "methods": ["linear", "lora"],
        "budgets": [1e-5],
        "seeds": [0],
        "training": {"epochs": 1, "batch_size": 4},
        "resamples": 5,
    }
    Path("study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    assert peft_ext_main(["ood", "run", "--config", "study.yaml"]) == 0
    for name in ("report.html", "plots", "locks"):
        path = Path("ood_study", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_ood_study() -> Any:
    _said(lambda: peft_ext_main(["ood", "run", "--config", "study.yaml"]), "0 done, 0 failed, 0 skipped")
    (result,) = Path("ood_study", "cells").glob("*/result.json")
    report = Path("ood_study", "report.md").read_text(encoding="utf-8")
    assert "1 of 2 cells" in report
    return json.loads(result.read_text(encoding="utf-8"))["detectors"]["mahalanobis"]["auroc"]


# ---- ALMoST


def write_almost() -> None:
    """A run of two finished stages, killed in the middle of the third."""
    recipe = {
        "seed": 1,
        "batch_size": 4,
        "chat_format": "plain",
        "model_name_or_path": "base",
        "queries": {"count": 6, "shots": 1, "max_new_tokens": 12, "min_chars": 0, "rouge_threshold": 1.0},
        "rlsf_queries": {"count": 3},
        "responses": {"max_new_tokens": 8, "ladder": [{"prompt": "hhh", "shots": 1}, {"prompt": "hhh", "shots": 0}]},
        "evaluation": {"data_dir": "none"},
    }
    Path("almost.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    _almost("queries")
    _killed_after(1200, lambda: _almost("responses"))
    Path("almost", ".lock").unlink(missing_ok=True)


def read_almost() -> Any:
    finished = [Path("almost", name) for name in ("queries.jsonl", "rlsf_queries.jsonl")]
    before = [path.read_bytes() for path in finished]
    old = Path("almost", "responses.jsonl").read_bytes().split(b"\n")[:-1]
    _almost("responses")
    assert [path.read_bytes() for path in finished] == before, "a finished stage ran again"
    rows = Path("almost", "responses.jsonl").read_bytes().split(b"\n")[:-1]
    assert set(old) <= set(rows), "rows of the killed run were made anew"
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in Path("almost", "manifest").glob("*.json")]
    return {"kept": len(old), "rows": len(rows), "done": sorted(one["stage"] for one in manifests if one["done"])}


def _almost(until: str) -> None:
    almost.main(["--config", "almost.yaml", "--run_dir", "almost", "--until", until])


def write_reward_model() -> None:
    """A finished training of ALMoST's first stage that trains."""
    pairs = [
        {
            "id": number,
            "prompt": [{"role": "user", "content": f"q {number}"}],
            "chosen": [{"role": "assistant", "content": "aaaa aa a."}],
            "rejected": [{"role": "assistant", "content": "zz z"}],
        }
        for number in range(4)
    ]
    _write_rows("comparisons.jsonl", pairs)
    _train_reward_model()


def read_reward_model() -> Any:
    before = Path("reward_model", "model.safetensors").read_bytes()
    _train_reward_model()
    assert Path("reward_model", "model.safetensors").read_bytes() == before, "a finished training ran again"
    return RewardModel.from_pretrained("reward_model", device="cpu").score(["q 1", "q 2"], ["aa a", "zz"])


def _train_reward_model() -> None:
    flags = {"model_name_or_path": "base", "dataset_name": "comparisons.jsonl", "output_dir": "reward_model"}
    flags |= {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": False, "disable_tqdm": True}
    almost_reward.main(_flags({**flags, "dataloader_pin_memory": False, "use_cpu": True}))


# ---- what they share


def _base() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained("base").eval()


def _tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def _logits(model: torch.nn.Module) -> list[float]:
    return model.eval()(IDS).logits[0, -1, :8].tolist()


def _write_tuned(model: Any, config: Any) -> None:
    folder = config.peft_type.value.lower()
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "_delta" in name:
            parameter.data.normal_(std=0.1)
    tuned.save_pretrained(f"{folder}/adapter")
    tuned.unload().save_pretrained(f"{folder}/base")


def _read_tuned(folder: str) -> dict[str, list[float]]:
    base, tuned = (AutoModelForCausalLM.from_pretrained(f"{folder}/base") for _ in range(2))
    return {"base": _logits(base), "tuned": _logits(PeftModel.from_pretrained(tuned, f"{folder}/adapter"))}


def _write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _flags(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def _said(command: Callable[[], Any], words: str) -> str:
    """What a command prints, once it has ended well and said something."""
    out, notes = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(notes):
        code = command()
    said = out.getvalue() + notes.getvalue()
    assert not code and words in said, said
    return out.getvalue()


def _killed_after(count: int, work: Callable[[], Any]) -> None:
    """Run in a process that is killed in the middle of a write, once it has written so many bytes."""
    child = os.fork()
    if child == 0:
        left, write = [count], os.write

        def counted(handle: int, data: bytes) -> int:
            if len(data) >= left[0]:
                write(handle, data[: left[0]])
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= len(data)
            return write(handle, data)

        os.write = counted  # type: ignore[assignment]
        work()
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it came to its end"


KINDS = [name.removeprefix("read_") for name in list(globals()) if name.startswith("read_")]
READERS: dict[str, Callable[[], Any]] = {kind: globals()[f"read_{kind}"] for kind in KINDS}


def main(folder: str) -> None:
    """Write all kinds into a new folder, and what they give into its `expected.json`."""
    root = Path(folder).resolve()
    root.mkdir()
    os.chdir(root)
    torch.set_num_threads(1)
    for kind in KINDS:
        torch.manual_seed(0)
        globals()[f"write_{kind}"]()
    shutil.copytree(root, root.with_name(f"{root.name}.copy"))
    os.chdir(root.with_name(f"{root.name}.copy"))
    expected = {kind: read() for kind, read in READERS.items()}
    os.chdir(root)
    shutil.rmtree(root.with_name(f"{root.name}.copy"))
    for path in list(root.rglob("*")):
        if path.name == "README.md":  # PEFT's and TRL's, which nothing reads
            path.unlink()
        elif path.suffix in (".json", ".yaml", ".jsonl", ".md"):  # no other machine has that folder
            text = path.read_text(encoding="utf-8")
            if str(root) in text:
                path.write_text(text.replace(f"{root}/", ""), encoding="utf-8")
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
