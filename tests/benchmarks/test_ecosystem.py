# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Other people's tools, in processes of their own, on a tiny packed model: the tasks of benchmarks/ecosystem."""

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


def test_the_harness(model, data, measured):
    pytest.importorskip("lm_eval")
    run = measured("harness", "exact", model=model, data=str(data))
    rows = {row["key"]["contender"]: row["result"] for row in run.rows}
    assert list(rows) == ["base", "base + adapter", "base + adapter, peft_ext", "merged"]
    assert all(result["difference"] < 1e-3 for result in rows.values())
    assert all(result["accuracy"] == result["our_accuracy"] for result in rows.values())
    perplexities = [result["word_perplexity"] for result in rows.values()]
    assert perplexities[1] == pytest.approx(perplexities[2], rel=1e-4)
    assert perplexities[1] == pytest.approx(perplexities[3], rel=1e-4)
    assert perplexities[0] != pytest.approx(perplexities[1], rel=1e-3)


def test_the_harness_s_speed(model, data, measured):
    pytest.importorskip("lm_eval")
    from benchmarks.ecosystem.harness_speed import TASK

    runs = [measured("harness_speed", name, model=model, data=str(data)) for name in ("sentences", "others")]
    assert all(row["result"]["difference"] < 1e-3 for run in runs for row in run.rows)
    assert "| choice | 4 |" in "".join(TASK.tables(runs).values())


def test_trl_s_scripts_train_on_a_packed_base(model, measured):
    run = measured("trl_scripts", "smollm2", model=model)
    rows = {row["key"]["script"]: row["result"] for row in run.rows}
    assert rows["dpo"]["losses"][0] == pytest.approx(math.log(2), abs=1e-3)
    for result in rows.values():
        assert (result["adapter"], result["packed"]) == ("LORA", 14)
        assert len(result["losses"]) == 2 and all(map(math.isfinite, result["losses"]))


def test_servers_and_pipelines(model, measured):
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    run = measured("serving", "smollm2", model=model)
    assert [row["key"]["contender"] for row in run.rows] == run.contenders and len(run.contenders) == 2
    for row in run.rows:
        assert row["result"]["whole"] == row["result"]["ours"] and row["result"]["streamed"]
