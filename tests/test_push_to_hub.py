# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What `push_to_hub` uploads, what a stranger loads of it, and what is refused; against a hub on this machine."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import peft_ext
from generation_ext import CDNPGConfig, CDNPGForConditionalGeneration, Critic, PALPClassifier
from peft_ext import AlphaTuningConfig, BottleneckConfig, PeqaConfig
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.cli import main
from peft_ext.hub import fetched
from peft_ext.language_model import base_fingerprint
from peft_ext.ood import OODPipeline
from peft_ext.quant.linear import PackedLinear
from tests.cases import move_adapter
from tests.conftest import ROOT
from tests.hub_stand_in import TOKEN, HubStandIn
from tests.snippets import printed_by_card
from tests.tiny.folders import save_tiny_model
from tests.tiny.tokenizers import byte_tokenizer, tiny_tokenizer


IDS = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
CONFIGS = {
    "peqa": PeqaConfig(bits=4, group_size=32, task_type="CAUSAL_LM"),
    "alphatuning": AlphaTuningConfig(bits=3, group_size=32, task_type="CAUSAL_LM"),
    "bottleneck": BottleneckConfig(bottleneck_dim=4, task_type="CAUSAL_LM"),
}


def _config(name: str):
    return copy.deepcopy(CONFIGS[name])


@pytest.fixture
def hub(tmp_path):
    """An empty hub that this process talks to, and is logged in to."""
    with HubStandIn() as server, server.connected(tmp_path / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model and its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def base(hub, folder) -> str:
    """The same on the hub, as somebody else's."""
    api = HfApi()
    api.create_repo("owner/tiny")
    api.upload_folder(repo_id="owner/tiny", folder_path=folder)
    api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n", path_in_repo="README.md", repo_id="owner/tiny")
    return "owner/tiny"


@torch.no_grad()
def _logits(model) -> torch.Tensor:
    return model.eval()(**IDS).logits


def _card(hub: HubStandIn, repo_id: str, **kwargs) -> ModelCard:
    card = ModelCard(hub.read(repo_id, "README.md", **kwargs))
    assert not re.search("More Information Needed|automatically generated", card.content)
    return card


def _run(hub: HubStandIn, repo_id: str, tmp_path: Path) -> str:
    """What the card's snippet prints anywhere."""
    return printed_by_card(hub.read(repo_id, "README.md"), tmp_path / "elsewhere")


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter(name, hub, base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), _config(name))
    move_adapter(model)
    model.push_to_hub("me/adapter", commit_message="A first one")
    assert hub.repositories["me/adapter"].branches["main"].message == "A first one"
    assert hub.files("me/adapter") == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert json.loads(hub.read("me/adapter", "adapter_config.json"))["base_model_name_or_path"] == base
    card = _card(hub, "me/adapter")
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == (base, "adapter", "mit")
    assert torch.equal(_logits(AutoPeftModelForCausalLM.from_pretrained("me/adapter")), _logits(model))
    assert torch.equal(_logits(peft_ext.load("me/adapter")), _logits(model))
    assert torch.equal(_logits(peft_ext.load(base, adapter="me/adapter")), _logits(model))
    assert _run(hub, "me/adapter", tmp_path)


def test_an_adapter_of_another_name(hub, base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), _config("peqa"), "other")
    move_adapter(model, "other")
    model.push_to_hub("me/adapter")
    assert "other/adapter_model.safetensors" in hub.files("me/adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "me/adapter", subfolder="other")
    assert torch.equal(_logits(loaded), _logits(model))
    assert _run(hub, "me/adapter", tmp_path)


@pytest.mark.parametrize("checkpoint_format", ["pack-quantized", "bcq"])
def test_a_packed_base_and_an_adapter_on_it(checkpoint_format, hub, base, tmp_path):
    packed = get_peft_model(AutoModelForCausalLM.from_pretrained(base), _config("peqa")).unload()
    make_saveable(packed, checkpoint_format)
    packed.push_to_hub("me/base", private=True)
    assert hub.repositories["me/base"].private
    card = _card(hub, "me/base")
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == (base, "quantized", "mit")
    # an adapter that is made from here on names what others load
    adapted = get_peft_model(packed, _config("peqa"))
    move_adapter(adapted)
    adapted.push_to_hub("me/adapter", create_pr=False)
    assert json.loads(hub.read("me/adapter", "adapter_config.json"))["base_model_name_or_path"] == "me/base"
    loaded = peft_ext.load("me/base")
    assert any(isinstance(module, PackedLinear) for module in loaded.modules())
    with adapted.disable_adapter():
        assert torch.equal(_logits(loaded), _logits(adapted))
    assert torch.equal(_logits(AutoPeftModelForCausalLM.from_pretrained("me/adapter")), _logits(adapted))
    assert _run(hub, "me/base", tmp_path)


def test_lora_on_a_packed_base(hub, base):
    packed = get_peft_model(AutoModelForCausalLM.from_pretrained(base), _config("peqa")).unload()
    packed.push_to_hub("me/base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("me/base"), LoraConfig(task_type="CAUSAL_LM"))
    model.push_to_hub("me/lora")
    card = _card(hub, "me/lora")
    assert card.data.base_model == "me/base" and "lora" in card.data.tags and "of 4 bits" in card.text
    assert torch.equal(_logits(peft_ext.load("me/lora")), _logits(model))


def test_a_pull_request_and_a_branch(hub, base):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), _config("peqa"))
    done = model.push_to_hub("me/adapter", create_pr=True)
    assert done.pr_url.endswith("/1") and hub.files("me/adapter") == []
    assert "adapter_model.safetensors" in hub.files("me/adapter", "refs/pr/1")
    model.push_to_hub("me/adapter", revision="second")
    assert hub.files("me/adapter") == [] and "README.md" in hub.files("me/adapter", "second")
    packed = model.unload()
    packed.push_to_hub("me/base", create_pr=True)
    assert packed.name_or_path == base, "what isn't merged is nobody's base"


