# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Export to GGUF, llama.cpp's file: packed layers with their codes unchanged, the rest as floats, the tokenizer.

Source: llama.cpp's `convert_hf_to_gguf.py` (tensor names from the `gguf` package, hyperparameters, the order of the
rows of q and k).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from peft_ext.checkpoint.gguf_blocks import block_type, to_blocks, why_no_blocks
from peft_ext.checkpoint.gguf_tokenizer import add_tokenizer
from peft_ext.checkpoint.gguf_types import block_sizes, bytes_of, file_type, type_named
from peft_ext.checkpoint.saving import take_over
from peft_ext.files import check_writable, written_whole
from peft_ext.quant.embedding import shared_ends
from peft_ext.quant.packed_module import PackedModule


# A model's class to the architecture's name in gguf.MODEL_ARCH_NAMES.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GPT2LMHeadModel": "gpt2",
}
FLOAT_TYPES = ("f32", "f16", "bf16", "q8_0")
# What llama.cpp's graphs have built in, by architecture: attributes of a config and their possible values.
_BUILT_IN: dict[str, dict[str, tuple]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "llama": {"hidden_act": ("silu", "swish")},
}
_ROPE_TYPES = ("default", "linear", "llama3")


class _Tensor(NamedTuple):
    """A tensor of the file: its shape as torch counts, GGUF's type of it, and what makes the bytes of its rows."""

    name: str
    shape: tuple[int, ...]
    type: Any
    data: Callable[[], np.ndarray]


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Union[str, Path],
    *,
    other_tensors: str = "f16",
    low_bit_types: bool = False,
    pre_tokenizer: Optional[str] = None,
) -> Path:
    """Write a model with packed layers as one GGUF file, which llama.cpp runs; whole or not at all.

    Uniform integers keep their codes, in the smallest type that holds them: up to 3 bits, and symmetric ones of 4, Q4_0 (4.5
    bits a weight), asymmetric ones of 4 bits Q4_1 (5), wider ones Q5_0, Q5_1 or Q8_0; with float zero points up to 4 bits
    become Q4_1, 5 bits Q5_1. With `low_bit_types`, symmetric ones of 2 bits become Q2_0 (2.25), binary codings of 1 bit Q1_0
    (1.125). Scales per channel, and per group of a multiple of the block (32 inputs; 64 of Q2_0, 128 of Q1_0), are repeated for
    every block. Scales are rounded to float16.
    What has no place in blocks
    (other binary codings, other groups, asymmetric 8 bits) is stored like the embeddings, with a warning.

    Args:
        model: A Llama, Mistral, Qwen2, Qwen3 or GPT-2 with a language-modelling head, adapters merged
            (`merge_and_unload()`). Layers of a compressed-tensors checkpoint are turned into packed ones.
        tokenizer: Its fast tokenizer; special tokens and chat template go along.
        path: The file to write; one that is there is replaced.
        other_tensors: `"f16"`, `"q8_0"` (half the size, rounded to 8 bits in blocks of 32), `"bf16"` or `"f32"`:
            embeddings and every matrix that isn't stored in blocks. Norms and biases are float32 always, and so are
            GPT-2's positions.
        low_bit_types: Whether Q2_0 and Q1_0 may be written: half the size, but for llama.cpp from July 2026 on (build b9916),
            whose x86 path of Q2_0 is a plain loop, a tenth as fast as Q4_0 (docs/how-to/serve.md).
        pre_tokenizer: llama.cpp's name of what cuts text before BPE, where it can't be recognised.

    Returns:
        The path.

    Raises:
        ValueError: If llama.cpp has no counterpart of the model or tokenizer; nothing is written then.
        OSError: If the path can't be written; what was there stays.
        ImportError: If the `gguf` package is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("the export to GGUF needs: pip install 'peft-ext[cli]' (or gguf)") from error
    path = Path(path).expanduser()
    if other_tensors not in FLOAT_TYPES:
        raise ValueError(f"other_tensors={other_tensors!r} is unknown; choose one of {FLOAT_TYPES}.")
    architecture = _check_model(model)
    check_writable(path, "path")
    take_over(model)
    blocks = block_types(model, low_bit_types)
    _warn_of_floats(model, blocks, other_tensors)

    writer = gguf.GGUFWriter(None, architecture)
    tensors = list(_tensors(model, architecture, blocks, type_named(other_tensors.upper())))
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(model.config.name_or_path).name or architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type(_most(tensors)))
    _add_hyperparameters(writer, model.config, architecture)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    writer.add_vocab_size(vocab_size)
    add_tokenizer(writer, tokenizer, model.config, vocab_size, pre_tokenizer)
    with written_whole(path) as partial:
        _write(writer, tensors, partial)
    return path


def block_types(model: nn.Module, low_bit_types: bool = False) -> dict[str, Optional[str]]:
    """The type that [`export_gguf`] stores each packed layer in, by the layer's name; None: a float type."""
    return {name: block_type(layer, low_bit_types) for name, layer in _stored(model).items()}


def _stored(model: nn.Module) -> dict[str, PackedModule]:
    """The packed weights that the file holds, by name: a head that is tied to a packed embedding isn't one of them, since
    llama.cpp takes the embedding for it."""
    shared = shared_ends(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedModule) and name not in shared
    }


