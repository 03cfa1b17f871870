# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Every benchmark runs from end to end on tiny random models, and goes on where it was stopped."""

from __future__ import annotations

import json
import sys

import pytest


torch = pytest.importorskip("torch")

from benchmarks import (  # noqa: E402
    alphatuning_nlg,
    alphatuning_sizes,
    decode,
    loading,
    nlg_metrics,
    peqa_learning_rate,
    peqa_quality,
    peqa_training,
    tuning,
)
from benchmarks.core import experiments  # noqa: E402
from benchmarks.core.run import NotHere, Run  # noqa: E402


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads memory figures of Linux")


def _rows(path):
    return json.loads(path.read_text())["rows"]


def test_quality(smoke):
    found = smoke("peqa_quality")
    for row in peqa_quality.all_rows():
        if row.init_method == peqa_quality.FILE:
            continue  # of the default model alone, which is a file
        assert f"| {row.title} |" in found.shown or f"| **{row.title}** |" in found.shown
    assert "not measured" not in found.shown
    assert "PEQA, 4 bits, group 64, over LoRA float" in found.shown


def test_zero_shot(smoke):
    pytest.importorskip("lm_eval")
    found = smoke("zero_shot")
    assert "| Weights | SST-2 (6) | CB (6) | mean | the float model's answer, % |" in found.shown
    (float_row, *_), shares = found.results, [task for result in found.results for task in result.values()]
    assert all(task["agreement"] == 1 for task in float_row.values())
    assert all(task["accuracy"] * task["inputs"] == round(task["accuracy"] * task["inputs"]) for task in shares)


def test_starts(smoke):
    found = smoke("starts")
    assert "not measured" not in found.shown and "and sweeps, refits (`calibrated`), 4 blocks" in found.shown
    assert "2 bits, group 64, tuned, sweeps and refits over error feedback" in found.shown


def test_embeddings(smoke):
    found = smoke("embeddings")
    assert "not measured" not in found.shown and "| 3 bits, per channel | 8 bits |" in found.shown
    float_ends, eight, four = found.results[1:]
    assert float_ends["bytes"] > eight["bytes"] > four["bytes"]


def test_rounding_peers(smoke):
    found = smoke("rounding_peers")
    assert "| 2 bits, peft-ext, calibrated | 64 |" in found.shown
    # a library that isn't installed is a row that says so
    assert all("test" in result or "not installed" in result["skipped"] for result in found.results)


def test_bits_budget(smoke):
    found = smoke("bits_budget")
    assert "not measured" not in found.shown and "behind error feedback (`allocate_bits`)" in found.shown
    mixed = [result for result in found.results if len(set(result.get("widths", {}).values())) > 1]
    assert mixed and "3 bits on average, per channel, over uniform, bytes" in found.shown


def test_distillation(smoke):
    found = smoke("distillation")
    assert "not measured" not in found.shown and "| the float model (divergence) |" in found.shown
    assert "2 bits, group 64, both over cross-entropy, other text" in found.shown


def test_what_a_quality_row_trains(tmp_path):
    run = Run(
        "peqa_quality", "wikitext2", experiments.settings("peqa_quality", "wikitext2", "smoke"), "smoke", tmp_path
    )
    bench = peqa_quality.Bench(run)
    trained = {}
    for name in peqa_quality.TRAINED:
        model = bench.build(peqa_quality.Row("PEQA", 4, 64, "minmax", trained=name))
        trained[name] = sum(parameter.numel() for parameter in tuning.trainable(model))
    scales, zeros, norms, both = trained.values()
    assert zeros == 2 * scales and norms - scales == both - zeros == 5 * 128  # two layers of two norms, and the last


def test_quality_goes_on_after_a_kill(tmp_path):
    settings = {
        **experiments.settings("peqa_quality", "wikitext2", "smoke"),
        "only": ["LoRA, then quantised, 4 bits, per channel; rounded"],
    }
    run = Run("peqa_quality", "wikitext2", settings, "smoke", tmp_path)
    peqa_quality.measure(run)  # trains the LoRA that it needs, without storing the LoRA's own row
    result = run.rows[-1]["result"]
    # as a kill before the last row was written leaves it
    run.rows = run.rows[:-1]
    run.write()
    run = Run("peqa_quality", "wikitext2", settings, "smoke", tmp_path)
    peqa_quality.measure(run)
    assert run.rows[-1]["result"]["test"] == pytest.approx(result["test"])