def test_the_token_is_asked_for_and_not_written(hub, base, monkeypatch, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), _config("peqa"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match="401"):
        model.push_to_hub("me/adapter")
    model.push_to_hub("me/adapter", token=TOKEN, private=True)
    assert not any(TOKEN.encode() in content for content in hub.contents.values())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'me/adapter'"):
        AutoPeftModelForCausalLM.from_pretrained("me/adapter")
    AutoPeftModelForCausalLM.from_pretrained("me/adapter", token=TOKEN)


def test_a_base_that_nobody_finds_is_said(hub, folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), _config("peqa"))
    with pytest.warns(UserWarning, match="nobody else finds it.*base_model_name_or_path = 'owner/base'"):
        model.push_to_hub("me/adapter")
    assert str(folder) not in hub.read("me/adapter", "README.md")
    model.peft_config["default"].base_model_name_or_path = "owner/base"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Could not find a config file")
        model.push_to_hub("me/adapter")
    assert json.loads(hub.read("me/adapter", "adapter_config.json"))["base_model_name_or_path"] == "owner/base"
    assert 'peft_ext.load("me/adapter")' in hub.read("me/adapter", "README.md")


def test_an_edited_card_on_the_hub_is_kept(hub, base):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), _config("peqa"))
    model.push_to_hub("me/adapter")
    edited = (
        hub.read("me/adapter", "README.md").replace("# PEQA", "# Mine").replace("license: mit", "license: cc0-1.0")
    )
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="me/adapter")
    peft_ext.note_measured(model, "perplexity", tuned=2.0)
    model.push_to_hub("me/adapter")
    card = _card(hub, "me/adapter")
    assert "# Mine" in card.text and "perplexity" not in card.text and card.data.license == "cc0-1.0"


def test_save_pretrained_pushes(hub, base, tmp_path):
    packed = get_peft_model(AutoModelForCausalLM.from_pretrained(base), _config("peqa")).unload()
    packed.save_pretrained(tmp_path / "packed", push_to_hub=True, repo_id="me/packed")
    assert 'from_pretrained("me/packed")' in hub.read("me/packed", "README.md")


