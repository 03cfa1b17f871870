# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Bytes of binary-coded models, and numbers that AlphaTuning trains, per layer and in all, from the models' configs.

No weight is made: the models are built on the meta device and packed there by the very code that packs real ones, so
the bytes are those of the checkpoints' tensors. The loading check at the end is measured: a packed SmolLM2 in a
process of its own.

    python -m benchmarks alphatuning_sizes
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task
from benchmarks.core.worker import fresh_process
from benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from benchmarks.tuning import float_model
from peft_ext import AlphaTuningConfig
from peft_ext.quant.conversion import packed_layers


MB = 1e6
CONFIGS: dict[str, PretrainedConfig] = {
    "GPT-2 medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "GPT-2 large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "OPT-1.3B": OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048
    ),
    "Llama-7B": LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
}
SMOLLM2 = "SmolLM2-135M"
CONFIGS[SMOLLM2] = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


class Sizes(NamedTuple):
    """Bytes and counts of a model under AlphaTuning."""

    weights: int  # in the quantised layers
    parameters: int
    packed_bytes: int  # of the quantised layers: planes and alphas
    rest_bytes: int  # embeddings, norms, biases in float32
    trained: int


@cache
def sizes_of(name: str, bits: int, group_size: int = -1) -> Sizes:
    """Of a model of [`CONFIGS`]."""
    config = CONFIGS[name]
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    tuned = get_peft_model(model, AlphaTuningConfig(bits=bits, group_size=group_size, init_method="greedy"))
    layers = packed_layers(tuned).values()
    packed = [layer.planes for layer in layers] + [layer.scale for layer in layers]
    inside = {id(p) for p in packed} | {id(p) for p in tuned.parameters() if p.requires_grad}
    return Sizes(
        weights=sum(layer.in_features * layer.out_features for layer in layers),
        parameters=parameters,
        packed_bytes=sum(p.nbytes for p in packed),
        rest_bytes=sum(p.nbytes for p in tuned.parameters() if id(p) not in inside),
        trained=sum(p.numel() for p in tuned.parameters() if p.requires_grad),
    )


def model_table(run: Run) -> str:
    """Whole models."""
    headers = ["Model", "Bits", "Quantised layers, MB", "float32 / packed", "float16 / packed", "Whole model, MB"]
    headers += ["float32 / whole", "Trained numbers", "All / trained"]
    lines = []
    for name in run.models:
        for width in run.bits:
            found = sizes_of(name, width)
            whole = found.packed_bytes + found.rest_bytes
            lines.append(
                [
                    name,
                    width,
                    f"{found.packed_bytes / MB:,.1f}",
                    f"{4 * found.weights / found.packed_bytes:.1f}",
                    f"{2 * found.weights / found.packed_bytes:.1f}",
                    f"{whole / MB:,.0f}",
                    f"{4 * found.parameters / whole:.1f}",
                    f"{found.trained:,}",
                    f"{found.parameters / found.trained:,.0f}",
                ]
            )
    return markdown_table(headers, lines)


def layer_table(bits_of: list[int], name: str = SMOLLM2) -> str:
    """The layers of one block."""
    headers = ["Layer", "Size", "float32, bytes", *[f"{bits} bits, bytes" for bits in bits_of], "Trained numbers"]
    models = {bits: _packed_block(CONFIGS[name], bits) for bits in bits_of}
    lines = []
    for layer, packed in models[bits_of[0]].items():
        size = packed.out_features * packed.in_features
        bytes_of = [models[bits][layer].planes.nbytes + models[bits][layer].scale.nbytes for bits in bits_of]
        shape = f"{packed.out_features} x {packed.in_features}"
        lines.append(
            [layer, shape, f"{4 * size:,}", *[f"{count:,}" for count in bytes_of], f"{packed.out_features:,}"]
        )
    return markdown_table(headers, lines)


def _packed_block(config: PretrainedConfig, bits: int) -> dict[str, Any]:
    with init_empty_weights(include_buffers=True):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = get_peft_model(model, AlphaTuningConfig(bits=bits, init_method="greedy")).unload()
    return {name: layer for name, layer in packed_layers(model).items() if ".0." in name}


def load_packed_folder(folder: str) -> dict[str, int]:
    """Peak memory of loading the packed checkpoint in `folder`, in this process, and what its tensors take."""
    import peft_ext  # noqa: F401 (registers the format)

    warm = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    del warm  # what the libraries allocate at their first use isn't the checkpoint's
    reset_peak()
    before = resident_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().max()  # files are mapped: what nobody has read isn't resident yet
    return {
        "growth": peak_resident_bytes() - before,
        "tensors": sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers()),
        "files": sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")),
    }


def loading(run: Run) -> dict[str, Any]:
    """[`load_packed_folder`] of a packed and of the float model, each in a process of its own."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("float", "packed"):
            model = float_model(run.model, run.seed)
            if kind == "packed":
                model = get_peft_model(model, AlphaTuningConfig(bits=3, init_method="greedy")).unload()
            model.save_pretrained(Path(folder, kind))
            del model
            arguments = {"folder": str(Path(folder, kind))}
            found[kind] = fresh_process(load_packed_folder, arguments, f"loading the {kind} model")
    return found


KEY = {"loading": "packed and float", "bits": 3}


def measure(run: Run) -> None:
    """The loading; all else follows from configs."""
    if run.find(KEY) is None:
        log("Loading a packed and a float model")
        run.add(KEY, loading(run))


def tables(runs: Runs) -> dict[str, str]:
    """Sizes by model and by layer; what loading takes."""
    shown = {}
    for run in runs:
        found = run.find(KEY) or {}
        rows = [[kind, *(f"{found[kind][name] / MB:,.1f}" for name in ("tensors", "growth"))] for kind in found]
        shown["Sizes"] = model_table(run)
        shown[f"{SMOLLM2}, one block"] = layer_table(run.bits)
        shown["Loading"] = markdown_table(["Loading at 3 bits", "Tensors, MB", "Peak growth, MB"], rows)
    return shown


def claims(runs: Runs) -> list[Claim]:
    """A tenth of the bytes, a thousandth of the trained numbers, and nothing else in memory."""
    opt = sizes_of("OPT-1.3B", 3)
    share = 1000 * opt.trained / opt.parameters
    found = [Claim("OPT-1.3B: 1000 x the trained numbers, over all parameters", share, 1)]
    for run in runs:
        for name in run.models:
            sizes = sizes_of(name, 3)
            ratio = 2.5 * sizes.packed_bytes / sizes.weights
            found.append(Claim(f"{name}: 10 x the quantised layers at 3 bits, over float32", ratio, 1))
        packed: Optional[dict[str, int]] = (run.find(KEY) or {}).get("packed")
        ratio_of_loading = packed and packed["growth"] / packed["tensors"]
        found.append(Claim("peak memory of loading, over the packed tensors", ratio_of_loading, 1.15))
    return found


def headlines(runs: Runs) -> list[Headline]:
    """OPT-1.3B, as in the paper."""
    opt = sizes_of("OPT-1.3B", 3)
    smaller, fewer = 4 * opt.weights / opt.packed_bytes, opt.parameters / opt.trained
    return [
        Headline(
            "Tuning packed models",
            "AlphaTuning, OPT-1.3B at 3 bits",
            f"layers {smaller:.1f} times smaller than float32, {fewer:,.0f} times fewer trained numbers",
            unless(smaller >= 10 and fewer >= 1000, "10 and 1,000 times"),
            "../benchmarks/alphatuning.md#sizes",
        )
    ]


TASK = Task(measure, tables, claims, headlines)