def test_quality_says_why_a_row_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    settings = {**experiments.settings("peqa_quality", "wikitext2", "smoke"), "only": ["QLoRA"]}
    run = Run("peqa_quality", "wikitext2", settings, "smoke", tmp_path)
    for _ in range(2):
        peqa_quality.measure(run)
        (table,) = peqa_quality.tables(run).values()
        assert "| QLoRA, NF4 | not possible here: " in table
    assert len([row for row in run.rows if "search" not in row["key"]]) == 1


def test_quality_without_data(tmp_path):
    with pytest.raises(NotHere, match="train.txt.*wikitext-2"):
        peqa_quality.find_split(tmp_path, "train")


@linux_only
def test_training(smoke):
    found = smoke("peqa_training")
    assert "over LoRA's" in found.shown and "over plain autograd's" in found.shown
    assert set(found.rows) == {"smollm2", "alphatuning"}
    for name in ("PEQA, 4 bits, per channel", "LoRA, r = 8", "Full fine-tuning", "AlphaTuning, 3 bits, per channel"):
        assert f"| {name} |" in found.shown
    results = {row["key"]["kind"]: row["result"] for row in found.rows["smollm2"]}
    assert all(result["peak"] >= result["at_start"] > 0 for result in results.values())
    # two float32 moments for each trained number, and a step count for each tensor
    assert results["PEQA"]["optimizer_bytes"] >= 2 * results["PEQA"]["trained_bytes"]


def test_plain_autograd_computes_what_peqa_computes():
    method = peqa_training.Method
    batch = torch.randint(0, 200, (2, 16))
    losses, gradients = [], []
    for kind in ("PEQA", peqa_training.PLAIN):
        model = peqa_training.build(tuning.TINY, method(kind, 3, 64), torch.float32)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in tuning.trainable(model)])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_learning_rate(smoke):
    found = smoke("peqa_learning_rate")
    assert "perplexity that one rate for all costs on the worst model, relative over absolute" in found.shown
    assert len(found.results) == 2 * 3 * 2


def test_rescaling_keeps_the_function():
    model = tuning.tiny_llama()
    tokens = torch.randint(0, 200, (2, 16))
    with torch.no_grad():
        before = model(tokens).logits
        weight = model.model.layers[0].mlp.up_proj.weight.clone()
        peqa_learning_rate.rescale(model, 16.0, seed=0)
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(model.model.layers[0].mlp.up_proj.weight, weight)


@pytest.mark.parametrize("bits", [None, 4])
def test_large_random_model(monkeypatch, bits):
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = {**small, "num_key_value_heads": 2, "vocab_size": 100}
    monkeypatch.setitem(peqa_training.RANDOM, peqa_training.BILLION, shape)
    method = peqa_training.Method("LoRA, r = 8") if bits is None else peqa_training.Method("PEQA", bits)
    model = peqa_training.build(peqa_training.BILLION, method, torch.float32)
    assert not any(parameter.is_meta for parameter in model.parameters())
    batch = torch.randint(0, 100, (2, 8))
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    assert 3 < loss.item() < 7  # about log(100): weights of a sound size
    assert all(parameter.grad is not None for parameter in tuning.trainable(model))


def test_nlg(smoke):
    found = smoke("alphatuning_nlg")
    for row in alphatuning_nlg.all_rows():
        assert f"| {row.title} |" in found.shown
    assert "not measured" not in found.shown  # nothing is claimed of texts that share nothing with their references
    trained = {
        row["key"]["method"]: row["result"]["trained"] for row in found.rows["e2e_webnlg"] if "BLEU" in row["result"]
    }
    assert trained["AlphaTuning"] == trained["PEQA"] < trained["AlphaTuning, all alphas"] < trained["LoRA, r = 8"]