def test_a_critic(hub, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    critic = Critic.for_model(model)
    torch.nn.init.normal_(critic.head.weight)
    critic.push_to_hub("me/critic", private=True, commit_message="A critic")
    assert _card(hub, "me/critic").data.base_model == base and base_fingerprint(model) in _card(hub, "me/critic").text
    loaded = Critic.from_pretrained("me/critic").attach(model)
    hidden = torch.randn(3, loaded.state_size)
    torch.testing.assert_close(loaded.value(hidden), critic.value(hidden))
    assert _run(hub, "me/critic", tmp_path)


def test_a_palp_classifier(hub, base, tmp_path):
    texts = ["a fine film", "two lost hours", "what a joy", "dull"]
    palp = PALPClassifier(AutoModelForCausalLM.from_pretrained(base), byte_tokenizer())
    palp.fit(texts, ["good", "bad", "good", "bad"])
    palp.push_to_hub("me/palp", commit_message="PALP", private=True)
    assert hub.files("me/palp") == ["README.md", "head.safetensors", "palp.json"]
    assert _card(hub, "me/palp").data.base_model == base
    loaded = PALPClassifier.from_pretrained("me/palp")
    assert (loaded.predict_proba(texts) == palp.predict_proba(texts)).all()
    assert re.search("good|bad", _run(hub, "me/palp", tmp_path))
    palp.save_pretrained(tmp_path / "palp", push_to_hub=True, repo_id="me/again")
    assert hub.files("me/again") == hub.files("me/palp")
    with pytest.raises(FileNotFoundError, match="'me/nothing' is no folder here"):
        PALPClassifier.from_pretrained("me/nothing")


def test_an_ood_pipeline(hub, base, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.config.pad_token_id = 0
    model = get_peft_model(model, PeqaConfig(bits=4, task_type="SEQ_CLS"))
    texts = ["w3 w4", "w5 w6 w7", "w8 w9", "w10 w11"]
    pipeline = OODPipeline.fit(model, tiny_tokenizer(), texts, [0, 0, 1, 1], texts, "msp")
    pipeline.push_to_hub("me/intents")
    assert _card(hub, "me/intents").data.base_model == base
    assert [path for path in hub.files("me/intents") if path.endswith("README.md")] == ["README.md"]
    assert OODPipeline.from_pretrained("me/intents")(texts) == pipeline(texts)
    assert "in_distribution" in _run(hub, "me/intents", tmp_path)


def test_a_paraphrase_model(hub, tmp_path):
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = CDNPGForConditionalGeneration(CDNPGConfig(vocab_size=100, pad_token_id=0, **sizes, **layers))
    model.push_to_hub("me/paraphrases")
    tiny_tokenizer().push_to_hub("me/paraphrases")
    assert "c-dnpg" in _card(hub, "me/paraphrases").data.tags
    _run(hub, "me/paraphrases", tmp_path)


def test_others_models_are_pushed_as_ever(hub, folder):
    AutoModelForCausalLM.from_pretrained(folder).push_to_hub("me/float")
    assert "automatically generated" in hub.read("me/float", "README.md")


def test_what_is_fetched(hub, base, tmp_path):
    assert fetched(tmp_path) == tmp_path
    assert fetched("no/such/path") == Path("no/such/path")
    assert (fetched(base) / "config.json").is_file()
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is no folder here, and can't be had from the hub"):
        fetched("nobody/nothing")


@pytest.mark.slow
def test_a_process_of_its_own(hub, base, tmp_path):
    """The stand-in as other tests and other languages take it: by the environment."""
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), _config("peqa")).push_to_hub("me/adapter")
    code = "import peft_ext; print(type(peft_ext.load('me/adapter')).__name__)"
    environment = {**hub.environment(tmp_path / "other"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "PeftModelForCausalLM", done.stderr[-3000:]


def test_push_a_run(hub, base, monkeypatch, tmp_path, capsys):
    flags = ["--max_steps", "2", "--block_size", "32", "--held_out_blocks", "2", "--calibration_blocks", "4"]
    assert main(["tune", "--model", base, "--output_dir", str(tmp_path / "run"), *flags, "--use_cpu", "True"]) == 0
    assert main(["push", str(tmp_path / "run" / "adapter"), "--repo_id", "me/alone"]) == 2
    assert "peft-ext push" in capsys.readouterr().err and "me/alone" not in hub.repositories
    assert main(["push", str(tmp_path / "run"), "--repo_id", "me/run", "--private", "True"]) == 0
    assert capsys.readouterr().out.split() == [f"{hub.url}/me/run-base", f"{hub.url}/me/run"]
    assert hub.repositories["me/run"].private and hub.repositories["me/run-base"].private
    assert json.loads(hub.read("me/run", "adapter_config.json"))["base_model_name_or_path"] == "me/run-base"
    adapter, packed = _card(hub, "me/run"), _card(hub, "me/run-base")
    assert (adapter.data.base_model, packed.data.base_model) == ("me/run-base", base)
    assert str(tmp_path) not in "".join(hub.read("me/run", path) for path in ("README.md", "adapter_config.json"))
    assert "An adapter for [me/run-base](" in adapter.text and "`base`" not in adapter.text
    assert "perplexity on 2 held-out rows" in adapter.text and "perplexity on 2 held-out rows" in packed.text
    assert torch.equal(_logits(peft_ext.load("me/run")), _logits(peft_ext.load(str(tmp_path / "run"))))
    assert _run(hub, "me/run", tmp_path) and _run(hub, "me/run-base", tmp_path)
    # again: what somebody wrote there stays, what nobody touched is renewed
    edited = hub.read("me/run", "README.md").replace("# PEQA", "# Mine")
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="me/run")
    assert main(["push", str(tmp_path / "run"), "--repo_id", "me/run"]) == 0
    assert "# Mine" in hub.read("me/run", "README.md") and hub.read("me/run-base", "README.md") == packed.content


def test_push_what_is_no_run(hub, base, tmp_path, capsys):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), _config("peqa"))
    model.save_pretrained(tmp_path / "adapter")
    critic = Critic.for_model(AutoModelForCausalLM.from_pretrained(base))
    critic.save_pretrained(tmp_path / "critic")
    assert main(["push", str(tmp_path / "adapter"), "--repo_id", "me/adapter", "--create_pr", "True"]) == 0
    assert capsys.readouterr().out.strip().endswith("me/adapter/discussions/1")
    assert 'peft_ext.load("me/adapter")' in hub.read("me/adapter", "README.md", revision="refs/pr/1")
    assert main(["push", str(tmp_path / "critic"), "--repo_id", "me/critic"]) == 0
    assert _run(hub, "me/critic", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--repo_id", "me/x"], "there is no such folder"),
        (["empty", "--repo_id", "me/x"], "holds nothing to push"),
        (["empty", "--repo_id", "x"], "repo_id='x' is no id of the hub"),
        (["empty"], "repo_id is missing"),
        (["unfinished", "--repo_id", "me/x"], "is no finished run"),
    ],
)
def test_what_cannot_be_pushed(arguments, message, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("")
    assert main(["push", *arguments]) == 2
    assert message in capsys.readouterr().err and not hub.repositories
