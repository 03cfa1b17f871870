# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Other people's tools, in processes of their own, on a tiny packed model: the scripts of benchmarks/ecosystem."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny.tokenizers import byte_tokenizer


pytestmark = pytest.mark.slow

TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a float model whose layers can be packed in groups, with a chat template."""
    folder = tmp_path_factory.mktemp("ecosystem") / "model"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts in the place of SST-2, SST-5 and WikiText."""
    folder = tmp_path_factory.mktemp("data")
    words = "a film that is no film at all but so long and dull that no one could stay to see its end".split()
    for name, labels in (("sst2", ["negative", "positive"]), ("sst5", ["very negative", "neutral"])):
        (folder / name).mkdir()
        for split in ("train", "test"):
            rows = [{"text": " ".join(words[n % 3 :]), "label": labels[n % 2]} for n in range(8)]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wikitext2").mkdir()
    for split in ("valid", "test"):
        (folder / "wikitext2" / f"{split}.txt").write_text("\n".join([" ".join(words) + " end . More ."] * 8))
    return folder


def stored(path):
    return [(row["settings"], row["result"]) for row in json.loads(path.read_text())["rows"]]


def test_the_harness(model, data, tmp_path):
    pytest.importorskip("lm_eval")
    from benchmarks.ecosystem import harness

    output = tmp_path / "harness.json"
    harness.main(["--smoke", "--model", model, "--data-dir", str(data), "--output", str(output)])
    rows = {settings["contender"]: result for settings, result in stored(output)}
    assert list(rows) == ["base", "base + adapter", "base + adapter, peft_ext", "merged"]
    assert all(result["difference"] < 1e-3 for result in rows.values())
    assert all(result["accuracy"] == result["our_accuracy"] for result in rows.values())
    perplexities = [result["word_perplexity"] for result in rows.values()]
    assert perplexities[1] == pytest.approx(perplexities[2], rel=1e-4)
    assert perplexities[1] == pytest.approx(perplexities[3], rel=1e-4)
    assert perplexities[0] != pytest.approx(perplexities[1], rel=1e-3)


def test_the_harness_s_speed(model, data, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    from benchmarks.ecosystem import harness_speed

    output = tmp_path / "speed.json"
    harness_speed.main(["--smoke", "--model", model, "--data-dir", str(data), "--output", str(output)])
    assert all(result["difference"] < 1e-3 for _, result in stored(output))
    assert "| choice | 4 |" in capsys.readouterr().out


def test_trl_s_scripts_train_on_a_packed_base(model, tmp_path):
    from benchmarks.ecosystem import trl_scripts

    output = tmp_path / "trl.json"
    trl_scripts.main(["--steps", "2", "--model", model, "--output", str(output)])
    rows = {settings["script"]: result for settings, result in stored(output)}
    assert rows["dpo"]["losses"][0] == pytest.approx(math.log(2), abs=1e-3)
    for result in rows.values():
        assert (result["adapter"], result["packed"]) == ("LORA", 14)
        assert len(result["losses"]) == 2 and all(map(math.isfinite, result["losses"]))


def test_servers_and_pipelines(model, tmp_path):
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    from benchmarks.ecosystem import serving

    output = tmp_path / "serving.json"
    names = ["transformers serve, adapter in the base's folder", "text-generation pipeline, adapter folder"]
    serving.main(["--new-tokens", "6", "--model", model, "--output", str(output), "--only", *names])
    rows = {settings["contender"]: result for settings, result in stored(output)}
    assert list(rows) == names
    for result in rows.values():
        assert result["whole"] == result["ours"] and result["streamed"]
