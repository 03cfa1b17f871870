# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks of GA-Attention and of paraphrases run from end to end, and go on where they were stopped."""

from __future__ import annotations

import itertools
import json

import pytest

from tests.tiny.folders import save_tiny_model
from tests.tiny.tokenizers import byte_tokenizer


pytest.importorskip("nltk"), pytest.importorskip("matplotlib")

from benchmarks import ga_attention, paraphrase, paraphrase_data, paraphrase_lora  # noqa: E402


def test_ga_attention(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ga_attention, "LENGTHS", (20, 32))
    output = tmp_path / "ga.json"
    ga_attention.main(["--smoke", "--output", str(output)])
    shown = capsys.readouterr().out
    assert "32 tokens, batch 2: R*S" in shown and "training step over the Transformer's" in shown
    rows = {row["settings"]["part"]: row["result"] for row in json.loads(output.read_text())["rows"]}
    # a bias and what its gradient takes, beside the projections
    assert rows[20]["peak"]["R*S"] < 1.5 * rows[20]["peak"][ga_attention.PLAIN]
    before = output.read_text()
    ga_attention.main(["--smoke", "--output", str(output)])
    assert output.read_text() == before, "finished rows were measured again"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs of both sets, a text of each in two pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    for number, name in enumerate((*paraphrase_data.SETS.values(), *paraphrase_data.TEST.values())):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        pairs = [
            {"source": f"how do i {number} {i} it", "target": f"what is the way to {number} {i // 2} it"}
            for i in range(48)
        ]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def test_paraphrase(data, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    output = tmp_path / "paraphrase.json"
    arguments = ["--smoke", "--data-dir", str(data), "--output", str(output), "--work_dir", str(tmp_path / "work")]
    arguments += ["--modes", "Transformer", "S", "R*S", "--seeds", "0", "--lora_model", str(model)]
    arguments += ["--lora_dtype", "float32"]
    paraphrase.main(arguments)
    shown = capsys.readouterr().out
    for text in (
        "| quora | BLEU-2 |",
        "| C-DNPG (R*S) |",
        "its worst seed above",
        "changes SmolLM2 + LoRA's iBLEU by",
    ):
        assert text in shown
    assert output.with_suffix(".png").stat().st_size > 5000
    assert (tmp_path / "paraphrase-sentence.png").stat().st_size > 5000
    rows = [row["settings"] for row in json.loads(output.read_text())["rows"]]
    assert [(row["data"], row["mode"]) for row in rows[:3]] == [("quora", m) for m in ("Transformer", "S", "R*S")]
    # on the second set the Transformer and the better variant, then the language model
    assert [row["data"] for row in rows[3:]] == ["twitter", "twitter", "quora", "quora"]
    assert [row["mode"] for row in rows[5:]] == list(paraphrase_lora.LORAS)
    before = output.read_text()
    paraphrase.main(arguments)
    assert output.read_text() == before, "finished rows were measured again"


def test_the_variant_for_other_sets_is_chosen_on_validation_pairs(data, tmp_path):
    arguments = ["--data-dir", str(data), "--output", str(tmp_path / "x.json"), "--work_dir", str(tmp_path / "work")]
    study = paraphrase.Study(paraphrase._arguments([*arguments, "--seeds", "0"]))
    for mode, validation, test in (("Transformer", 9.0, 9.0), ("R", 2.0, 8.0), ("S", 3.0, 1.0)):
        row = paraphrase.Row("quora", mode, 0)
        study.results.add(study.settings(row), {"validation iBLEU": validation, "metrics": {"iBLEU": test}})
    assert study.best("quora") == "S"
    assert [tuple(row) for row in study.plan()][5:9] == [
        ("quora", "Transformer", 0),
        ("quora", "S", 0),
        ("twitter", "Transformer", 0),
        ("twitter", "S", 0),
    ]


def test_a_trained_model_is_not_taken_for_another(data, tmp_path):
    def folder(*more):
        arguments = [
            "--data-dir",
            str(data),
            "--output",
            str(tmp_path / "x.json"),
            "--work_dir",
            str(tmp_path / "work"),
        ]
        return paraphrase.Study(paraphrase._arguments([*arguments, *more]))._folder(paraphrase.Row("quora", "R", 0))

    plain = folder()
    assert folder() == plain == folder("--num_beams", "1")
    for flag, value in (("--learning_rate", "1e-4"), ("--batch", "32"), ("--vocab", "500"), ("--seed", "1")):
        assert folder(flag, value) != plain, flag


@pytest.mark.parametrize("name", paraphrase_data.SETS)
def test_splits_have_no_text_in_common(data, name):
    parts = paraphrase_data.split_pairs(data, name, 7, 9, 0)
    assert len(parts["validation"]) == 7 and len(parts["test"]) == 9 and len(parts["train"]) > 30 - 9
    texts = {part: {text for pair in pairs for text in pair.values()} for part, pairs in parts.items()}
    for one, other in itertools.combinations(texts, 2):
        assert not texts[one] & texts[other], (one, other)
    assert parts == paraphrase_data.split_pairs(data, name, 7, 9, 0)
    assert parts["validation"] != paraphrase_data.split_pairs(data, name, 7, 9, 1)["validation"]


def test_clusters():
    pairs = [("a", "b"), ("c", "d"), ("B", "e"), ("f", "g"), ("g ", "c")]
    found = paraphrase_data.clusters([{"source": one, "target": other} for one, other in pairs])
    assert [[pair["source"] for pair in group] for group in found] == [["a", "B"], ["c", "f", "g "]]


def test_prompts_carry_no_loss():
    tokenizer = byte_tokenizer()
    row = paraphrase_lora._encoded(tokenizer, {"source": "ab", "target": "cd"})
    learned = [token for token, label in zip(row["input_ids"], row["labels"]) if label != -100]
    assert row["labels"][-len(learned) :] == learned and learned[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(learned[:-1]) == " cd"
