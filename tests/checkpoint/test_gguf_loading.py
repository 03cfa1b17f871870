# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""GGUF files into packed layers: the file's codes bit for bit, in every family that transformers reads, and back again."""

from __future__ import annotations

import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GgufConfig,
    LlamaConfig,
    PreTrainedModel,
)

from peft_ext import PeqaConfig, load, load_packed
from peft_ext.checkpoint.gguf import export_gguf
from peft_ext.checkpoint.gguf_blocks import READ_TYPES, block_type, from_blocks, to_blocks
from peft_ext.checkpoint.gguf_header import read_header
from peft_ext.checkpoint.gguf_loading import rows_of
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.formats import Uniform
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.uniform import dequantize
from tests.checkpoint.gguf_files import dequantized_blocks, random_blocks, write_gguf
from tests.tiny.tokenizers import byte_tokenizer


SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WIDE = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
ROUNDING = 2.0**-22  # of the largest number in a sum of a few float32
IDS = torch.arange(12).view(2, 6)


def mixed(name: str) -> str:
    """As llama.cpp's quantiser mixes types."""
    if (
        "norm" in name
        or "ffn_gate_inp" in name
        or "conv1d" in name
        or "conv.conv" in name
        or "ssm_a" in name
        or "position" in name
    ):
        return "F32"
    return "Q8_0" if "embd" in name else "Q4_1" if "down" in name else "Q4_0"


def llama(path: Path, kind: str = "Q4_1", sizes: dict = SIZES, **kwargs) -> Path:
    config = LlamaConfig(**sizes, **kwargs)
    return write_gguf(path, "llama", config, lambda name: "Q8_0" if "embd" in name else kind)


def stock(path: Path) -> PreTrainedModel:
    """As transformers dequantises it."""
    kwargs = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(str(path.parent), **kwargs).eval()


def assert_same_model(packed: PreTrainedModel, floats: PreTrainedModel) -> None:
    """Same logits as, to rounding, the floats."""
    with torch.no_grad():
        ours, theirs = packed(input_ids=IDS).logits, floats(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


def assert_same_layers(one: PreTrainedModel, other: PreTrainedModel) -> None:
    """Same codes, scales and zero points, bit for bit."""
    layers, others = packed_layers(one), packed_layers(other)
    assert layers and list(layers) == list(others)
    for name, layer in layers.items():
        assert torch.equal(layer.codes(), others[name].codes()), name
        assert torch.equal(layer.scale, others[name].scale), name
        assert layer.number_format == others[name].number_format, name
        assert torch.equal(layer.zero_point, others[name].zero_point), name


@pytest.mark.parametrize("name", READ_TYPES)
def test_blocks_are_read_as_gguf_reads_them(name):
    kind = READ_TYPES[name]
    data = random_blocks(np.random.default_rng(0), (5, 3 * kind.weights), name)
    expected = dequantized_blocks(data, name)
    quantized = from_blocks(data, name)
    assert quantized.codes.shape == expected.shape and int(quantized.codes.max()) < 2**kind.bits
    weight = dequantize(*quantized).numpy()
    if kind.zero_point is not None:
        assert quantized.zero_point.dtype == torch.uint8
        assert np.array_equal(weight, expected)
        return
    scale, zero_point = quantized.scale.double(), quantized.zero_point.double()
    largest = (scale.abs() * (zero_point.abs() + 2**kind.bits)).repeat_interleave(kind.group_size, 1).numpy()
    assert (np.abs(weight - expected) <= largest * ROUNDING).all()
    # codes are whole scales apart: these are the file's
    wide = [each.repeat_interleave(kind.group_size, 1).numpy() for each in (scale, zero_point)]
    assert np.array_equal(np.rint(expected / wide[0] + wide[1]), quantized.codes.numpy())


@pytest.mark.parametrize("name", [name for name, kind in READ_TYPES.items() if kind.zero_point is None])
def test_a_group_of_scale_zero_is_constant(name):
    kind = READ_TYPES[name]
    data = random_blocks(np.random.default_rng(0), (2, kind.weights), name)
    start = 80 if name == "Q2_K" else 0
    data[0, start : start + 2] = 0
    codes, scale, zero_point = from_blocks(data, name)
    assert not codes[0].any() and (scale[0] == 1).all() and codes[1].any()
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[name])
    assert np.array_equal(dequantize(codes, scale, zero_point).numpy()[0], expected[0])


