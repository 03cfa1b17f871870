# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""GGUF: blocks with our codes, read back by `gguf`; whole models, read back by transformers; nothing half-written."""

from __future__ import annotations

import copy
import errno
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.checkpoint.gguf import export_gguf
from peft_ext.checkpoint.gguf_blocks import block_type, from_blocks, to_blocks, why_no_blocks
from peft_ext.checkpoint.gguf_tokenizer import recognize
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.models import load
from peft_ext.quant.binary import BinaryQuantized, dequantize_binary
from peft_ext.quant.conversion import dequantize_layers, packed_layers
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.uniform import Quantized, dequantize
from tests.cases import assert_same, move_adapter
from tests.checkpoint.gguf_files import dequantized_blocks
from tests.tiny.models import HEADS, HIDDEN, LAYERS, inputs, logits_of, tiny
from tests.tiny.tokenizers import byte_tokenizer, sentencepiece_tokenizer, tiny_tokenizer


F16 = 2.0**-11  # relative error of rounding to float16
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def random_layer(
    bits: int, groups: int, group_size: int, out_features: int = 5, zero_point: int | None = None, seed: int = 0
) -> PackedLinear:
    """zero_point: of all groups; None: anything."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out_features, groups * group_size), generator=generator, dtype=torch.uint8)
    scale = torch.randn(out_features, groups, generator=generator) * 0.1
    zero_points = torch.randint(0, 2**bits, scale.shape, generator=generator, dtype=torch.uint8)
    if zero_point is not None:
        zero_points.fill_(zero_point)
    return PackedLinear.from_quantized(Quantized(codes, scale, zero_points), bits, None)


def read_blocks(layer: PackedLinear, name: str) -> np.ndarray:
    return dequantized_blocks(to_blocks(layer, name), name)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, 96]),
    out_features=st.integers(1, 40),
    middle=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_blocks_hold_the_codes(bits, groups, group_size, out_features, middle, seed):
    layer = random_layer(bits, groups, group_size, out_features, 2 ** (bits - 1) if middle else None, seed)
    name = block_type(layer)
    if name is None:
        assert bits == 8 and not middle
        return
    weight = read_blocks(layer, name)
    assert weight.shape == (out_features, groups * group_size)
    wide = {"d": layer.scale.detach().half().float(), "z": layer.zero_point.float()}
    wide = {key: value.repeat_interleave(group_size, dim=1).numpy() for key, value in wide.items()}
    # levels are whole scales apart, so this finds the code
    assert np.array_equal(np.rint(weight / wide["d"] + wide["z"]), layer.codes().numpy())
    exact = wide["d"] * (layer.codes().numpy() - wide["z"])
    minimum = np.abs(wide["d"] * wide["z"]) * F16 if name.endswith("1") else 0
    assert (np.abs(weight - exact) <= minimum + 1e-6).all()
    if name == "Q2_0":
        return  # the sign of its scale turns
    # and the scale itself
    half = layer.scale.detach().half().repeat_interleave(group_size // 32, dim=1).numpy()
    row_bytes = to_blocks(layer, name).reshape(
        out_features, -1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    )
    assert np.array_equal(row_bytes[..., :2].copy().view(np.float16)[..., 0], half)


@pytest.mark.parametrize(
    "bits, zero_point, expected",
    [
        (2, None, "Q4_0"),
        (3, None, "Q4_0"),
        (4, 8, "Q4_0"),
        (4, None, "Q4_1"),
        (5, 16, "Q5_0"),
        (5, None, "Q5_1"),
        (6, None, "Q8_0"),
        (7, None, "Q8_0"),
        (8, 128, "Q8_0"),
        (8, None, None),
    ],
)
def test_the_smallest_type_that_fits(bits, zero_point, expected):
    assert block_type(random_layer(bits, 2, 64, zero_point=zero_point)) == expected


@pytest.mark.parametrize(
    "bits, group_size, zero_point, expected",
    [
        (2, 64, 2, "Q2_0"),
        (2, 192, 2, "Q2_0"),
        (2, 128, 1, "Q2_0"),
        (2, 64, 0, "Q4_0"),  # levels 0 to 3
        (2, 32, 2, "Q4_0"),
        (2, 96, 2, "Q4_0"),
        (3, 64, 4, "Q4_0"),
    ],
)
def test_types_of_two_bits(bits, group_size, zero_point, expected):
    layer = random_layer(bits, 2, group_size, zero_point=zero_point)
    assert block_type(layer, low_bit_types=True) == expected
    rounded = Quantized(layer.codes(), layer.scale.detach().half().float(), layer.zero_point)
    assert np.array_equal(read_blocks(layer, expected), dequantize(*rounded).numpy())


def test_two_bits_come_back_as_they_were():
    layer = random_layer(2, 3, 64, zero_point=2)
    layer.scale.data = layer.scale.data.abs().half().float()
    again = from_blocks(to_blocks(layer, "Q2_0"), "Q2_0")
    for one, other in zip(again, (layer.codes(), layer.scale, layer.zero_point)):
        assert torch.equal(one, other)


def test_one_bit():
    """Binary codings, and 2-bit codes that were read from Q1_0."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (7, 384), generator=generator, dtype=torch.uint8)
    alpha = torch.rand(7, 3, 1, generator=generator)
    binary = PackedLinear.from_quantized(BinaryQuantized(codes, alpha), 1, None)
    assert block_type(binary, low_bit_types=True) == "Q1_0"
    assert block_type(binary) is None and "low_bit_types=True allows" in why_no_blocks(binary)
    assert np.array_equal(read_blocks(binary, "Q1_0"), dequantize_binary(codes, alpha.half().float()).numpy())
    data = to_blocks(binary, "Q1_0")
    read = PackedLinear.from_quantized(from_blocks(data, "Q1_0"), 2, None, sym=True)
    assert block_type(read, low_bit_types=True) == "Q1_0" and np.array_equal(to_blocks(read, "Q1_0"), data)
    read = PackedLinear.from_quantized(
        Quantized(codes, alpha[..., 0], torch.full((7, 3), 2, dtype=torch.uint8)), 2, None
    )
    assert block_type(read, low_bit_types=True) == "Q2_0"  # it uses other levels
    narrow = PackedLinear.from_quantized(BinaryQuantized(codes, torch.rand(7, 6, 1)), 1, None)
    assert block_type(narrow, low_bit_types=True) is None and "groups of a multiple of 128, not 64" in why_no_blocks(
        narrow
    )


