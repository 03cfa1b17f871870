# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Whole folders of every kind that the packages write or read, and what a user does with each: load it, and use it a little.

`KINDS[kind]` lists the variants of a kind. They share models that are built once; whoever changes one does so in a fork.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from generation_ext.critic import Critic, CriticLogitsProcessor
from generation_ext.critic.rollout_files import RolloutWriter, read_rollouts
from generation_ext.critic.rollouts import Rollout
from generation_ext.critic.run_files import RunFiles
from generation_ext.granularity import (
    CDNPGConfig,
    CDNPGForConditionalGeneration,
    convert_to_granularity_attention,
    load_granularities,
)
from generation_ext.in_context.self_generated import SelfGeneratedICL
from generation_ext.probing import FeatureExtractor, PALPClassifier
from generation_ext.probing.feature_file import FeatureFile
from generation_ext.prompts import SST2
from peft_ext import AdapterPool, AlphaTuningConfig, BottleneckConfig, PeqaConfig, load_packed
from peft_ext.checkpoint.saving import make_saveable, take_over
from peft_ext.ood.classifier import PooledClassifier
from peft_ext.ood.detectors import load_detector, make_detector
from peft_ext.ood.pipeline import OODPipeline
from peft_ext.rows import RowFile, read_rows
from tests.cases import move_adapter
from tests.checkpoint.foreign_files import awq_layer, compressed_tensors_layer, random_layer, save_foreign
from tests.checkpoint.gptq_files import gptq_layer
from tests.tiny.byte_models import model as byte_model
from tests.tiny.folders import save_long_model, save_word_model
from tests.tiny.models import inputs, logits_of, tiny
from tests.tiny.tokenizers import tiny_tokenizer, tokenizer_for
from trl_ext.almost.pipeline import Pipeline
from trl_ext.almost.recipe import AlmostConfig


Answer = np.ndarray


class Saved(NamedTuple):
    """A folder of one kind.

    Attributes:
        build: Writes a whole one.
        use: Loads it and gives what a use of it gives, as numbers.
        skip: Parts of names of files that others own.
        foreign: Written by other tools: it carries no digest.
    """

    build: Callable[[Path], None]
    use: Callable[[Path], Answer]
    skip: tuple[str, ...] = ("README", "generation_config")
    foreign: bool = False


# Shared models lie here; `set_room` says where.
_ROOM: list[Path] = []


def set_room(folder: Path) -> None:
    """Where models that several kinds share are kept."""
    _ROOM[:] = [folder]


def _logits(model: nn.Module, name: str = "llama") -> Answer:
    with torch.no_grad():
        return logits_of(model.eval(), inputs(name)).float().numpy().ravel()


# ---- packed bases and adapters

PEQA = PeqaConfig(bits=4, group_size=8, task_type="CAUSAL_LM")
SYM = PeqaConfig(bits=3, sym=True, task_type="CAUSAL_LM")
ALPHA = AlphaTuningConfig(bits=2, task_type="CAUSAL_LM")
BASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "peqa": (PEQA, {}, {}),
    "sym": (SYM, {}, {}),
    "sharded": (PEQA, {}, {"max_shard_size": "20KB"}),
    "alpha": (ALPHA, {}, {}),
    "uniform": (PEQA, {"checkpoint_format": "bcq"}, {"max_shard_size": "20KB"}),
    "ends": (dataclasses.replace(PEQA, embedding_bits=8), {}, {}),
}


@functools.cache
def _base(name: str) -> Path:
    config, options, saving = BASES[name]
    model = get_peft_model(tiny("llama"), copy.deepcopy(config)).unload()
    make_saveable(model, *options.values())
    model.save_pretrained(_ROOM[0] / name, **saving)
    return _ROOM[0] / name