FAMILIES = {
    "llama": ("llama", LlamaConfig(**SIZES)),
    "qwen2": ("qwen2", transformers.Qwen2Config(**SIZES)),
    "qwen3": ("qwen3", transformers.Qwen3Config(**SIZES, head_dim=128)),
    "gpt2": ("gpt2", transformers.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)),
    "bloom": ("bloom", transformers.BloomConfig(vocab_size=100, hidden_size=64, n_layer=2, n_head=4)),
    "falcon": ("falcon", transformers.FalconConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)),
    "gemma2": ("gemma2", transformers.Gemma2Config(**SIZES, head_dim=16)),
    "gemma3": ("gemma3", transformers.Gemma3TextConfig(**SIZES, head_dim=16)),
    "stablelm": ("stablelm", transformers.StableLmConfig(**SIZES)),
    "starcoder2": ("starcoder2", transformers.Starcoder2Config(**SIZES)),
    "nemotron": ("nemotron", transformers.NemotronConfig(**SIZES)),
    "qwen3moe": ("qwen3moe", transformers.Qwen3MoeConfig(**SIZES, head_dim=128, num_experts=4, num_experts_per_tok=2)),
    "minimax-m2": ("minimax-m2", transformers.MiniMaxM2Config(**SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2)),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", *FAMILIES[family], mixed)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*become floats.*")
        model = load_packed(path)
    tensors = read_header(path).tensors.values()
    blocks = [t for t in tensors if t.type.name in ("Q4_0", "Q4_1")]
    experts = [t for t in blocks if len(t.shape) == 3]
    assert len(packed_layers(model)) == len(blocks) - len(experts) + sum(t.shape[0] for t in experts)
    assert_same_model(model, stock(path))


