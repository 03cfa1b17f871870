# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks of GA-Attention and of paraphrases run from end to end, and go on where they were stopped."""

from __future__ import annotations

import itertools
import json

import pytest

from tests.tiny.tokenizers import byte_tokenizer


pytest.importorskip("nltk"), pytest.importorskip("matplotlib")

from benchmarks import ga_attention, paraphrase, paraphrase_data, paraphrase_lora, paraphrase_training  # noqa: E402
from benchmarks.core import experiments  # noqa: E402
from benchmarks.core.run import Run  # noqa: E402


def test_ga_attention(smoke):
    found = smoke("ga_attention")
    assert "128 tokens, batch 1: R*S" in found.shown and "training step over the Transformer's" in found.shown
    results = {row["key"]["part"]: row["result"] for row in found.rows["paper_size"]}
    # a bias and what its gradient takes, beside the projections
    assert results[20]["peak"]["R*S"] < 1.5 * results[20]["peak"][ga_attention.PLAIN]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Pairs of both sets, a text of each in two pairs."""
    folder = tmp_path / "pairs"
    monkeypatch.setenv("PEFT_EXT_DATA", str(folder))
    for number, name in enumerate((*paraphrase_data.SETS.values(), *paraphrase_data.TEST.values())):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs = [
            {"source": f"how do i {number} {i} it", "target": f"what is the way to {number} {i // 2} it"}
            for i in range(48)
        ]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def test_paraphrase(data, smoke, tmp_path):
    found = smoke("paraphrase")
    for text in (
        "| Quora | BLEU-2 |",
        "| Quora, beams chosen against nearness |",
        "(as the paper's code)",
        "| C-DNPG (R*S) |",
        "| SmolLM2 + GA + LoRA |",
        "its worst seed above",
    ):
        assert text in found.shown, text
    assert "not measured" not in found.shown
    for name in ("granularities.png", "sentence.png"):
        assert (tmp_path / "paraphrase" / name).stat().st_size > 5000
    examples = list((tmp_path / "paraphrase").glob("*.work/quora-RxS-0.examples.json"))
    assert len(json.loads(examples[0].read_text())[0]) == 3, "source, paraphrase, target"


def test_a_long_training_goes_on_where_it_was_killed(data, measured, monkeypatch):
    """The second run trains from the checkpoint, to the same weights; its seconds are those of both."""
    saved = paraphrase_training.Clock.on_save
    kill = {"quora-RxS-0-training": True}

    def killed(clock, args, state, control, **kwargs):
        saved(clock, args, state, control, **kwargs)
        if state.global_step == 2 and kill.pop(args.output_dir.rsplit("/")[-1], False):
            raise KeyboardInterrupt

    monkeypatch.setattr(paraphrase_training.Clock, "on_save", killed)
    with pytest.raises(KeyboardInterrupt):
        measured("paraphrase", "long_rxs")
    steps, count = [], paraphrase_training.Clock.on_step_end

    def counted(clock, args, state, control, **kwargs):
        steps.append(state.global_step)
        count(clock, args, state, control, **kwargs)

    monkeypatch.setattr(paraphrase_training.Clock, "on_step_end", counted)
    run = measured("paraphrase", "long_rxs")
    assert steps == [3, 4, 1, 2], "it began again, or Twitter isn't a transfer"
    first, second = (run.find(paraphrase.Row(name, "R*S", 0)._asdict()) for name in ("quora", "twitter"))
    assert [step for step, _ in first["losses"]] == [2, 4] and first["loss"] == min(
        loss for _, loss in first["losses"]
    )
    assert second["steps"] == 2 and second["apart"]["penalty"] in run.penalties
    assert not list(run.work.glob("*-training"))


def test_a_long_training_ends_where_validation_is_flat(data, measured):
    run = measured("paraphrase", "long_rxs", sets=["quora"], steps=10, warmup=0, patience=2, learning_rate=1e-12)
    found = run.find(paraphrase.Row("quora", "R*S", 0)._asdict())
    assert found["steps"] < 10 and len(found["losses"]) < 5


def test_the_long_trainings_differ_in_the_variant_alone():
    settings = [experiments.settings("paraphrase", name) for name in experiments.names("paraphrase") if "long" in name]
    modes = [each.pop("modes") for each in settings]
    assert sorted(modes) == [["R*S"], ["R+S"], ["S"], ["Transformer"]]
    of_heads = ("initial", "cross_attention")
    shared = [{name: value for name, value in each.items() if name not in of_heads} for each in settings]
    assert all(each == shared[0] for each in shared)


def test_the_variant_for_other_sets_is_chosen_on_validation_pairs(tmp_path):
    settings = {"sets": ["quora", "twitter"], "modes": ["Transformer", "R", "S", "R*S", "R+S"], "seeds": [0]}
    run = Run("paraphrase", "from_scratch", settings, folder=tmp_path)
    for mode, validation, test in (("Transformer", 9.0, 9.0), ("R", 2.0, 8.0), ("S", 3.0, 1.0)):
        run.add(
            paraphrase.Row("quora", mode, 0)._asdict(),
            {"validation iBLEU": validation, "metrics": {"iBLEU": test}, "seconds": 1.0},
        )
    assert paraphrase.best([run]) == "S"
    assert [tuple(row) for row in paraphrase.plan(run)][5:9] == [
        ("quora", "Transformer", 0),
        ("quora", "S", 0),
        ("twitter", "Transformer", 0),
        ("twitter", "S", 0),
    ]


@pytest.mark.parametrize("name", paraphrase_data.SETS)
def test_splits_have_no_text_in_common(data, name):
    parts = paraphrase_data.split_pairs(name, 7, 9, 0)
    assert len(parts["validation"]) == 7 and len(parts["test"]) == 9 and len(parts["train"]) > 30 - 9
    texts = {part: {text for pair in pairs for text in pair.values()} for part, pairs in parts.items()}
    for one, other in itertools.combinations(texts, 2):
        assert not texts[one] & texts[other], (one, other)
    assert parts == paraphrase_data.split_pairs(name, 7, 9, 0)
    assert parts["validation"] != paraphrase_data.split_pairs(name, 7, 9, 1)["validation"]


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