@functools.cache
def _loaded(name: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(_base(name))


def _copied(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copytree(_base(name), folder) and None


def _use_base(folder: Path) -> Answer:
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    take_over(model)
    return _logits(model)


def _write_adapter(name: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        model = get_peft_model(copy.deepcopy(_loaded(name)), copy.deepcopy(BASES[name][0]))
        move_adapter(model)
        model.save_pretrained(folder)

    return build


def _use_adapter(name: str) -> Callable[[Path], Answer]:
    return lambda folder: _logits(PeftModel.from_pretrained(copy.deepcopy(_loaded(name)), str(folder)))


def _use_pool(name: str) -> Callable[[Path], Answer]:
    def use(folder: Path) -> Answer:
        pool = AdapterPool(copy.deepcopy(_loaded(name)))
        pool.load(str(folder), name="a")
        pool.activate("a")
        return _logits(pool.model)

    return use


def _write_bottleneck(**options: Any) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        model = get_peft_model(tiny("llama"), BottleneckConfig(task_type="CAUSAL_LM", **options))
        move_adapter(model, strength=0.3)
        model.save_pretrained(folder)

    return build


def _use_bottleneck(folder: Path) -> Answer:
    return _logits(PeftModel.from_pretrained(tiny("llama"), str(folder)))


# ---- bases of others


def _write_foreign(layer: Callable[..., dict], quantization: dict[str, Any], shards: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        model = tiny("llama", torch.float16)
        generator = torch.Generator().manual_seed(1)
        names = [name for name, part in model.named_modules() if type(part) is nn.Linear and name != "lm_head"]
        stored = {
            name: random_layer(model.get_submodule(name), 4, 16, False, torch.float16, generator) for name in names
        }
        save_foreign(model, {name: layer(each) for name, each in stored.items()}, folder, quantization, shards)

    return build


def _use_packed(folder: Path) -> Answer:
    return _logits(load_packed(str(folder), dtype=torch.float32))


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}
_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS}},
}


def _foreign(layer: Callable[..., dict], quantization: dict[str, Any]) -> list[Saved]:
    return [Saved(_write_foreign(layer, quantization, shards), _use_packed, foreign=True) for shards in (1, 2)]


# ---- detectors