def test_families_with_a_conversion_mapping(tmp_path):
    """Rows of value heads are regrouped; the one weight whose columns are becomes floats, which is said."""
    config = transformers.Lfm2Config(
        **{**SIZES, "num_hidden_layers": 3},
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
    )
    more = {"lfm2__attention__head_count_kv": [0, 2, 0], "lfm2__shortconv__l_cache": config.conv_L_cache}
    more |= {"lfm2__attention__layer_norm_rms_epsilon": 1e-5, "lfm2__rope__freq_base": 1e6}
    path = write_gguf(tmp_path / "lfm2.gguf", "lfm2", config, mixed, **more)
    model = load_packed(path)
    assert len(packed_layers(model)) == 2 * 2 + 4 + 3 * 3
    assert_same_model(model, stock(path))

    config = transformers.Qwen3_5TextConfig(
        **SIZES, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=32, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    more = {
        "context_length": 64, "embedding_length": 64, "feed_forward_length": 128, "block_count": 2,
        "attention__head_count": 4, "attention__head_count_kv": 2, "attention__key_length": 32, "full_attention_interval": 2,
        "attention__layer_norm_rms_epsilon": 1e-6, "ssm__conv_kernel": config.linear_conv_kernel_dim, "ssm__state_size": 16,
        "ssm__group_count": 2, "ssm__time_step_rank": 4, "ssm__inner_size": 128, "rope__freq_base": 1e6,
        "rope__dimension_sections": [2, 1, 1, 0], "rope__dimension_count": 8,
    }  # fmt: skip
    more = {f"qwen35__{key}": value for key, value in more.items()}
    path = write_gguf(tmp_path / "qwen35.gguf", "qwen35", config, mixed, **more)
    with pytest.warns(
        UserWarning, match=r"1 weights of qwen35.gguf are Q4_0 and become floats .*'blk.0.ssm_out.weight'"
    ):
        model = load_packed(path)
    assert isinstance(model.model.layers[0].linear_attn.in_proj_qkv, PackedLinear)
    assert not isinstance(model.model.layers[0].linear_attn.out_proj, PackedLinear)
    assert_same_model(model, stock(path))


def test_codes_are_the_files(tmp_path):
    """Llama's rows of queries and keys are interleaved in the file; all other layers' are as they are."""
    path = llama(tmp_path / "model.gguf", "Q4_K", WIDE)
    model, header = load_packed(path), read_header(path)
    for name, layer in packed_layers(model).items():
        kinds = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
        part = name.rpartition(".")[2].removesuffix("_proj")
        tensor = header.tensors[f"blk.0.{kinds.get(part, f'ffn_{part}')}.weight"] if "layers" in name else None
        tensor = tensor or header.tensors["output.weight"]
        codes, scale, zero_point = from_blocks(np.array(header.data(tensor)), "Q4_K")
        order = torch.arange(len(codes))
        if part in ("q", "k"):
            order = (
                order.view(model.config.num_attention_heads if part == "q" else 2, -1, 2).transpose(1, 2).reshape(-1)
            )
        assert torch.equal(layer.codes(), codes[order]), name
        assert torch.equal(layer.scale, scale[order]) and torch.equal(layer.zero_point, zero_point[order])
        assert layer.number_format == Uniform(4, 32, zero="float")


# in files, which gguf has to know
@pytest.mark.parametrize("name", [name for name in READ_TYPES if name in gguf.GGMLQuantizationType.__members__])
def test_every_type_computes_and_is_saved(name, tmp_path):
    """Widths 5 and 6 and groups of 16 through the kernel, bcq and compressed-tensors."""
    path = llama(tmp_path / "model.gguf", name, WIDE)
    model = load_packed(path)
    kind = READ_TYPES[name]
    sym = kind.zero_point is not None
    expected = Uniform(kind.bits, kind.group_size if kind.group_size < 256 else -1, sym, "int" if sym else "float")
    assert {layer.number_format for layer in packed_layers(model).values()} == {expected}
    if name != "Q1_0":  # which gguf can't dequantise
        assert_same_model(model, stock(path))
    model.save_pretrained(tmp_path / "saved")
    again = load_packed(tmp_path / "saved")
    assert_same_layers(model, again)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, again(input_ids=IDS).logits)


