# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The GGUF export of SmolLM2-135M-Instruct, run by llama.cpp: greedy text against transformers' on the same weights.

llama.cpp rounds what goes into a quantised matrix to 8 bits, so its logits differ from ours by some tenths; where it
takes another token, ours must have been about as likely. From a file with the same weights as floats, which it doesn't
round, the text must be equal.
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_ext import PeqaConfig, calibrate
from peft_ext.checkpoint.gguf import export_gguf
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.quant.conversion import dequantize_layers, packed_layers


pytestmark = pytest.mark.real

TOKENS = 32
NEAR = 0.5  # logits, whose standard deviation over the vocabulary is 3 to 4
FORMATS = {
    "4bit-sym-groups": {"bits": 4, "group_size": 32, "sym": True},  # Q4_0, the codes as they are
    "4bit-float-zeros": {"bits": 4, "group_size": 32, "zero": "float"},  # Q4_1
    "4bit-channel": {"bits": 4},  # Q4_1
    "3bit-channel": {"bits": 3, "init_method": "calibrated"},  # Q4_0
}


@pytest.fixture(scope="session")  # before the model's, so that nothing is read where this skips
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[str]:
    chat = [{"role": "user", "content": "Name three uses of a brick."}]
    return [
        "The capital of France is",
        "def fibonacci(n):\n",
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
    ]


@pytest.mark.parametrize("kwargs", FORMATS.values(), ids=FORMATS)
def test_llama_cpp_writes_the_same_text(kwargs, llama_cpp, smollm2, tokenizer, blocks, prompts, tmp_path):
    config = PeqaConfig(target_modules="all-linear", **kwargs)
    model = smollm2()
    if config.init_method == "calibrated":
        calibrate(model, config, [{"input_ids": blocks.train[:8]}], progressbar=False)
    model = get_peft_model(model, config).merge_and_unload().eval()
    packed = export_gguf(model, tokenizer, tmp_path / "packed.gguf")
    # what the file holds: scales in float16
    for layer in packed_layers(model).values():
        layer.scale.data = layer.scale.data.half().float()
    make_saveable(dequantize_layers(model))
    floats = export_gguf(model, tokenizer, tmp_path / "floats.gguf", other_tensors="f32")
    assert packed.stat().st_size < 0.25 * floats.stat().st_size

    ours = [greedy(model, tokenizer, prompt) for prompt in prompts]
    for name, path in (("floats", floats), ("packed", packed)):
        theirs = greedy_in_llama_cpp(llama_cpp, path, prompts)
        for prompt, (ids, new), (their_ids, their_new) in zip(prompts, ours, theirs):
            assert their_ids == ids
            position = first_difference(new, their_new)
            if position is not None:
                gap = logit_gap(model, ids + new[:position], new[position], their_new[position])
                print(
                    f"{prompt[-30:]!r}, token {position}: {tokenizer.decode(new[position])!r} became "
                    f"{tokenizer.decode(their_new[position])!r}, {gap:.3f} less likely in logits"
                )
                assert name == "packed" and gap < NEAR


def greedy(model, tokenizer, prompt: str) -> tuple[list[int], list[int]]:
    """The prompt's ids, and those that follow."""
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(
        **inputs, max_new_tokens=TOKENS, do_sample=False, repetition_penalty=1.0, pad_token_id=tokenizer.pad_token_id
    )
    length = inputs["input_ids"].shape[1]
    return tokens[0, :length].tolist(), tokens[0, length:].tolist()


def greedy_in_llama_cpp(llama_cpp, path, prompts: list[str]) -> list[tuple[list[int], list[int]]]:
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False)
    texts = []
    for prompt in prompts:
        ids, new = model.tokenize(prompt.encode(), special=True), []
        model.reset()
        for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
            new.append(token)
            if len(new) == TOKENS or token == model.token_eos():
                break
        texts.append((ids, new))
    return texts


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    return next((i for i, (one, other) in enumerate(zip(ours, theirs)) if one != other), None)


@torch.no_grad()
def logit_gap(model, ids: list[int], ours: int, theirs: int) -> float:
    """How much less likely our model finds the other token."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return (logits[ours] - logits[theirs]).item()