def test_groups_that_are_no_blocks():
    assert block_type(random_layer(4, 2, 16)) is None
    assert block_type(random_layer(4, 2, 48)) is None
    assert block_type(random_layer(4, 1, 40)) is None


def float_model(name: str, tokenizer) -> transformers.PreTrainedModel:
    """A tiny model for a tokenizer."""
    if name == "llama":
        model = tiny(name)
    elif name == "gpt2":
        config = tiny(name).config
        config.n_positions = 1024  # which transformers' reader takes for granted, as it does Qwen3's head_dim
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        kinds = {
            "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
            "llama3-positions": (transformers.LlamaConfig, {"attention_bias": True, "rope_parameters": LLAMA3_ROPE}),
            "mistral": (transformers.MistralConfig, {"sliding_window": 32}),
            "qwen2": (transformers.Qwen2Config, {}),
            "qwen3": (transformers.Qwen3Config, {"head_dim": 128}),
        }
        kind, kwargs = kinds[name]
        config = kind(
            vocab_size=100,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            max_position_embeddings=64,
            initializer_range=0.2,
            **kwargs,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_()
    model.resize_token_embeddings(len(tokenizer))
    return model


def packed_model(name: str, tokenizer, config=None) -> transformers.PreTrainedModel:
    config = config or PeqaConfig(bits=4, sym=True)
    config.target_modules = "all-linear"
    model = get_peft_model(float_model(name, tokenizer), config)
    move_adapter(model)
    return model.merge_and_unload().eval()


def load_back(path) -> transformers.PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model, inputs("llama"))