@pytest.mark.parametrize("name", [name for name in READ_TYPES if name not in ("TQ1_0", "TQ2_0", "Q2_0")])
def test_there_and_back(name, tmp_path):
    """GGUF, packed layers, a folder, GGUF, packed layers: nothing is lost, and the file's types are what they were."""
    first = load_packed(llama(tmp_path / "model.gguf", name, {**WIDE, "vocab_size": 300}))
    first.save_pretrained(tmp_path / "saved")
    again = load_packed(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_gguf(again, byte_tokenizer(), tmp_path / "again.gguf", other_tensors="f32", low_bit_types=True)
    assert_same_layers(first, load_packed(tmp_path / "again.gguf"))
    assert read_header(tmp_path / "again.gguf").tensors["blk.0.attn_q.weight"].type.name == name


def test_tuned_k_quants_are_no_k_quants(tmp_path):
    """Their scales have no second level any more: blocks of 32 keep the codes, groups of 16 become floats, which is said."""
    for name, stored in (("Q4_K", "Q4_1"), ("Q6_K", "F16")):
        model = load_packed(llama(tmp_path / "model.gguf", name, {**WIDE, "vocab_size": 300}))
        for layer in packed_layers(model).values():
            layer.scale.data *= 1 + 0.01 * torch.rand_like(layer.scale)
        codes = {key: layer.codes() for key, layer in packed_layers(model).items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            export_gguf(model, byte_tokenizer(), tmp_path / "again.gguf")
        assert read_header(tmp_path / "again.gguf").tensors["blk.0.attn_q.weight"].type.name == stored
        if stored == "F16":
            assert any("groups of 16 aren't multiples of GGUF's blocks" in str(each.message) for each in caught)
        else:
            again = packed_layers(load_packed(tmp_path / "again.gguf"))
            assert all(torch.equal(layer.codes(), codes[key]) for key, layer in again.items())


def test_blocks_of_another_size_than_llama_cpps(tmp_path):
    """As in files of forks, which use its numbers for blocks of their own; what they are isn't known, so nothing is read."""
    path = llama(tmp_path / "model.gguf", "Q4_0")
    content = bytearray(path.read_bytes())
    name = b"blk.0.attn_k.weight"
    at = content.index(name) + len(name)
    kind = at + 4 + 8 * int.from_bytes(content[at : at + 4], "little")
    content[kind : kind + 4] = int(gguf.GGMLQuantizationType.Q8_0).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="'blk.0.attn_k.weight' .* of type Q8_0 would reach into the next one.*forks"):
        load_packed(path)


def test_k_quants_with_constant_groups_come_back(tmp_path):
    data = random_blocks(np.random.default_rng(0), (4, 512), "Q4_K")
    data[0, :2] = 0  # a whole block
    data[1, 4:8] = 0  # four groups' scales
    data[2, 144:148] = 0  # scale and minimum
    layer = PackedLinear.from_quantized(from_blocks(data, "Q4_K"), 4, None)
    assert block_type(layer) == "Q4_K"
    again = PackedLinear.from_quantized(from_blocks(to_blocks(layer, "Q4_K"), "Q4_K"), 4, None)
    for one, other in zip(
        (layer.codes(), layer.scale, layer.zero_point), (again.codes(), again.scale, again.zero_point)
    ):
        assert torch.equal(one, other)


def test_peqa_on_the_files_integers(tmp_path):
    path = llama(tmp_path / "model.gguf")
    model = get_peft_model(load_packed(path), PeqaConfig(task_type="CAUSAL_LM"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
                parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        for again in (AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), load(str(tmp_path / "adapter"))):
            assert torch.equal(again(input_ids=IDS).logits, expected)
            assert again.peft_config["default"].base_model_name_or_path == str(path)
    with pytest.raises(ValueError, match=r"quantized already with .*'bits': 4|quantised already with .*'bits': 4"):
        get_peft_model(load_packed(path), PeqaConfig(bits=3))


def test_an_adapter_on_floats_keeps_floats(tmp_path):
    """`load` takes the file's own integers for adapters that were trained on these alone."""
    path = llama(tmp_path / "model.gguf")
    model = get_peft_model(load(str(path)), PeqaConfig(bits=3, init_method="minmax", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(load(str(tmp_path / "adapter"))(input_ids=IDS).logits, model(input_ids=IDS).logits)
    lora = get_peft_model(load(str(path), packed=True), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert any(isinstance(module, PackedLinear) for module in lora.modules())


@pytest.mark.parametrize("kind", ["causal", "encoder", "classifier"])
def test_load_packed_of_each_kind(kind, tmp_path):
    path = llama(tmp_path / "model.gguf")
    model = load(str(path), kind=kind, packed=True)
    assert len(packed_layers(model)) == 14 + (kind == "causal")
    assert not packed_layers(load(str(path), kind=kind))
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        again = load(str(tmp_path / "saved"), kind=kind)
        assert torch.equal(again(input_ids=IDS[:1])[0], model(input_ids=IDS[:1])[0])


def test_another_class_and_dtype(tmp_path):
    path = llama(tmp_path / "model.gguf")
    model = load_packed(path, AutoModelForSequenceClassification, num_labels=3, dtype=torch.bfloat16)
    assert len(packed_layers(model)) == 14 and model.score.out_features == 3
    layer = next(iter(packed_layers(model).values()))
    assert layer.scale.dtype == torch.float32 and layer.compute_dtype == torch.bfloat16
    assert model(input_ids=IDS[:1]).logits.dtype == torch.bfloat16


def test_by_folder_and_name(tmp_path):
    llama(tmp_path / "model.gguf")
    model = load_packed(tmp_path, gguf_file="model.gguf")
    assert_same_layers(model, load_packed(str(tmp_path / "model.gguf")))


def test_what_has_levels_of_its_own_becomes_floats(tmp_path):
    config = LlamaConfig(**SIZES)
    path = write_gguf(tmp_path / "model.gguf", "llama", config, lambda name: "IQ4_NL" if "attn_v" in name else "Q4_0")
    with pytest.warns(
        UserWarning, match=r"2 weights of model.gguf are IQ4_NL and become floats .*'blk.0.attn_v.weight'"
    ):
        model = load_packed(path)
    assert len(packed_layers(model)) == 13 and type(model.model.layers[0].self_attn.v_proj) is torch.nn.Linear
    assert_same_model(model, stock(path))


def test_nothing_to_pack(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", LlamaConfig(**SIZES), lambda name: "F32")
    with pytest.raises(
        ValueError, match=r"model.gguf' has no weights that packed layers can take .*F32 x16.*peft_ext.load"
    ):
        load_packed(path)
    assert not packed_layers(load(str(path)))


def test_damaged_and_split_files(tmp_path):
    whole = llama(tmp_path / "model.gguf").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"none.gguf': there is no such GGUF file"):
        load_packed(tmp_path / "none.gguf")
    for left, match in (
        (3, "truncated"),
        (200, "truncated"),
        (len(whole) - 5000, r"ends before its tensor 'blk.1.*truncated"),
    ):
        (tmp_path / "cut.gguf").write_bytes(whole[:left])
        for function in (load_packed, lambda path: load(str(path))):
            with pytest.raises(ValueError, match=rf"cut.gguf.*{match}.*Download or copy it again"):
                function(tmp_path / "cut.gguf")
    (tmp_path / "other.gguf").write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ValueError, match=r"other.gguf' is no GGUF"):
        load_packed(tmp_path / "other.gguf")
    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(whole)
    for function in (load_packed, lambda path: load(str(path))):
        with pytest.raises(ValueError, match=r"one of 3 parts of a model; join them first: llama-gguf-split --merge"):
            function(part)


def test_a_renamed_part_is_recognised(tmp_path):
    config = LlamaConfig(**SIZES)
    path = write_gguf(tmp_path / "model.gguf", "llama", config, lambda name: "Q4_0", split__count=2)
    with pytest.raises(ValueError, match=r"model.gguf' is one of 2 parts"):
        load_packed(path)


def test_a_missing_layer_is_no_random_one(tmp_path):
    path = llama(tmp_path / "model.gguf")
    content = path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.gguf' has no tensor for 'model.layers.1.mlp.up_proj'"):
        load_packed(path)


def test_scales_that_no_weight_has(tmp_path):
    path = llama(tmp_path / "model.gguf", "Q4_0")
    tensor = read_header(path).tensors["blk.1.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    content[tensor.start : tensor.start + 2] = np.array([np.nan], np.float16).tobytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.mlp.up_proj': scale"):
        load_packed(path)


@pytest.mark.parametrize(
    "conversion, expected",
    [
        (lambda weight: weight, [0, 1, 2, 3]),
        (lambda weight: weight[::-1], [3, 2, 1, 0]),
        (lambda weight: weight.reshape(2, 2, 8).swapaxes(0, 1).reshape(4, 8), [0, 2, 1, 3]),  # knows the width
        (lambda weight: weight - 1, None),
        (lambda weight: 2 * weight, None),
        (lambda weight: weight[:, ::-1], None),
        (lambda weight: np.concatenate([weight[:2], weight[:2]]), None),
        (lambda weight: weight.T, None),
    ],
)
def test_a_conversion_is_asked_for_its_rows(conversion, expected):
    rows = rows_of(lambda weight: {"w": conversion(weight)}, "w", (4, 8))
    assert (None if rows is None else rows.tolist()) == expected
