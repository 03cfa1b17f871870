# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A critic with linear action values, written as a LoRA on the output head, steers as the processor does."""

from __future__ import annotations

import json

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from generation_ext.critic import Critic, CriticLogitsProcessor
from generation_ext.critic.to_lora import head_lora
from peft_ext.language_model import backbone
from tests.generation_ext.critic.reference import build, random_critic
from tests.tiny.families import build as family
from tests.tiny.models import tiny


STRENGTH = 2.5
IDS = torch.tensor([[9, 3, 77, 4, 61, 12, 30]])
LINEAR = {"action_values": True, "action_form": "linear"}


def linear_critic(model, **kwargs) -> Critic:
    """Random, with states that aren't centred, which a head without bias must take as they are."""
    return random_critic(model, **{**LINEAR, "action_rank": 3, **kwargs})


def inputs(model) -> dict[str, torch.Tensor]:
    if model.config.is_encoder_decoder:
        return {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    return {"input_ids": IDS}


@torch.no_grad()
def steered(model, critic, top_k=None, strength=STRENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token's distribution by the processor, and without it."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    with CriticLogitsProcessor(model, critic, top_k or vocabulary, strength, mode="action-value") as processor:
        output = model(**inputs(model))
        ids = output.logits.new_zeros(1, output.logits.shape[1], dtype=torch.long)
        ids[:] = inputs(model).get("decoder_input_ids", IDS)
        scores = output.logits[:, -1].float()
        return processor(ids, scores.clone()).log_softmax(-1), scores.log_softmax(-1)


@torch.no_grad()
def loaded(model, folder, **kwargs):
    return peft.PeftModel.from_pretrained(model, str(folder), **kwargs).eval()


# cohere2 and granite scale their logits, t5 (tied) its states, OPT's head reads a projection, phi's and gptj's have a bias
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "cohere2", "granite", "opt", "gptj", "t5", "bart", "gemma3_vl", "mamba"]
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_the_same_distribution_over_all_tokens(name, tmp_path):
    model = tiny(name) if name in ("t5", "bart") else family(name)
    critic = linear_critic(model)
    expected, plain = steered(model, critic)
    assert (expected - plain).abs().max() > 0.5, "nothing is steered"
    critic.to_lora(model, tmp_path / "adapter", strength=STRENGTH)
    with torch.no_grad():
        found = loaded(model, tmp_path / "adapter")(**inputs(model)).logits[:, -1].float().log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("strength", [-1.0, 4.0])
def test_ranks_and_strengths(rank, strength, tmp_path):
    model = build("llama")
    critic = linear_critic(model, action_rank=rank)
    lora = head_lora(critic, model, strength)
    assert len(lora.down) == (rank or model.config.hidden_size)
    expected, _ = steered(model, critic, strength=strength)
    critic.to_lora(model, tmp_path, strength=strength)
    with torch.no_grad():
        found = loaded(model, tmp_path)(**inputs(model)).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_files_are_an_ordinary_adapter(tmp_path):
    """As PEFT writes one, by the names that vLLM looks for."""
    model = build("llama")
    critic = linear_critic(model)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("stays")
    assert critic.to_lora(model, tmp_path / "adapter") == tmp_path / "adapter"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert config["target_modules"] == ["lm_head"] and config["r"] == config["lora_alpha"] == 3
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    vocabulary, size = model.lm_head.weight.shape
    assert {name: tuple(each.shape) for name, each in tensors.items()} == {
        "base_model.model.lm_head.lora_A.weight": (3, size),
        "base_model.model.lm_head.lora_B.weight": (vocabulary, 3),
    }
    assert (tmp_path / "adapter" / "mine.txt").read_text() == "stays"
    # a second save by PEFT has the same adapter
    loaded(model, tmp_path / "adapter").save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_the_critic_itself_is_saved_and_loaded(tmp_path):
    model = build("llama")
    critic = linear_critic(model)
    critic.save_pretrained(tmp_path)
    again = Critic.from_pretrained(tmp_path).attach(model)
    assert not any("bias" in name for name in again.state_dict() if name.startswith("action"))
    one, other = (head_lora(each, model) for each in (critic, again))
    assert torch.equal(one.down, other.down) and torch.equal(one.up, other.up)


def test_the_gain_is_the_odds_ratio():
    model = build("llama")
    critic = linear_critic(model)
    with torch.no_grad():
        hidden = backbone(model)(input_ids=IDS)[0][:, -1]
        tokens = torch.tensor([[5, 17, 40]])
        odds = critic.action_logits(hidden, tokens) - critic(hidden)[:, None]
        torch.testing.assert_close(critic.action_log_ratio(hidden, tokens), odds, rtol=1e-4, atol=1e-5)
        # linear: of a multiple of the state, the same multiple
        torch.testing.assert_close(critic.action_log_ratio(3 * hidden, tokens), 3 * odds, rtol=1e-4, atol=1e-4)


def tied() -> torch.nn.Module:
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def test_tied_embeddings_stay_as_they_are(tmp_path):
    """PEFT lays the adapter on the head alone; merged, it would change the embeddings, too, which the card says."""
    model = tied()
    critic = linear_critic(model)
    expected, _ = steered(model, critic)
    before = model.model.embed_tokens.weight.clone()
    critic.to_lora(model, tmp_path, strength=STRENGTH)
    wrapped = loaded(model, tmp_path)
    with torch.no_grad():
        found = wrapped(input_ids=IDS).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert "Don't merge" in (tmp_path / "README.md").read_text()


def test_gguf(tmp_path):
    model = build("llama")
    critic = linear_critic(model)
    path = critic.to_lora(model, tmp_path, strength=STRENGTH, to="gguf")
    reader = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.type"] == "adapter" and facts["general.architecture"] == "llama"
    assert facts["adapter.type"] == "lora" and facts["adapter.lora.alpha"] == 3
    lora = head_lora(critic, model, STRENGTH)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    np.testing.assert_array_equal(tensors["output.weight.lora_a"], lora.down.numpy())
    np.testing.assert_array_equal(tensors["output.weight.lora_b"], lora.up.numpy())


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("llama", {"action_values": False}, "linear in the hidden state, and this one has none"),
        ("llama", {"action_form": "affine"}, "action_form='affine'"),
        ("llama", {"lora_rank": 2}, "lora_rank=2"),
        (
            "llama",
            {"layer": 1, "running_mean": False},
            r"reads layers=\[1\], running_mean=False.*layer=-1, running_mean=False",
        ),
        ("llama", {"layer": -1}, "reads running_mean=True"),
        ("gemma2", {}, "final_logit_softcapping"),
    ],
)
def test_refuses_critics_and_models(name, kwargs, message, tmp_path):
    model = family(name)
    critic = linear_critic(model, **kwargs)
    with pytest.raises(ValueError, match=message):
        critic.to_lora(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": "much"}, "strength='much'"),
        ({"to": "onnx"}, "to='onnx' is unknown"),
    ],
)
def test_refuses_arguments(kwargs, message, tmp_path):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        linear_critic(model).to_lora(model, tmp_path / "adapter", **kwargs)
    assert not (tmp_path / "adapter").exists()


def test_refuses_gguf_of_tied_and_unknown_models(tmp_path):
    known, unknown = tied(), family("granite")
    with pytest.raises(ValueError, match=r"tied to the embeddings.*tie_word_embeddings = False"):
        linear_critic(known).to_lora(known, tmp_path, to="gguf")
    with pytest.raises(ValueError, match="GraniteForCausalLM is unknown"):
        linear_critic(unknown).to_lora(unknown, tmp_path, to="gguf")


def test_says_that_the_model_has_adapters(tmp_path):
    model = build("lora")
    with pytest.warns(UserWarning, match="serve what they are merged into"):
        linear_critic(model).to_lora(model, tmp_path)
    assert isinstance(peft.PeftConfig.from_pretrained(str(tmp_path)), peft.LoraConfig)
    assert isinstance(model.get_base_model(), transformers.LlamaForCausalLM)