def _check_model(model: nn.Module) -> str:
    """The architecture's name.

    Raises:
        ValueError: If it isn't supported, adapters aren't merged, or llama.cpp computes something else.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "the model has adapters, which GGUF has no room for; export model.merge_and_unload() instead."
        )
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise ValueError(f"the architecture {name} can't be exported to GGUF; supported are {tuple(ARCHITECTURES)}.")
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError("the model has weights on the meta device; load them first.")
    architecture, config = ARCHITECTURES[name], model.config
    for attribute, values in _BUILT_IN["gpt2" if architecture == "gpt2" else "llama"].items():
        value = getattr(config, attribute)
        if value not in values:
            raise ValueError(f"llama.cpp's {architecture} has {attribute} of {values} only; the model's is {value!r}.")
    rope_type = _rope(config).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise ValueError(f"positions of rope_type={rope_type!r} can't be exported to GGUF, only {_ROPE_TYPES}.")
    return architecture


def _warn_of_floats(model: nn.Module, blocks: Mapping[str, Optional[str]], other_tensors: str) -> None:
    """Say which packed layers lose their size in the file."""
    reasons = {name: why_no_blocks(layer) for name, layer in _stored(model).items() if blocks[name] is None}
    for reason, count in Counter(reasons.values()).items():
        first = next(name for name in reasons if reasons[name] == reason)
        warnings.warn(
            f"{count} packed layers are stored as {other_tensors.upper()} in the GGUF, larger than they are: {reason} "
            f"(first: {first!r}).",
            stacklevel=3,
        )


def _tensors(
    model: PreTrainedModel, architecture: str, blocks: Mapping[str, Optional[str]], other: Any
) -> Iterator[_Tensor]:
    """The tensors of the file, with their data still to be made. blocks: the packed layers' types; other: that of matrices that
    aren't in blocks."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)

    def named(key: str) -> str:
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"{key!r} has no counterpart in llama.cpp's {architecture}; it can't be exported.")
        return name

    factors = _rope_factors(model.config)
    if factors is not None:
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"
        yield _float_tensor(name, tuple(factors.shape), gguf.GGMLQuantizationType.F32, lambda: factors)
    layers, shared = _stored(model), shared_ends(model)
    for module_name, layer in layers.items():
        name = named(f"{module_name}.weight")
        rows = _rows(name, layer.out_features, model.config, architecture)
        block = blocks[module_name]
        if block is None:
            yield _float_tensor(name, (layer.out_features, layer.in_features), other, layer.dequantize, rows)
        else:
            yield _block_tensor(name, module_name, layer, type_named(block), rows)
    # a tied output layer is listed once, as the embedding, which llama.cpp takes for it
    for key, parameter in model.named_parameters():
        module_name, _, attribute = key.rpartition(".")
        if module_name in {**layers, **shared} and attribute != "bias":
            continue
        name = named(key)
        value = parameter.data
        if attribute == "weight" and isinstance(model.get_submodule(module_name), Conv1D):
            value = value.t()
        float32 = value.dim() < 2 or names.get_type(key, (".weight",)) == gguf.MODEL_TENSOR.POS_EMBD
        type_ = gguf.GGMLQuantizationType.F32 if float32 else other
        rows = _rows(name, len(value), model.config, architecture)
        yield _float_tensor(name, tuple(value.shape), type_, value.detach, rows)


def _block_tensor(
    name: str, module_name: str, layer: PackedModule, type_: Any, rows: Optional[torch.Tensor]
) -> _Tensor:
    def data() -> np.ndarray:
        try:
            return to_blocks(layer, type_.name, rows)
        except ValueError as error:
            raise ValueError(f"layer {module_name!r}: {error}") from error

    return _Tensor(name, (layer.out_features, layer.in_features), type_, data)


def _float_tensor(
    name: str,
    shape: tuple[int, ...],
    type_: Any,
    weight: Callable[[], torch.Tensor],
    rows: Optional[torch.Tensor] = None,
) -> _Tensor:
    """A tensor rounded to a float type or Q8_0."""
    import gguf

    if shape[-1] % block_sizes(type_)[0]:
        type_ = type_named("F16")  # as llama.cpp's converter

    def data() -> np.ndarray:
        value = weight().float().cpu()
        value = value if rows is None else value[rows]
        with np.errstate(over="ignore"):
            stored = gguf.quantize(np.ascontiguousarray(value.numpy()), type_)
        if stored.dtype == np.float16 and not np.isfinite(stored).all():
            raise ValueError(f"tensor {name!r} has values beyond float16; pass other_tensors='bf16' or 'f32'.")
        return stored

    return _Tensor(name, shape, type_, data)


def _rows(name: str, count: int, config: PretrainedConfig, architecture: str) -> Optional[torch.Tensor]:
    """The order in which llama.cpp wants a tensor's rows; None: as they are.

    Its Llama rotates neighbouring dimensions of a head, transformers' the first half with the second; see `permute` in
    llama.cpp's converter.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", None)}
    kind = name.split(".")[-2]
    if architecture != "llama" or kind not in heads:
        return None
    return torch.arange(count).view(heads[kind], 2, -1).transpose(1, 2).reshape(-1)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _rope_factors(config: PretrainedConfig) -> Optional[torch.Tensor]:
    """Llama 3's scaling of positions: what each frequency is divided by, float `[head_dim / 2]`."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(len(scaled), dtype=torch.float64) / len(scaled))
    return plain / scaled


def _add_hyperparameters(writer: Any, config: PretrainedConfig, architecture: str) -> None:
    import gguf

    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_context_length(config.max_position_embeddings)
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    # full attention, which llama.cpp computes here, is the same up to the window
    window = getattr(config, "sliding_window", None) or math.inf
    writer.add_context_length(int(min(config.max_position_embeddings, window)))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _most(tensors: list[_Tensor]) -> str:
    """The type that most weights have."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type.name] += math.prod(tensor.shape)
    return weights.most_common(1)[0][0]


def _write(writer: Any, tensors: list[_Tensor], path: Path) -> None:
    """Write metadata and tensors; one tensor at a time is in memory."""
    for tensor in tensors:
        size = bytes_of(tensor.shape, tensor.type)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=tensor.type)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.data())
        writer.flush()
    finally:
        writer.close()