def round_scales(model) -> transformers.PreTrainedModel:
    """The same model with its scales in float16's precision."""
    model = copy.deepcopy(model)
    for layer in packed_layers(model).values():
        layer.scale.data = layer.scale.data.half().float()
    return model


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"bits": 4, "sym": True},
        {"bits": 3, "group_size": 32},
        {"bits": 3, "sym": True, "bits_pattern": {"q_proj": 2, "v_proj": 4, "up_proj": 8, "c_fc": 2}},
    ],
    ids=["4bit-channel", "3bit-groups", "widths"],
)
def test_transformers_reads_the_same_model(name, kwargs, tmp_path):
    tokenizer = byte_tokenizer()
    model = packed_model(name, tokenizer, PeqaConfig(**kwargs))
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", other_tensors="f32")
    assert path == tmp_path / "model.gguf"
    loaded = load_back(path)
    assert_same(logits(loaded), logits(round_scales(model)))
    # what the scales' rounding costs
    assert_same(logits(loaded), logits(model), tolerance=2e-2)
    length = {"mistral": 32, "gpt2": 1024}.get(name, 64)
    assert loaded.config.max_position_embeddings == length


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({"bits": 2}, "Q4_0"),
        ({"bits": 4, "group_size": 32}, "Q4_1"),
        ({"bits": 8, "sym": True}, "Q8_0"),
        ({"bits": 8}, "F16"),
        ({"bits": 4, "group_size": 16}, "F16"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*stored as F16")
def test_gguf_reads_the_same_weights(kwargs, expected, tmp_path):
    tokenizer = byte_tokenizer()
    model = packed_model("llama", tokenizer, PeqaConfig(**kwargs))
    reader = gguf.GGUFReader(export_gguf(model, tokenizer, tmp_path / "model.gguf"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, layer in packed_layers(model).items():
        tensor = tensors[names.get_name(name) + ".weight"]
        assert tensor.tensor_type.name == expected
        read = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp rotates dimensions 2 i and 2 i + 1 of a head, transformers i and i + half
            heads = read.view(-1, HIDDEN // HEADS, HIDDEN)
            read = torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).view(-1, HIDDEN)
        weight = layer.dequantize()
        assert ((read - weight).abs() <= 2 * F16 * weight.abs().amax()).all()
    assert tensors["token_embd.weight"].tensor_type.name == "F16"
    assert tensors["output_norm.weight"].tensor_type.name == "F32"


def test_biases_of_a_llama_are_ordered_like_the_weights(tmp_path):
    """transformers' reader drops them."""
    config = tiny("llama").config
    config.attention_bias = True
    model = transformers.LlamaForCausalLM(config)
    model.resize_token_embeddings(len(byte_tokenizer()))
    size = HIDDEN // HEADS
    bias = model.model.layers[1].self_attn.q_proj.bias.data.copy_(torch.arange(float(HIDDEN)))
    reader = gguf.GGUFReader(export_gguf(model, byte_tokenizer(), tmp_path / "model.gguf"))
    (read,) = (tensor.data for tensor in reader.tensors if tensor.name == "blk.1.attn_q.bias")
    for head in range(HEADS):
        for index in range(size // 2):
            assert read[head * size + 2 * index] == bias[head * size + index]
            assert read[head * size + 2 * index + 1] == bias[head * size + size // 2 + index]


@pytest.mark.parametrize("other, expected", [("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0"), ("f32", "F32")])
def test_the_type_of_other_tensors(other, expected, tmp_path):
    tokenizer = byte_tokenizer()
    model = packed_model("gpt2", tokenizer)
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", other_tensors=other)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["token_embd.weight"] == expected
    assert types["position_embd.weight"] == types["blk.0.attn_qkv.bias"] == "F32"
    assert_same(logits(load_back(path)), logits(model), tolerance=5e-2)


def test_layers_that_stay_float(tmp_path):
    """Conv1D and nn.Linear that nothing was tuned on."""
    tokenizer = byte_tokenizer()
    for name, targets in (("gpt2", ["c_attn"]), ("llama", ["q_proj"])):
        config = PeqaConfig(bits=4, target_modules=targets, fan_in_fan_out=name == "gpt2")
        model = get_peft_model(float_model(name, tokenizer), config).merge_and_unload().eval()
        path = export_gguf(model, tokenizer, tmp_path / f"{name}.gguf", other_tensors="f32")
        assert_same(logits(load_back(path)), logits(model), tolerance=1e-2)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_binary_codings_become_floats_with_a_warning(group_size, tmp_path):
    tokenizer = byte_tokenizer()
    model = packed_model("llama", tokenizer, AlphaTuningConfig(bits=3, group_size=group_size))
    with pytest.warns(UserWarning, match="14 packed layers are stored as F32 .* binary codings .*q_proj"):
        path = export_gguf(model, tokenizer, tmp_path / "model.gguf", other_tensors="f32")
    assert_same(logits(load_back(path)), logits(model))


@pytest.mark.parametrize(
    "kwargs, reason", [({"bits": 8}, "asymmetric codes of 8 bits"), ({"bits": 4, "group_size": 16}, "groups of 16")]
)
def test_other_layers_without_blocks_warn(kwargs, reason, tmp_path):
    model = packed_model("gpt2", byte_tokenizer(), PeqaConfig(**kwargs))
    with pytest.warns(UserWarning, match=f"stored as F16 .*{reason}"):
        export_gguf(model, byte_tokenizer(), tmp_path / "model.gguf")


@pytest.mark.parametrize("sym", [True, False])
def test_a_packed_base_from_disk_keeps_its_codes(sym, tmp_path):
    """transformers loads symmetric ones compressed and asymmetric ones as floats."""
    tokenizer = byte_tokenizer()
    model = packed_model("llama", tokenizer, PeqaConfig(bits=4, sym=sym))
    model.save_pretrained(tmp_path / "base")
    expected = export_gguf(model, tokenizer, tmp_path / "expected.gguf")
    loaded = load(str(tmp_path / "base"))
    before = logits(loaded)
    path = export_gguf(loaded, tokenizer, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in gguf.GGUFReader(expected).tensors:
        assert np.array_equal(tensors[tensor.name].data, tensor.data), tensor.name
    assert_same(logits(loaded), before)  # the model works on


def test_llama3_positions(tmp_path):
    tokenizer = byte_tokenizer()
    config = tiny("llama").config
    config.rope_parameters = LLAMA3_ROPE
    model = transformers.LlamaForCausalLM(config)
    model.resize_token_embeddings(len(tokenizer))
    reader = gguf.GGUFReader(export_gguf(model, tokenizer, tmp_path / "model.gguf"))
    (factors,) = (tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    expected = []  # as llama.cpp's converter
    for frequency in 1 / (500.0 ** (np.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS))):
        wave = 2 * np.pi / frequency
        smooth = (64 / wave - 1) / (4 - 1)
        expected.append(1 if wave < 64 / 4 else 8 if wave > 64 else 1 / ((1 - smooth) / 8 + smooth))
    assert 1 in expected and len(set(expected)) > 2
    np.testing.assert_allclose(factors, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama3-positions", "mistral", "qwen2", "qwen3", "gpt2"])
def test_llama_cpp_computes_the_same(name, tmp_path):
    """With float files, since it rounds what goes into a quantised matrix."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    tokenizer = byte_tokenizer()
    model = packed_model(name, tokenizer)
    tokens = inputs("llama")["input_ids"][1]
    with torch.no_grad():
        expected = model(input_ids=tokens[None]).logits[0]
    make_saveable(dequantize_layers(model))
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", other_tensors="f32")
    engine = llama_cpp.Llama(str(path), n_ctx=32, n_threads=1, logits_all=True, verbose=False)
    engine.eval(tokens.tolist())
    assert_same(torch.from_numpy(engine.scores[: len(tokens)].copy()), expected, tolerance=2e-3)


def test_linear_positions(tmp_path):
    config = tiny("llama").config
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    model = transformers.LlamaForCausalLM(config)
    model.resize_token_embeddings(len(byte_tokenizer()))
    reader = gguf.GGUFReader(export_gguf(model, byte_tokenizer(), tmp_path / "model.gguf"))
    assert reader.fields["llama.rope.scaling.type"].contents() == "linear"
    assert reader.fields["llama.rope.scaling.factor"].contents() == 4.0


def with_bos(tokenizer):
    """The same tokenizer, which now starts texts with <s>, has a chat template and an added word."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_tokens(["<tool>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TEXTS = ["the hat sat", "that's  4 bäths\n🦙", "<tool>a b 123<s>", ""]


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_tokenizer])
def test_transformers_reads_the_same_tokenizer(make, tmp_path):
    tokenizer = with_bos(make())
    model = float_model("llama", tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 3)  # padded
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    loaded = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        assert loaded(text).input_ids == tokenizer(text).input_ids, text
    assert loaded.chat_template == TEMPLATE
    assert (loaded.bos_token, loaded.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    fields = gguf.GGUFReader(path).fields
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[-3:] == [gguf.TokenType.UNUSED] * 3
    assert types[tokenizer.bos_token_id] == gguf.TokenType.CONTROL
    assert types[tokenizer.convert_tokens_to_ids("<tool>")] == gguf.TokenType.USER_DEFINED
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    if make is sentencepiece_tokenizer:
        assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
        # the trainer numbers tokens in the order of their merges; the highest score is merged first
        scores = dict(zip(fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.scores"].contents()))
        merged = [scores[token] for token in tokenizer.convert_ids_to_tokens(range(280, 300))]
        assert merged == sorted(merged, reverse=True) and len(set(merged)) == 20


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_tokenizer])
def test_llama_cpp_cuts_text_the_same_way(make, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    tokenizer = with_bos(make())
    path = export_gguf(float_model("llama", tokenizer), tokenizer, tmp_path / "model.gguf")
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    # it puts SentencePiece's space before text that follows a token such as <tool>, too
    texts = [text for text in (*TEXTS, " the  best") if make is byte_tokenizer or "<tool>" not in text]
    for text in texts:
        ids = engine.tokenize(text.encode(), special=True)
        assert ids == tokenizer(text).input_ids, text
    assert engine.metadata["tokenizer.chat_template"] == TEMPLATE


def test_a_tokenizer_without_bos_says_so(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    path = export_gguf(float_model("llama", tokenizer), tokenizer, tmp_path / "model.gguf")
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_tokens_without_an_embedding_are_left_out(tmp_path):
    tokenizer = byte_tokenizer()
    model = float_model("llama", tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.warns(UserWarning, match="1 tokens .*'<new>'"):
        path = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert len(gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].data) == len(tokenizer) - 1


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def splits(pattern: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


@pytest.mark.parametrize(
    "pre_tokenizer, ignore_merges, expected",
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            False,
            "smollm",
        ),
        (splits(LLAMA3), True, "llama-bpe"),
        (splits(LLAMA3), False, "smaug-bpe"),
        (splits(QWEN2), False, "qwen2"),
    ],
)
def test_pre_tokenizers_are_recognised(pre_tokenizer, ignore_merges, expected):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.backend_tokenizer.model.ignore_merges = ignore_merges
    assert recognize(tokenizer) == expected


def test_an_unknown_pre_tokenizer_can_be_named(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = splits(r"\p{N}{1,2}|\P{N}+")
    model = float_model("llama", tokenizer)
    with pytest.raises(ValueError, match="none of .*'smollm'.*pre_tokenizer="):
        export_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", pre_tokenizer="tekken")
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == "tekken"


def _with_config(name: str, **changes):
    model = float_model(name, byte_tokenizer())
    for key, value in changes.items():
        setattr(model.config, key, value)
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tiny("opt"), "OPTForCausalLM can't be .*LlamaForCausalLM.*GPT2LMHeadModel"),
        (lambda: tiny("llama").model, "LlamaModel"),
        (lambda: get_peft_model(tiny("llama"), PeqaConfig(bits=4)), "merge_and_unload"),
        (lambda: get_peft_model(tiny("llama"), PeqaConfig(bits=4)).base_model.model, "merge_and_unload"),
        (lambda: tiny("llama").to("meta"), "meta device"),
        (lambda: _with_config("llama", hidden_act="gelu"), "hidden_act.*'gelu'"),
        (lambda: _with_config("gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (lambda: _with_config("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}), "yarn"),
    ],
)
def test_models_that_llama_cpp_does_not_have(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_gguf(make(), byte_tokenizer(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path):
    tokenizer = byte_tokenizer()
    model = float_model("llama", tokenizer)
    with pytest.raises(ValueError, match="other_tensors='q4_k' is unknown.*'q8_0'"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf", other_tensors="q4_k")
    with pytest.raises(ValueError, match="BPE, this one is WordLevel"):
        export_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        export_gguf(model, tokenizer, tmp_path / "missing" / "model.gguf")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        export_gguf(model, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_beyond_float16(tmp_path):
    tokenizer = byte_tokenizer()
    model = packed_model("llama", tokenizer)
    model.model.layers[1].mlp.up_proj.scale.data[0] = 1e6
    with pytest.raises(ValueError, match="layer 'model.layers.1.mlp.up_proj': the scales reach 1e[+]06"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf")
    model = packed_model("llama", tokenizer)
    model.lm_head.weight.data[0] = 1e6
    with pytest.raises(ValueError, match="'output.weight' has values beyond float16.*bf16"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_disk_full(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    model = packed_model("llama", tokenizer)
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    before = path.read_bytes()
    write, written = gguf.GGUFWriter.write_tensor_data, []

    def full(self, tensor, *args):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(tensor)
        write(self, tensor, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    for target in (path, tmp_path / "new.gguf"):
        written.clear()
        with pytest.raises(OSError, match="No space left"):
            export_gguf(model, tokenizer, target)
        assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
        assert path.read_bytes() == before


def test_gguf_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install 'peft-ext"):
        export_gguf(tiny("llama"), byte_tokenizer(), tmp_path / "model.gguf")
