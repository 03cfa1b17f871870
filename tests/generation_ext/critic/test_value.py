# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from generation_ext.critic import Critic, CriticModelConfig, backbone
from tests.generation_ext.critic.reference import PLAIN
from tests.test_language_model import lora_model, packed_model
from tests.tiny.models import HIDDEN, VOCAB, inputs, tiny


MODELS = ("llama", "gpt2", "opt", "gpt_neox", "t5")


def random_critic(model: nn.Module, **kwargs) -> Critic:
    critic = Critic.for_model(model, **{**PLAIN, **kwargs})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        critic.fit_standardisation(torch.randn(50, HIDDEN, generator=generator) * 2 + 1)
    return critic


def test_starts_as_one_half_everywhere():
    critic = Critic.for_model(tiny("llama"), head="mlp", action_values=True, **PLAIN)
    hidden = torch.randn(2, 3, HIDDEN)
    torch.testing.assert_close(critic.value(hidden), torch.full((2, 3), 0.5))
    candidates = torch.randint(VOCAB, (2, 3, 4))
    torch.testing.assert_close(critic.action_log_values(hidden, candidates).exp(), torch.full((2, 3, 4), 0.5))


def test_starts_where_it_is_told_and_keeps_what_is_trained():
    model = tiny("llama")
    critic = Critic.for_model(model, **PLAIN)
    critic.start_at(0.1)
    torch.testing.assert_close(critic.value(torch.randn(3, HIDDEN)), torch.full((3,), 0.1))
    critic.start_at(0.7)
    torch.testing.assert_close(critic.value(torch.randn(3, HIDDEN)), torch.full((3,), 0.1))
    for value, kept in ((0.0, 0.001), (1.0, 0.999)):
        critic = Critic.for_model(model, **PLAIN)
        critic.start_at(value)
        torch.testing.assert_close(critic.value(torch.randn(1, HIDDEN)), torch.tensor([kept]))


def test_linear_value_against_the_formula():
    critic = random_critic(tiny("llama"))
    hidden = torch.randn(4, 5, HIDDEN, dtype=torch.bfloat16)
    expected = torch.empty(4, 5)
    for row in range(4):
        for position in range(5):
            state = (hidden[row, position].double() - critic.mean.double()) / critic.std.double()
            logit = (state * critic.head.weight[0].double()).sum() + critic.head.bias.double()
            expected[row, position] = 1 / (1 + torch.exp(-logit))
    value = critic.value(hidden)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(critic.log_value(hidden), expected.log(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.sigmoid(critic(hidden)), expected)


def test_log_value_is_finite_where_the_value_is_zero():
    critic = Critic.for_model(tiny("llama"), **PLAIN)
    with torch.no_grad():
        critic.head.bias.fill_(-500.0)
    hidden = torch.randn(3, HIDDEN)
    assert (critic.value(hidden) == 0).all()
    torch.testing.assert_close(critic.log_value(hidden), torch.full((3,), -500.0))


@pytest.mark.parametrize("action_rank", [0, 3])
def test_action_values_against_the_formula(action_rank):
    model = tiny("llama")
    critic = random_critic(model, action_values=True, action_rank=action_rank)
    hidden, candidates = torch.randn(2, HIDDEN), torch.randint(VOCAB, (2, 6))
    state = (hidden - critic.mean) / critic.std
    mapped = critic.action_map(critic.action_down(state) if action_rank else state)
    weight = model.get_input_embeddings().weight
    scale = 1 / weight.square().mean().sqrt()
    expected = torch.empty(2, 6)
    for row in range(2):
        for place in range(6):
            match = (mapped[row] * weight[candidates[row, place]] * scale).sum() / HIDDEN**0.5
            expected[row, place] = critic(hidden)[row] + critic.action_bias(state)[row, 0] + match
    logits = critic.action_logits(hidden, candidates)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        critic.action_log_values(hidden, candidates), nn.functional.logsigmoid(expected), rtol=1e-4, atol=1e-5
    )


