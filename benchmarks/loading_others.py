# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Peak memory of `load_packed` on checkpoints as others write them: compressed-tensors, GPTQ and AWQ, 4 bits, asymmetric, groups
of 128, random codes. Each is loaded in a process of its own; bytes above the process that has imported its libraries.

    python -m benchmarks loading_others

Linux only.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.core.claims import Claim, markdown_table
from benchmarks.core.run import Run, log
from benchmarks.core.task import Task, claims_of_each, tables_of_each
from benchmarks.core.worker import fresh_process
from benchmarks.peqa_training import BILLION_CONFIG, RANDOM
from benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from benchmarks.tuning import TINY


TINY_CONFIG = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHAPES = {**RANDOM, "random Llama, 1.1 billion": BILLION_CONFIG, TINY: TINY_CONFIG}
GROUP = 128
MB = 1e6
Tensors = dict[str, torch.Tensor]


def _words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def _scales(*shape: int) -> torch.Tensor:
    return (0.01 * torch.rand(shape)).half()


def _compressed_tensors(out: int, inputs: int) -> Tensors:
    groups = inputs // GROUP
    return {
        "weight_packed": _words(out, inputs // 8),
        "weight_scale": _scales(out, groups),
        "weight_zero_point": _words(out // 8, groups),
        "weight_shape": torch.tensor([out, inputs]),
    }


def _gptq(out: int, inputs: int) -> Tensors:
    order = (torch.arange(inputs) // GROUP).int()
    words = {"qweight": _words(inputs // 8, out), "qzeros": _words(inputs // GROUP, out // 8)}
    return {**words, "scales": _scales(inputs // GROUP, out), "g_idx": order}


def _awq(out: int, inputs: int) -> Tensors:
    words = {"qweight": _words(inputs, out // 8), "qzeros": _words(inputs // GROUP, out // 8)}
    return {**words, "scales": _scales(inputs // GROUP, out)}


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
FORMATS: dict[str, tuple[Callable[[int, int], Tensors], dict[str, Any]]] = {
    "compressed-tensors": (
        _compressed_tensors,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
        },
    ),
    "GPTQ": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}),
    "AWQ": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}


def prepare(shape: dict[str, Any], name: str, folder: Path) -> None:
    """Write a checkpoint in one of the formats."""
    write, quantization = FORMATS[name]
    config = LlamaConfig(**shape, tie_word_embeddings=False, dtype="float16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    layers = {
        key: module for key, module in model.named_modules() if isinstance(module, nn.Linear) and key != "lm_head"
    }
    tensors = {
        key: 0.02 * torch.randn(tensor.shape, dtype=torch.float16)
        for key, tensor in model.state_dict().items()
        if key.removesuffix(".weight") not in layers
    }
    for key, layer in layers.items():
        parts = write(layer.out_features, layer.in_features)
        tensors.update({f"{key}.{part}": tensor for part, tensor in parts.items()})
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stored = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(stored, default=str))


def load(folder: str, small: str) -> dict[str, Any]:
    """Load a checkpoint and say what that took; a small one first, for what libraries allocate at their first use."""
    from transformers.utils import logging

    from peft_ext import load_packed

    logging.disable_progress_bar()
    ids = torch.randint(3, 200, (1, 16), generator=torch.Generator().manual_seed(0))
    _forward(load_packed(small), ids)
    reset_peak()
    before = resident_bytes()
    model = load_packed(folder)
    peak = peak_resident_bytes() - before
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    layer = type(model.model.layers[0].mlp.up_proj).__name__
    _forward(model, ids)  # which reads what is mapped
    return {
        "load_peak_bytes": peak,
        "peak_bytes": peak_resident_bytes() - before,
        "model_bytes": held,
        "layer": layer,
    }


@torch.no_grad()
def _forward(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids)


def measure_all(shape: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All formats, by name."""
    found = {}
    for name in FORMATS:
        log(f"{name}: writing and loading")
        prepare(shape, name, folder / name)
        prepare(TINY_CONFIG, name, folder / "small" / name)
        figures = fresh_process(load, {"folder": str(folder / name), "small": str(folder / "small" / name)}, name)
        found[name] = {**figures, "file_bytes": (folder / name / "model.safetensors").stat().st_size}
        (folder / name / "model.safetensors").unlink()
    return found


def measure(run: Run) -> None:
    """All formats, stored together."""
    if not run.rows:
        torch.manual_seed(run.seed)
        with tempfile.TemporaryDirectory() as folder:
            run.add({}, measure_all(SHAPES[run.model], Path(folder)))


def tables(run: Run) -> dict[str, str]:
    """Bytes by format."""
    lines = []
    for name, figures in (run.find({}) or {}).items():
        sizes = [figures[key] for key in ("file_bytes", "model_bytes", "load_peak_bytes", "peak_bytes")]
        lines.append([name, *[f"{size / MB:,.0f}" for size in sizes], f"{sizes[3] / sizes[0]:.2f}"])
    header = ["", "file, MB", "model, MB", "peak of loading, MB", "peak after a forward pass, MB", "over its file"]
    return {"Loading": markdown_table(header, lines)}


def claims(run: Run) -> list[Claim]:
    """Loading takes no more than the file."""
    found, kinds = (
        run.find({}) or {},
        {"load_peak_bytes": "peak of loading", "peak_bytes": "peak, a forward pass included"},
    )
    return [
        Claim(
            f"{name}: {what}, over the packed bytes",
            found[name][kind] / found[name]["file_bytes"] if name in found else None,
            1.15,
        )
        for name in FORMATS
        for kind, what in kinds.items()
    ]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims))
