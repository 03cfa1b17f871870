# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""GGUF files of tiny models with blocks of any type, as llama.cpp's converter and quantiser would leave them behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.pytorch_utils import Conv1D


# Where the float16 numbers of a block lie, by type.
HALVES = {
    "Q1_0": (0,),
    "Q2_0": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
}


# Of families that transformers reads by a conversion mapping: its names and llama.cpp's.
_DECODER = {
    "model.embed_tokens.": "token_embd.",
    "model.layers.": "blk.",
    ".self_attn.q_proj.": ".attn_q.",
    ".self_attn.k_proj.": ".attn_k.",
    ".self_attn.v_proj.": ".attn_v.",
    "lm_head.": "output.",
}
NEWER = {
    "lfm2": {
        **_DECODER,
        "model.embedding_norm.": "token_embd_norm.",
        ".operator_norm.": ".attn_norm.",
        ".self_attn.out_proj.": ".attn_output.",
        ".self_attn.q_layernorm.": ".attn_q_norm.",
        ".self_attn.k_layernorm.": ".attn_k_norm.",
        ".feed_forward.w1.": ".ffn_gate.",
        ".feed_forward.w3.": ".ffn_up.",
        ".feed_forward.w2.": ".ffn_down.",
        ".conv.in_proj.": ".shortconv.in_proj.",
        ".conv.out_proj.": ".shortconv.out_proj.",
        ".conv.conv.": ".shortconv.conv.",
    },
    "qwen35": {
        **_DECODER,
        ".self_attn.o_proj.": ".attn_output.",
        ".mlp.gate_proj.": ".ffn_gate.",
        ".mlp.up_proj.": ".ffn_up.",
        ".mlp.down_proj.": ".ffn_down.",
        "model.norm.": "output_norm.",
        ".input_layernorm.": ".attn_norm.",
        ".post_attention_layernorm.": ".post_attention_norm.",
        ".self_attn.q_norm.": ".attn_q_norm.",
        ".self_attn.k_norm.": ".attn_k_norm.",
        ".linear_attn.in_proj_qkv.": ".attn_qkv.",
        ".linear_attn.in_proj_z.": ".attn_gate.",
        ".linear_attn.in_proj_a.": ".ssm_alpha.",
        ".linear_attn.in_proj_b.": ".ssm_beta.",
        ".linear_attn.conv1d.": ".ssm_conv1d.",
        ".linear_attn.norm.": ".ssm_norm.",
        ".linear_attn.out_proj.": ".ssm_out.",
        ".linear_attn.A_log": ".ssm_a",
        ".linear_attn.dt_bias": ".ssm_dt.bias",
    },
}


def _newer_name(target: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        target = target.replace(ours, theirs)
    return target


def random_blocks(rng: np.random.Generator, shape: tuple[int, ...], name: str, size: float = 0.01) -> np.ndarray:
    """Blocks with any codes and scales of about `size`, uint8 `[..., bytes of a row]`."""
    weights, nbytes = (64, 18) if name == "Q2_0" else gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // weights * nbytes), dtype=np.uint8)
    blocks = data.reshape(-1, nbytes)
    if name == "TQ2_0":  # no fourth level
        codes = rng.integers(0, 3, (4, len(blocks), 64), dtype=np.uint8)
        blocks[:, :64] = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
    for start in HALVES[name]:
        scales = size * rng.uniform(0.5, 1.5, (len(blocks), 1)) * rng.choice([-1, 1], (len(blocks), 1))
        blocks[:, start : start + 2] = scales.astype(np.float16).view(np.uint8)
    return data


def dequantized_blocks(data: np.ndarray, name: str) -> np.ndarray:
    """By `gguf`; Q1_0 and Q2_0, which it can't, as ggml's dequantize_row_q1_0 and dequantize_row_q2_0 do it."""
    if name not in ("Q1_0", "Q2_0"):
        return gguf.dequantize(data, gguf.GGMLQuantizationType[name])
    rows = []
    for row in data:
        values: list[float] = []
        for block in row.reshape(-1, 18):
            d = float(block[:2].copy().view(np.float16)[0])
            for byte in block[2:].tolist():
                if name == "Q1_0":
                    values += [d if byte >> bit & 1 else -d for bit in range(8)]
                else:
                    values += [((byte >> shift & 3) - 1) * d for shift in (0, 2, 4, 6)]
        rows.append(values)
    return np.array(rows, np.float32)


def write_gguf(
    path: Path,
    architecture: str,
    config: PretrainedConfig,
    kind_of: Callable[[str], str],
    seed: int = 0,
    **values: Any,
) -> Path:
    """A file of random numbers for a tiny model.

    Args:
        path: The file.
        architecture: llama.cpp's name.
        config: The model's.
        kind_of: A matrix's type by llama.cpp's name of it.
        values: What else the header has.
    """
    rng, model = np.random.default_rng(seed), AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(path, architecture)
    of_config = (
        {}
        if architecture == "qwen35"
        else GGUF_CONFIG_MAPPING.get(config.model_type) or GGUF_CONFIG_MAPPING[architecture]
    )
    for key, name in of_config.items():
        value = None if name is None else getattr(config, name, None)
        if isinstance(value, (int, float)):
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture}.{key}", value)
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    for key, value in values.items():
        key = key.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    state, modules = model.state_dict(), dict(model.named_modules())
    if architecture in NEWER:
        names = {_newer_name(target, NEWER[architecture]): target for target in state}
    else:
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        names = get_gguf_hf_weights_map(model, processor)
    for name, target in names.items():
        if target == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shape = tuple(state[target].shape)
        if isinstance(modules.get(target.rpartition(".")[0]), Conv1D) and target.endswith(".weight"):
            shape = shape[::-1]
        if name.endswith((".ffn_gate_exps", ".ffn_up_exps")):
            shape = (shape[0], shape[1] // 2, shape[2])
        if "conv" in name and len(shape) == 3:
            shape = (shape[0], shape[2])
        name = name if name.endswith((".weight", ".bias", ".ssm_a")) else f"{name}.weight"
        kind = kind_of(name) if len(shape) > 1 else "F32"
        if kind == "F32":
            size = 0.02 if len(shape) > 1 else 0.5
            offset = 1.0 if name.endswith("norm.weight") else 0.0
            values_of = offset + size * rng.standard_normal(shape)
            writer.add_tensor(name, (-np.exp(values_of) if name.endswith("ssm_a") else values_of).astype(np.float32))
        else:
            writer.add_tensor(name, random_blocks(rng, shape, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