def _write_detector(name: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        generator = np.random.default_rng(0)
        features, logits = generator.normal(size=(60, 8)), generator.normal(size=(60, 3))
        make_detector(name).fit(features, logits, np.arange(60) % 3).save_pretrained(folder)

    return build


def _use_detector(folder: Path) -> Answer:
    generator = np.random.default_rng(1)
    return np.asarray(load_detector(folder).score(generator.normal(size=(5, 8)), generator.normal(size=(5, 3))))


@functools.cache
def _words() -> tuple[list[str], list[int]]:
    random, texts, labels = Random(0), [], []
    for number in range(3):
        for _ in range(8):
            texts.append(" ".join(f"w{3 + 10 * number + random.randrange(10)}" for _ in range(4)))
            labels.append(number)
    return texts, labels


@functools.cache
def _bert() -> str:
    return save_word_model("bert", _ROOM[0] / "bert")


def _write_ood(detector: str, adapter: bool) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = PooledClassifier.from_backbone(_bert(), 3)
            if adapter:
                model = get_peft_model(model, BottleneckConfig(bottleneck_dim=4, task_type="SEQ_CLS"))
                move_adapter(model, strength=0.3)
        texts, labels = _words()
        pipeline = OODPipeline.fit(
            model, tiny_tokenizer(), texts, labels, texts, detector, label_names=["a", "b", "c"]
        )
        pipeline.save_pretrained(folder)

    return build


def _use_ood(folder: Path) -> Answer:
    found = OODPipeline.from_pretrained(str(folder))(_words()[0][::5])
    return np.array([[_number(row["label"]), row["score"], row["in_distribution"]] for row in found]).ravel()


# ---- PALP, SG-ICL, features

_TEXTS = ["fine film", "great fun", "good, good", "a joy", "bad film", "poor bore", "bad, bad", "a waste"]


def _write_palp(head: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options: dict[str, Any] = {"template": "Review: {text}\nSentiment:", "random_state": 0}
            palp = PALPClassifier(
                byte_model("llama"), tokenizer_for("llama"), head=head, demonstrations="per-class", **options
            )
            palp.fit(_TEXTS, ["good"] * 4 + ["bad"] * 4).save_pretrained(folder)

    return build


def _use_palp(folder: Path) -> Answer:
    palp = PALPClassifier.from_pretrained(folder, byte_model("llama"), tokenizer_for("llama"))
    labels = [_number(label) for label in palp.predict(_TEXTS[:3])]
    return np.concatenate([palp.predict_proba(_TEXTS[:3]).ravel(), labels])


@functools.cache
def _sgicl() -> SelfGeneratedICL:
    task = replace(SST2, max_new_tokens=8, min_new_tokens=3)
    return SelfGeneratedICL(byte_model("llama"), tokenizer_for("llama"), task, samples=2, shots=3)


_INPUTS = ["a fine film", "two hours that are gone for good", "so so"]


def _use_pools(folder: Path) -> Answer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(_sgicl().score(_INPUTS, pool_file=folder / "pools.jsonl").scores, dtype=float).ravel()


def _write_pools(folder: Path) -> None:
    folder.mkdir()
    _sgicl().generate(_INPUTS, folder / "pools.jsonl")


@functools.cache
def _extractor() -> FeatureExtractor:
    return FeatureExtractor(byte_model("llama"), tokenizer_for("llama"))


def _write_features(folder: Path) -> None:
    folder.mkdir()
    _extractor().extract(_TEXTS, output=folder / "features.npy")


def _write_half_of_features(folder: Path) -> None:
    """As a kill leaves them."""
    folder.mkdir()
    whole = _extractor().extract(_TEXTS)
    file = FeatureFile(folder / "features.npy", whole.shape, _extractor()._settings(_TEXTS, ""))
    file.features[:4] = whole[:4]
    file.mark([0, 1, 2, 3])


def _use_features(folder: Path) -> Answer:
    return np.asarray(_extractor().extract(_TEXTS, output=folder / "features.npy"), dtype=float).ravel()


# ---- critic


def _write_critic(folder: Path) -> None:
    critic = Critic.for_model(tiny("llama"), layer=1, action_values=True, head="mlp", mlp_size=8, lora_rank=2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        critic.fit_standardisation(torch.randn(50, critic.state_size, generator=generator) * 2 + 1)
    critic.save_pretrained(folder)


@torch.no_grad()
def _use_critic(folder: Path) -> Answer:
    model = tiny("llama")
    critic = Critic.from_pretrained(str(folder)).attach(model)
    with CriticLogitsProcessor(model, critic, strength=4.0) as processor:
        texts = model.generate(**inputs("llama"), max_new_tokens=3, do_sample=False, logits_processor=[processor])
    hidden = torch.randn(5, critic.state_size, generator=torch.Generator().manual_seed(0))
    candidates = torch.arange(6).expand(5, 6)
    return np.concatenate(
        [texts.numpy().ravel(), critic.value(hidden).numpy(), critic.action_logits(hidden, candidates).numpy().ravel()]
    )


def _rollouts() -> list[Rollout]:
    return [
        Rollout(text, text[::-1], [3 + len(text), 4], [5, 6 + place], place / 4, None, {"place": place})
        for place, text in enumerate(["a b", "the cat", "once upon", "b a c"])
    ]


_VALUES = torch.linspace(0.1, 0.9, 12).view(4, 3)


def _write_rollouts(folder: Path) -> None:
    files = RunFiles(folder, 0)
    files.start({"seed": 1, "samples": 4})
    RolloutWriter(folder / "rollouts" / "iteration-0000-000.jsonl").write(_rollouts())
    files.keep_values(0, _VALUES)


def _use_rollouts(folder: Path) -> Answer:
    """As a training that goes on: what is missing is made again."""
    files = RunFiles(folder, 0)
    files.check({"seed": 1, "samples": 4})
    rollouts = files.rollouts(0, 4, 2)
    files.writer(0, len(rollouts))(_rollouts()[len(rollouts) :])
    values = files.kept_values(0, _VALUES.shape)
    return np.concatenate([_rows(files.rollouts(0, 4, 2)), (_VALUES if values is None else values).numpy().ravel()])


def _use_replay(folder: Path) -> Answer:
    """A file of roll-outs is as long as its run came."""
    rollouts = read_rollouts(folder / "rollouts")
    return _rows([*rollouts, *_rollouts()[len(rollouts) :]])


def _rows(rollouts: list[Rollout]) -> Answer:
    names = ("prompt", "completion", "prompt_ids", "completion_ids", "reward", "control_code", "columns")
    return _numbers([[getattr(rollout, name) for name in names] for rollout in rollouts])


# ---- granularity


def _write_cdnpg(folder: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 60, "d_model": 36, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "init_std": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CDNPGForConditionalGeneration(
            CDNPGConfig(**sizes, **layers, granularity_placement="after", granularity_mode="R+S")
        ).save_pretrained(folder)


def _use_cdnpg(folder: Path) -> Answer:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    source, target = torch.arange(3, 27).view(3, 8), torch.arange(30, 48).view(3, 6)
    with torch.no_grad():
        return model(input_ids=source, decoder_input_ids=target).logits.numpy().ravel()


def _write_converted(folder: Path) -> None:
    model = convert_to_granularity_attention(tiny("llama"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".granularity." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)


def _use_converted(folder: Path) -> Answer:
    return _logits(load_granularities(AutoModelForCausalLM.from_pretrained(folder), folder))


# ---- ALMoST

_RECIPE = {
    "seed": 1,
    "batch_size": 4,
    "chat_format": "plain",
    "queries": {"count": 6, "shots": 1, "max_new_tokens": 12, "min_chars": 0, "rouge_threshold": 1.0},
    "rlsf_queries": {"count": 2},
    "responses": {"max_new_tokens": 6, "generators": [{"prompt": "hhh", "shots": 1}, {"prompt": "hhh", "shots": 0}]},
    "comparisons": {"heuristic_filter": False, "length_aware": False, "heldout_share": 0.2},
    "until": "comparisons",
}
_STAGES = ("queries.jsonl", "rlsf_queries.jsonl", "responses.jsonl", "comparisons.jsonl", "comparisons.heldout.jsonl")


@functools.cache
def _long_model() -> str:
    return str(save_long_model(_ROOM[0] / "long"))


def _run_pipeline(folder: Path) -> None:
    Pipeline(AlmostConfig(**{**_RECIPE, "model_name_or_path": _long_model(), "run_dir": str(folder)})).run()


def _write_killed_pipeline(folder: Path) -> None:
    """As a kill within the answers leaves it."""
    _run_pipeline(folder)
    path = folder / "manifest" / "responses.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "done": False, "outputs": {}, "counts": {}}))
    (folder / "manifest" / "comparisons.json").unlink()
    rows = read_rows(folder / "responses.jsonl")
    (folder / "responses.jsonl").unlink()
    RowFile(folder / "responses.jsonl").append(rows[: len(rows) // 2])
    for name in _STAGES[-2:]:
        (folder / name).unlink()


def _use_run(folder: Path) -> Answer:
    """Start it again, and read what it has made as the next stages do."""
    _run_pipeline(folder)
    return _numbers([read_rows(folder / name) for name in _STAGES])


def _number(text: Any) -> float:
    return float(sum(map(ord, str(text))))


def _numbers(value: Any) -> Answer:
    return np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8).astype(float)


# ---- all

_NO_TEXTS = ("README", "generation_config", "tokenizer", "special_tokens")
KINDS: dict[str, list[Saved]] = {
    "PEQA adapter": [Saved(_write_adapter("peqa"), _use_adapter("peqa"))],
    "AlphaTuning adapter": [Saved(_write_adapter("alpha"), _use_adapter("alpha"))],
    "Bottleneck adapter": [
        Saved(_write_bottleneck(bottleneck_dim=4), _use_bottleneck),
        Saved(_write_bottleneck(reduction_factor=8, placement="pfeiffer", non_linearity="gelu"), _use_bottleneck),
    ],
    "adapter in a pool": [Saved(_write_adapter(name), _use_pool(name)) for name in ("peqa", "alpha")],
    "compressed-tensors base": [Saved(_copied(name), _use_base) for name in ("peqa", "sym", "sharded")],
    "bcq base": [Saved(_copied(name), _use_base) for name in ("alpha", "uniform", "ends")],
    "others' compressed-tensors": _foreign(lambda stored: compressed_tensors_layer(stored, sym=False), _TENSORS),
    "GPTQ base": _foreign(lambda stored: gptq_layer(stored.codes, stored.scale, stored.zero_point, 4), _GPTQ),
    "AWQ base": _foreign(awq_layer, _AWQ),
    "detector": [
        Saved(_write_detector(name), _use_detector)
        for name in ("mahalanobis", "relative_mahalanobis", "mahalanobis_cosine", "knn", "vim", "energy", "cosine")
    ],
    "OOD pipeline": [
        Saved(_write_ood("mahalanobis", adapter=True), _use_ood, _NO_TEXTS),
        Saved(_write_ood("knn", adapter=False), _use_ood, _NO_TEXTS),
    ],
    "PALP": [Saved(_write_palp(head), _use_palp) for head in ("ridge", "logistic", "knn", "mlp")],
    "critic": [Saved(_write_critic, _use_critic)],
    "granularity": [Saved(_write_cdnpg, _use_cdnpg), Saved(_write_converted, _use_converted)],
    "SG-ICL pool": [Saved(_write_pools, _use_pools)],
    "roll-outs and features": [
        Saved(_write_features, _use_features),
        Saved(_write_half_of_features, _use_features),
        Saved(_write_rollouts, _use_rollouts),
        Saved(_write_rollouts, _use_replay, ("settings", ".safetensors")),
    ],
    "ALMoST run": [
        Saved(_run_pipeline, _use_run, (".lock",)),
        Saved(_write_killed_pipeline, _use_run, (".lock",)),
    ],
}
