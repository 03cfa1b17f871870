# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Bytes of binary-coded models, and numbers that AlphaTuning trains, per layer and in all, from the models' configs.

No weight is made: the models are built on the meta device and packed there by the very code that packs real ones, so
the bytes are those of the checkpoints' tensors. The loading check at the end is measured: a packed SmolLM2 in a
process of its own.

    python -m benchmarks.alphatuning_sizes
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig

from benchmarks.common import Results, argument_parser, describe, fresh_process, log, markdown_table, verdict
from benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from benchmarks.tuning import tiny_llama
from peft_ext import AlphaTuningConfig
from peft_ext.models import DEFAULT_MODEL, load
from peft_ext.quant.conversion import packed_layers


MB = 1e6
BITS = (4, 3, 2, 1)
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


def sizes_of(config: PretrainedConfig, bits: int, group_size: int = -1) -> Sizes:
    """Of a model with that config."""
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


def model_table(bits: Sequence[int] = BITS) -> str:
    """Whole models."""
    headers = ["Model", "Bits", "Quantised layers, MB", "float32 / packed", "float16 / packed", "Whole model, MB"]
    headers += ["float32 / whole", "Trained numbers", "All / trained"]
    lines = []
    for name, config in CONFIGS.items():
        for width in bits:
            found = sizes_of(config, width)
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


def layer_table(name: str = SMOLLM2) -> str:
    """The layers of one block."""
    headers = ["Layer", "Size", "float32, bytes", *[f"{bits} bits, bytes" for bits in BITS], "Trained numbers"]
    models = {bits: _packed_block(CONFIGS[name], bits) for bits in BITS}
    lines = []
    for layer, packed in models[BITS[0]].items():
        size = packed.out_features * packed.in_features
        bytes_of = [models[bits][layer].planes.nbytes + models[bits][layer].scale.nbytes for bits in BITS]
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


def verdicts() -> list[str]:
    """The lines that say which claims the tables bear out."""
    opt = sizes_of(CONFIGS["OPT-1.3B"], 3)
    lines = [
        verdict("OPT-1.3B: 1000 x the trained numbers, over all parameters", 1000 * opt.trained / opt.parameters, 1)
    ]
    for name, config in CONFIGS.items():
        found = sizes_of(config, 3)
        lines.append(
            verdict(
                f"{name}: 10 x the quantised layers at 3 bits, over float32",
                2.5 * found.packed_bytes / found.weights,
                1,
            )
        )
    return lines


def measure_loading(folder: Path) -> dict[str, int]:
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
        "files": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """[`measure_loading`] of a packed and of the float model, each in a process of its own."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("float", "packed"):
            model = tiny_llama() if args.smoke else load(args.model, dtype=torch.float32)
            if kind == "packed":
                model = get_peft_model(model, AlphaTuningConfig(bits=3, init_method="greedy")).unload()
            model.save_pretrained(Path(folder, kind))
            del model
            flags = ["--worker", str(Path(folder, kind))]
            found[kind] = fresh_process("benchmarks.alphatuning_sizes", flags, f"loading the {kind} model")
    return found


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Print the tables, measure the loading, print the verdicts."""
    parser = argument_parser(__doc__, "alphatuning_sizes.json", table=False)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose loading is measured")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(measure_loading(args.worker)))
        return
    results = Results(args.output, args.seed)
    key = {"loading": "tiny random Llama" if args.smoke else args.model, "bits": 3}
    if results.find(key) is None:
        log("Loading a packed and a float model")
        results.add(key, loading(args))
    found = results.find(key)
    assert found is not None
    print(model_table((3,) if args.smoke else BITS))
    print(f"\n{SMOLLM2}, one block\n\n{layer_table()}\n")
    rows = [[kind, *(f"{found[kind][name] / MB:,.1f}" for name in ("tensors", "growth"))] for kind in found]
    print(markdown_table(["Loading at 3 bits", "Tensors, MB", "Peak growth, MB"], rows))
    print()
    print("\n".join(verdicts()))
    print(
        verdict(
            "peak memory of loading, over the packed tensors",
            found["packed"]["growth"] / found["packed"]["tensors"],
            1.15,
        )
    )
    print("\n" + describe(results.rows[-1]["environment"]))


if __name__ == "__main__":
    main()