def test_action_values_need_their_head_and_their_model(tmp_path):
    model = tiny("llama")
    hidden, candidates = torch.randn(2, HIDDEN), torch.randint(VOCAB, (2, 6))
    with pytest.raises(ValueError, match="action_values=True"):
        Critic.for_model(model, **PLAIN).action_log_values(hidden, candidates)
    critic = random_critic(model, action_values=True)
    critic.save_pretrained(tmp_path)
    loaded = Critic.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attach"):
        loaded.action_log_values(hidden, candidates)
    torch.testing.assert_close(
        loaded.attach(model).action_log_values(hidden, candidates), critic.action_log_values(hidden, candidates)
    )


@pytest.mark.parametrize("kwargs", [{}, {"head": "mlp", "mlp_size": 7}, {"action_values": True}, {"lora_rank": 2}])
@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(tmp_path, name, kwargs):
    critic = random_critic(tiny(name), control_codes=["Space", "Law"], **kwargs)
    critic.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    loaded = Critic.from_pretrained(tmp_path)
    assert loaded.config.control_codes == ["Space", "Law"]
    assert loaded.config.lora_layers == critic.config.lora_layers
    before, after = critic.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    loaded.check_model(tiny(name))


def test_the_language_model_is_not_stored():
    critic = Critic.for_model(tiny("llama"), action_values=True, **PLAIN)
    sizes = {name: tuple(value.shape) for name, value in critic.state_dict().items()}
    assert (VOCAB, HIDDEN) not in sizes.values()
    assert sum(parameter.numel() for parameter in critic.parameters()) == 2 * (HIDDEN + 1) + HIDDEN * (HIDDEN + 1)


def test_standardisation():
    critic = Critic.for_model(tiny("llama"), **PLAIN)
    hidden = torch.randn(40, 3, HIDDEN) * torch.arange(1, HIDDEN + 1) + 5
    hidden[..., 4] = 7.0  # a constant dimension
    critic.fit_standardisation(hidden)
    states = critic._standardised(hidden).reshape(-1, HIDDEN)
    moving = torch.arange(HIDDEN) != 4
    torch.testing.assert_close(states.mean(dim=0), torch.zeros(HIDDEN), atol=1e-4, rtol=0)
    torch.testing.assert_close(states.std(dim=0)[moving], torch.ones(HIDDEN - 1), atol=1e-3, rtol=0)
    assert torch.isfinite(states).all()


@pytest.mark.parametrize("hidden", [torch.zeros(1, HIDDEN), torch.full((4, HIDDEN), float("nan"))])
def test_standardisation_refuses(hidden):
    with pytest.raises(ValueError, match="at least two finite"):
        Critic.for_model(tiny("llama"), **PLAIN).fit_standardisation(hidden)


def test_refuses_another_model():
    critic = Critic.for_model(tiny("llama"))
    critic.config.base_model_name_or_path = "owner/llama"
    with pytest.raises(ValueError, match="owner/llama.*fingerprint.*train a critic"):
        critic.check_model(tiny("gpt2"))
    critic.config.hidden_size = 48
    with pytest.raises(ValueError, match="owner/llama.*48.*32"):
        critic.attach(tiny("llama"))


def test_another_adapter_is_said(tmp_path, recwarn):
    trained, other = lora_model("llama"), lora_model("llama")
    with torch.no_grad():
        next(weight for name, weight in other.named_parameters() if "lora_B" in name)[0, 0] += 1
    Critic.for_model(trained).save_pretrained(tmp_path)
    critic = Critic.from_pretrained(tmp_path).attach(trained)
    assert not [warning for warning in recwarn if warning.category is UserWarning]
    with pytest.warns(UserWarning, match="made with the adapter weights .* but this model has the adapter weights"):
        critic.attach(other)
    with pytest.warns(UserWarning, match="but this model has no adapter"):
        critic.attach(tiny("llama"))
    critic.config.base_model_adapters = None  # as earlier versions saved it
    recwarn.clear()
    critic.attach(other)
    assert not recwarn.list


