# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What `save_pretrained` writes can be read: by stock transformers, in a process that has never heard of us, and by us."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.checkpoint.pack_quantized import OWN_BITS
from peft_ext.checkpoint.stock_loading import loads_without_weights
from peft_ext.quant.conversion import packed_layers
from tests.tiny import families
from tests.tiny.models import logits_of


AS_STOCK = """
import hashlib, json, sys, torch, transformers
if sys.argv[2] == "ours":
    import peft_ext
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
layers = {name: type(module).__module__ + type(module).__name__ for name, module in model.named_modules()}
tensors = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in model.state_dict().items()}
with torch.no_grad():
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten().tolist()
after = sorted(model.state_dict())
traces = [hasattr(model, name) for name in ("hf_quantizer", "ct_decompress_hook")]
print(json.dumps([layers, tensors, logits, after, traces]))
"""

# Models whose own code reads `layer.weight` while they are initialised, and two that don't.
READ_WEIGHTS = ("t5", "falcon", "mamba", "gpt_bigcode", "recurrent_gemma", "modernbert", "gemma3_vl", "paligemma")
OTHERS = ("llama", "bart")

STOCK = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
for auto_class, folder in json.loads(sys.argv[1]):
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**load_file(folder + "/batch.safetensors"))[0]
    save_file({"logits": logits.contiguous()}, folder + "/stock.safetensors")
assert "peft_ext" not in sys.modules
"""


def save_base(model, batch, folder, config):
    """A packed base in a folder, with a batch and its logits."""
    base = get_peft_model(model, config).unload().eval()
    base.save_pretrained(folder)
    with torch.no_grad():
        logits = logits_of(base, batch)
    save_file({key: value.contiguous() for key, value in batch.items()}, folder / "batch.safetensors")
    return logits, len(packed_layers(base))


def check_read(fresh_process, saved):
    """`saved`: folder -> (auto class, logits, number of packed layers)."""
    jobs = [(auto_class, str(folder)) for folder, (auto_class, *_) in saved.items()]
    fresh_process(STOCK, json.dumps(jobs))
    for folder, (auto_class, logits, layers) in saved.items():
        torch.testing.assert_close(load_file(folder / "stock.safetensors")["logits"], logits, rtol=1e-4, atol=1e-4)
        ours = getattr(transformers, auto_class).from_pretrained(folder)
        assert len(packed_layers(ours)) == layers
        with torch.no_grad():
            torch.testing.assert_close(logits_of(ours, load_file(folder / "batch.safetensors")), logits)


@pytest.mark.parametrize("sym", [True, False])
def test_every_kind_of_model_is_read(fresh_process, tmp_path, sym):
    saved = {}
    for name in (*READ_WEIGHTS, *OTHERS):
        folder, auto_class = tmp_path / name, families.FAMILIES[name].auto_class
        # vision towers stay float unless they are named
        targets = r".*\.(q_proj|k_proj|v_proj|out_proj|o_proj|fc1|fc2)" if "Image" in auto_class else None
        config = PeqaConfig(bits=4, group_size=16, sym=sym, init_method="minmax", target_modules=targets)
        saved[folder] = (auto_class, *save_base(families.build(name), families.batch(name), folder, config))
        flag = json.loads((folder / "config.json").read_text())["quantization_config"].get("dequantize", False)
        assert flag is (not sym or name in READ_WEIGHTS)
    check_read(fresh_process, saved)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_of_few_outputs_are_read(fresh_process, tmp_path, bits):
    saved = {}
    for outputs in (4, 8, 12):
        sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": outputs}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
        config = PeqaConfig(bits=bits, group_size=16, init_method="minmax")
        folder = tmp_path / str(outputs)
        saved[folder] = ("AutoModelForCausalLM", *save_base(model, families.batch("llama"), folder, config))
    check_read(fresh_process, saved)


def test_whatever_the_models_own_code_raises_counts(monkeypatch):
    model = families.build("llama")
    assert loads_without_weights(model, ["model.layers.0.mlp.up_proj"])
    monkeypatch.setattr(type(model), "_init_weights", lambda self, module: 1 / 0)
    assert not loads_without_weights(model, ["model.layers.0.mlp.up_proj"])


@pytest.mark.parametrize("sym", [True, False])
def test_somebody_elses_checkpoint_is_loaded_as_stock_loads_it(sym, fresh_process, tmp_path):
    """Without our mark the very same files are somebody else's."""
    base = get_peft_model(families.build("llama"), PeqaConfig(bits=4, group_size=16, sym=sym)).unload()
    base.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config[OWN_BITS]
    path.write_text(json.dumps(config))
    stock, ours = (json.loads(fresh_process(AS_STOCK, tmp_path, who)) for who in ("stock", "ours"))
    assert ours == stock
    assert not any("PackedLinear" in kind for kind in ours[0].values())


@pytest.mark.parametrize(
    "config", [PeqaConfig(bits=4, init_method="minmax"), AlphaTuningConfig(bits=2, init_method="greedy")]
)
@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_blocks_that_a_model_ties_are_packed_one_by_one(name, config, tmp_path):
    """And its embeddings stay tied, also in what is saved from what was loaded."""
    model, batch = get_peft_model(families.build(name), copy.deepcopy(config)).unload().eval(), families.batch(name)
    shared = [layer for key, layer in packed_layers(model).items() if key.endswith("o_proj")]
    assert len(shared) == 2
    shared[1].scale.data *= 1.1  # as if an adapter had been merged
    for generation in ("first", "second"):
        model.save_pretrained(tmp_path / generation)
        loaded = type(model).from_pretrained(tmp_path / generation)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        with torch.no_grad():
            torch.testing.assert_close(logits_of(loaded, batch), logits_of(model, batch))
        model = loaded