def test_nlg_without_data(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_EXT_DATA", str(tmp_path))
    (tmp_path / "e2e").mkdir()
    run = Run("alphatuning_nlg", "e2e_webnlg", experiments.settings("alphatuning_nlg", "e2e_webnlg"), folder=tmp_path)
    with pytest.raises(NotHere, match="e2e has no train.jsonl"):
        alphatuning_nlg.measure(run)


def test_the_loss_counts_targets_only():
    batch = alphatuning_nlg._batch([alphatuning_nlg.Example([5, 6], [7, 1]), alphatuning_nlg.Example([5], [1])], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [5, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 1], [-100, 1, -100, -100]]


def test_nlg_metrics():
    references = [["the cat sat on the mat", "a cat was on the mat"], ["hello there my old friend"]]
    right = nlg_metrics.nlg_metrics(["a cat was on the mat", "hello there my old friend"], references)
    assert right["BLEU"] == pytest.approx(100) and right["ROUGE-L"] == pytest.approx(100)
    assert right["chrF"] == pytest.approx(100) and right["METEOR"] > 99
    wrong = nlg_metrics.nlg_metrics(["dogs bark", "no"], references)
    assert all(wrong[name] < 20 for name in wrong)


def test_reconstruction(smoke, tmp_path):
    found = smoke("reconstruction")
    assert "| BCQ, alternating |" in found.shown and "calibrated BCQ over GPTQ" in found.shown
    assert (tmp_path / "reconstruction" / "wikitext2.png").read_bytes().startswith(b"\x89PNG")
    results = {tuple(row["key"].values()): row["result"] for row in found.rows["wikitext2"]}
    for bits in (2, 3, 4):
        greedy, alternating = (results["binary coding", method, bits]["error"] for method in ("greedy", "alternating"))
        assert alternating < greedy


def test_the_sizes_are_those_of_the_paper():
    """Whole models at 3 bits, in megabytes: what the paper's size table has for GPT-2 medium and large."""
    for name, whole in (("GPT-2 medium", 327), ("GPT-2 large", 535)):
        found = alphatuning_sizes.sizes_of(name, 3)
        assert round((found.packed_bytes + found.rest_bytes) / 1e6) == whole
    opt = alphatuning_sizes.sizes_of("OPT-1.3B", 3)
    assert opt.trained == 442_368


@linux_only
def test_sizes(smoke):
    shown = smoke("alphatuning_sizes").shown
    assert "model.layers.0.self_attn.q_proj" in shown and "| packed |" in shown
    assert "**not met**" not in shown.split("peak memory")[0]


@linux_only
def test_adapters(smoke):
    found = smoke("adapters")
    assert "memory grown, over the adapter files" in found.shown and "all adapters in a batch, over one" in found.shown
    loading, pool, mixing = found.results
    assert loading["files"] == pool["files"] > 0 and loading["switch"] > 0 and pool["switch"] > 0
    assert {len(seconds) for tasks in mixing.values() for task in tasks.values() for seconds in task.values()} == {2}


@linux_only
def test_plan_memory(smoke):
    found = smoke("plan_memory")
    assert "| tuning, PEQA, 4 bits |" in found.shown and "| serving, float |" in found.shown
    assert "largest difference" in found.shown and len(found.results) == 2
    assert all(one["ratio"] == one["predicted"] / one["measured"] for one in found.results)


def test_experts(smoke):
    found = smoke("experts")
    assert len(found.results) == 3 and "packed over eager" in found.shown


def test_kernels(smoke):
    found = smoke("kernels")
    assert "| ours, 3 bits |" in found.shown
    products = [one for one in found.results if "milliseconds" in one]
    assert products and all(time > 0 for one in products for time in one["milliseconds"].values())
    errors = [one for one in found.results if "mean" in one]
    assert errors and all(one["products"] == 14 * 4 and one["mean"] <= one["largest"] < 0.05 for one in errors)


@linux_only
def test_loading(smoke):
    found = smoke("loading")
    (row,) = found.results
    layers = {title: one["layers"] for title, one in row.items()}
    assert layers[loading.OURS.title] == layers[loading.OUR_BCQ.title] == ["PackedLinear"]
    assert layers[loading.STOCK.title] == layers[loading.BFLOAT16.title] == ["Linear"], "stock is stock"
    assert "peak of loading, over the packed bytes" in found.shown and "first token, first call" in found.shown


@linux_only
def test_loading_what_others_packed(smoke):
    found = smoke("loading_others")
    assert {one["layer"] for one in found.results[0].values()} == {"PackedLinear"}
    assert "AWQ: peak of loading, over the packed bytes" in found.shown


@linux_only
def test_decode(smoke):
    rows = smoke("decode").rows
    (plain,), (saved,) = ([row["result"] for row in rows[name]] for name in ("smollm2", "smollm2_saved"))
    for one in (*plain.values(), *saved.values()):
        assert one["tokens_per_second"] > 0 and one["first_token_seconds"] > 0
    assert plain[decode.TWO.title]["weight_bytes"] < plain[decode.FOUR.title]["weight_bytes"]
    assert set(saved) == {decode.SAVED.title, decode.NEVER_SAVED.title}