def test_without_a_fingerprint_names_are_compared():
    critic = Critic(CriticModelConfig(hidden_size=HIDDEN, base_model_name_or_path="owner/llama"))
    model = tiny("llama")
    critic.check_model(model)  # has no name
    model.config._name_or_path = "owner/other"
    with pytest.raises(ValueError, match="owner/llama.*owner/other"):
        critic.check_model(model)
    critic.config.base_model_name_or_path = None
    critic.check_model(model)


def test_hidden_states_of_another_size():
    with pytest.raises(ValueError, match="size 31.*32"):
        Critic.for_model(tiny("llama"), **PLAIN).value(torch.zeros(2, 31))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_lora_changes_hidden_states_only_within(name):
    model = tiny(name)
    critic = random_critic(model, lora_rank=2)
    batch = inputs(name)
    before = model(**batch).logits
    with critic.adapted(model):
        within = model(**batch).logits
    assert torch.equal(model(**batch).logits, before)
    assert (within - before).abs().max() > 1e-3
    merged = copy.deepcopy(model)
    layers = dict(backbone(merged).named_modules())
    for layer, down, up in zip(critic.config.lora_layers, critic.lora_a, critic.lora_b):
        change = (up @ down).detach() * critic.config.lora_alpha / 2
        layers[layer].weight.data += change.T if type(layers[layer]).__name__ == "Conv1D" else change
    torch.testing.assert_close(within, merged(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrap", [lora_model, packed_model])
def test_lora_made_on_the_base_works_on_the_wrapped_model(wrap):
    critic = random_critic(tiny("llama"), lora_rank=2)
    model = wrap("llama").eval()
    before = model(**inputs("llama")).logits
    with critic.attach(model).adapted(model):
        assert (model(**inputs("llama")).logits - before).abs().max() > 1e-3
    assert torch.equal(model(**inputs("llama")).logits, before)
    assert Critic.for_model(model, lora_rank=2).config.lora_layers == critic.config.lora_layers


def test_lora_is_trained_and_the_model_is_not():
    model = tiny("llama")
    model.requires_grad_(False)
    critic = random_critic(model, lora_rank=2)
    with critic.adapted(model):
        hidden = backbone(model)(**inputs("llama")).last_hidden_state
    critic(hidden).sum().backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_lora_names():
    critic = Critic.for_model(tiny("llama"), lora_rank=2, lora_target_modules=["down_proj"])
    assert list(critic.config.lora_layers) == ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]
    with pytest.raises(ValueError, match="no_such.*down_proj"):
        Critic.for_model(tiny("llama"), lora_rank=2, lora_target_modules=["no_such"])
    with pytest.raises(ValueError, match="layers.0.mlp.down_proj"):
        with critic.adapted(tiny("gpt2")):
            pass


def test_lora_is_taken_off_when_the_forward_fails():
    model = tiny("llama")
    critic = random_critic(model, lora_rank=2)
    before = model(**inputs("llama")).logits
    with pytest.raises(RuntimeError, match="stop"):
        with critic.adapted(model):
            raise RuntimeError("stop")
    assert torch.equal(model(**inputs("llama")).logits, before)


def test_control_codes():
    critic = Critic.for_model(tiny("llama"), control_codes=["Space"], prompt_template="[{code}] {prompt}")
    assert critic.control_prompt("The {issue}", "Space") == "[Space] The {issue}"
    assert critic.control_prompt("The issue", "Music") == "[Music] The issue"  # never seen in training
    with pytest.raises(ValueError, match="empty"):
        critic.control_prompt("The issue", " ")
    with pytest.raises(ValueError, match="one attribute"):
        Critic.for_model(tiny("llama")).control_prompt("The issue", "Space")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"head": "cubic"},
        {"mlp_size": 0},
        {"hidden_size": 1.5},
        {"lora_rank": -1},
        {"action_rank": True},
        {"prompt_template": "{code}"},
        {"prompt_template": "{code} {prompt} {more}"},
    ],
)
def test_config_refuses(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        CriticModelConfig(**kwargs)
