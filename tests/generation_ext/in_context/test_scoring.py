# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Label scores are those of a naive loop over whole strings, whatever is shared, packed, batched, dropped or cut."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration

from generation_ext.in_context import scoring
from generation_ext.in_context.scoring import CONTENT_FREE, LabelScorer
from generation_ext.prompts import Task
from generation_ext.shared_prefix import batching
from peft_ext.language_model import language_model
from tests.tiny.byte_models import CAUSAL, LENGTH, model, naive_log_prob
from tests.tiny.tokenizers import chat_tokenizer, tokenizer, tokenizer_for


TASK = Task("In: {text}\nOut:", {"neg": " bad", "pos": " good", "very": " goodness", "other": " x"})
PAIR = Task("{premise}\nso {hypothesis}? ", {"entailment": "true", "contradiction": "false"})
TEXTS = [
    "a fine film",
    "",
    "two hours that are gone for good",
    "it",
    "é ü 漢字",
    "so so",
    "dull",
    "a joy",
    "on and on",
]
SHOWN = [("what a bore", "neg"), ("a masterpiece", "pos"), ("neither here nor there", "other")]


def naive(name, task, texts, demonstrations, lm=None, mean=False):
    rows = []
    for text, shown in zip(texts, demonstrations):
        context = task.context(text, shown)
        found = [naive_log_prob(name, lm or model(name), context, word) for word in task.words]
        rows.append([total / count if mean else total for total, count in found])
    return np.array(rows)


def close(ours, reference):
    assert ours.shape == reference.shape
    assert np.abs(reference).max() > 1, "a reference of zeros shows nothing"
    np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
@pytest.mark.parametrize("shown", [[], SHOWN], ids=["zero-shot", "demonstrations"])
def test_equals_the_naive_loop(name, shown):
    scores = LabelScorer(model(name), tokenizer_for(name), TASK).score(TEXTS, shown)
    close(scores.log_probs, naive(name, TASK, TEXTS, [shown] * len(TEXTS)))
    assert scores.labels == ("neg", "pos", "very", "other")


@pytest.mark.parametrize("forced", [None, 7])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_begins_as_in_generate(name, forced):
    """The model's config, its generation config and their start tokens all disagree; BART's decoders write a forced token
    first."""
    if name == "t5":
        lm = copy.deepcopy(model("t5"))
    else:
        sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 260, "init_std": 0.2}
        sizes.update(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64)
        torch.manual_seed(0)
        config = BartConfig(**sizes, pad_token_id=1, eos_token_id=258, bos_token_id=0, forced_eos_token_id=None)
        lm = BartForConditionalGeneration(config).eval()
    lm.config.decoder_start_token_id, lm.config.bos_token_id = 3, 4
    lm.generation_config.decoder_start_token_id, lm.generation_config.bos_token_id = 5, 6
    ids = torch.tensor([tokenizer_for("t5")("In: a joy\nOut:")["input_ids"]])
    lm.generation_config.forced_bos_token_id = forced
    begun = [5] if forced is None else [5, forced]
    assert lm.generate(ids, max_new_tokens=len(begun))[0, : len(begun)].tolist() == begun
    words = tokenizer_for("t5")
    expected = []
    for word in TASK.words:
        label = words(word.strip(), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = lm(input_ids=ids, decoder_input_ids=torch.tensor([[*begun, *label[:-1]]])).logits[0]
        expected.append(logits.log_softmax(-1)[len(begun) - 1 :][range(len(label)), label].sum().item())
    close(LabelScorer(lm, words, TASK).score(["a joy"]).log_probs, np.array([expected]))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_eager_attention(name):
    scores = LabelScorer(model(name, "eager"), tokenizer_for(name), TASK).score(TEXTS, SHOWN)
    close(scores.log_probs, naive(name, TASK, TEXTS, [SHOWN] * len(TEXTS)))


@pytest.mark.parametrize("name", ["llama", "mistral", "bloom"])
def test_demonstrations_of_their_own(name):
    shown = [SHOWN[: i % 3] if i != 4 else [] for i in range(len(TEXTS))]
    scores = LabelScorer(model(name), tokenizer_for(name), TASK).score_each(TEXTS, shown)
    close(scores.log_probs, naive(name, TASK, TEXTS, shown))


def test_groups_that_share_demonstrations():
    """A large group with a prefix of its own, and two small ones in rows of their own."""
    first, second, third = SHOWN, SHOWN[::-1], SHOWN[:1]
    texts = TEXTS + ["once more", "good", "worse"]
    shown = [first] * len(TEXTS) + [second, third, second]
    scores = LabelScorer(model("llama"), tokenizer_for("llama"), TASK).score_each(texts, shown)
    close(scores.log_probs, naive("llama", TASK, texts, shown))


@pytest.mark.parametrize("shown", [[], SHOWN])
def test_pairs_and_the_mean_over_tokens(shown):
    examples = [{"premise": text, "hypothesis": text[::-1], "unused": 3} for text in TEXTS]
    demonstrations = [({"premise": text, "hypothesis": "no"}, "contradiction") for text, _ in shown]
    scorer = LabelScorer(model("llama"), tokenizer_for("llama"), PAIR, normalization="mean")
    reference = naive("llama", PAIR, examples, [demonstrations] * len(TEXTS), mean=True)
    close(scorer.score(examples, demonstrations).log_probs, reference)


def test_packed_model_and_lora():
    from peft_ext import PeqaConfig

    torch.manual_seed(1)
    packed = get_peft_model(copy.deepcopy(model("llama")), PeqaConfig(bits=4, group_size=16)).eval()
    lora = get_peft_model(copy.deepcopy(model("llama")), LoraConfig(init_lora_weights=False)).eval()
    plain = LabelScorer(model("llama"), tokenizer_for("llama"), TASK).score(TEXTS, SHOWN)
    for tuned in (packed, lora):
        scores = LabelScorer(tuned, tokenizer_for("llama"), TASK).score(TEXTS, SHOWN)
        close(scores.log_probs, naive("llama", TASK, TEXTS, [SHOWN] * len(TEXTS), lm=tuned))
        assert np.abs(scores.log_probs - plain.log_probs).max() > 0.01


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("limit", [1, 300_000])
def test_small_batches(name, limit, monkeypatch):
    sizes = []
    batches = batching.BatchPlanner.batches
    monkeypatch.setattr(
        batching.BatchPlanner, "batches", lambda *args: sizes.append(len(batches(*args))) or batches(*args)
    )
    scorer = LabelScorer(model(name), tokenizer_for(name), TASK, memory_limit=limit)
    scores = scorer.score(TEXTS, SHOWN)
    assert sizes[0] > 1
    close(scores.log_probs, naive(name, TASK, TEXTS, [SHOWN] * len(TEXTS)))


def test_goes_on_after_the_device_ran_out_of_memory(monkeypatch):
    calls = []

    def scarce(subject, rows, prefix):
        calls.append(rows.tokens.numel())
        if rows.tokens.numel() > 64:
            raise torch.OutOfMemoryError("out of memory")
        return read(subject, rows, prefix)

    read = scoring.read_logits
    monkeypatch.setattr(scoring, "read_logits", scarce)
    scorer = LabelScorer(model("llama"), tokenizer_for("llama"), TASK)
    scores = scorer.score(TEXTS, SHOWN[:0])
    assert calls[0] > 64 >= calls[-1]
    close(scores.log_probs, naive("llama", TASK, TEXTS, [[]] * len(TEXTS)))


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]])
def test_contextual_calibration(texts):
    scorer = LabelScorer(model("llama"), tokenizer_for("llama"), TASK)
    scores = scorer.score(texts, SHOWN, calibrate=True)
    raw = naive("llama", TASK, texts, [SHOWN] * len(texts))
    close(scores.log_probs, raw)
    free = np.exp(naive("llama", TASK, CONTENT_FREE, [SHOWN] * len(CONTENT_FREE)))
    prior = (free / free.sum(1, keepdims=True)).mean(0)
    expected = np.exp(raw) / prior
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(scores.probabilities(), expected, atol=1e-4)
    assert scores.predictions() == [scores.labels[i] for i in expected.argmax(1)]


@pytest.mark.filterwarnings("ignore:.*which is few")
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("unlabelled", [None, ["another", "and one more", "third"]])
def test_batch_calibration(unlabelled, strength):
    scorer = LabelScorer(model("llama"), tokenizer_for("llama"), TASK)
    scores = scorer.score(TEXTS, SHOWN, calibrate="batch", unlabelled=unlabelled, strength=strength)
    raw = naive("llama", TASK, TEXTS, [SHOWN] * len(TEXTS))
    close(scores.log_probs, raw)
    others = raw if unlabelled is None else naive("llama", TASK, unlabelled, [SHOWN] * len(unlabelled))
    mean = np.exp(others) / np.exp(others).sum(1, keepdims=True)
    np.testing.assert_allclose(scores.prior, np.tile(strength * np.log(mean.mean(0)), (len(TEXTS), 1)), atol=1e-4)
    np.testing.assert_allclose(scores.scores, scores.log_probs - scores.prior)


def test_content_free_calibration_by_halves():
    scorer = LabelScorer(model("llama"), tokenizer_for("llama"), TASK)
    whole, half = (scorer.score(TEXTS, SHOWN, calibrate="content_free", strength=each) for each in (1.0, 0.5))
    np.testing.assert_array_equal(whole.prior, scorer.score(TEXTS, SHOWN, calibrate=True).prior)
    np.testing.assert_allclose(half.prior, whole.prior / 2, rtol=1e-6)


def test_few_inputs_for_a_mean_are_warned_of():
    scorer = LabelScorer(model("llama"), tokenizer_for("llama"), TASK)
    with pytest.warns(UserWarning, match="takes the labels' prior from 2 inputs, which is few; pass 16 or more"):
        scorer.score(["a", "b"], calibrate="batch")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (
            ["a"],
            {"calibrate": "batch"},
            "mean over inputs, but examples has 1; pass texts without labels as unlabelled",
        ),
        (["a"], {"calibrate": "batch", "unlabelled": []}, "but unlabelled has 0"),
        (["a"], {"calibrate": "btach"}, "calibrate='btach' is unknown; choose True, False or one of"),
        (["a"], {"calibrate": True, "unlabelled": ["b"]}, "unlabelled inputs are for calibrate='batch'"),
        (["a"], {"calibrate": True, "strength": 0}, "strength=0 of the calibration must be above 0"),
    ],
)
def test_calibrations_that_are_refused(texts, options, message):
    with pytest.raises(ValueError, match=message):
        LabelScorer(model("llama"), tokenizer_for("llama"), TASK).score(texts, **options)


def test_a_mean_over_others_needs_one_context():
    scorer = LabelScorer(model("llama"), tokenizer_for("llama"), TASK)
    with pytest.raises(ValueError, match="need demonstrations that all examples share"):
        scorer.score_each(["a", "b"], [SHOWN[:1], SHOWN[1:]], "batch", ["c", "d"])


def test_the_model_is_left_as_it_was():
    lm = copy.deepcopy(model("gpt2")).train()
    lm.transformer.h[0].eval()
    state = copy.deepcopy(lm.state_dict())
    LabelScorer(lm, tokenizer(), TASK).score(TEXTS, SHOWN)
    assert lm.training and lm.transformer.h[1].training and not lm.transformer.h[0].training
    assert not lm.lm_head._forward_pre_hooks
    for name, value in lm.state_dict().items():
        assert torch.equal(value, state[name])


def test_no_examples():
    scores = LabelScorer(model("gpt2"), tokenizer(), TASK).score([])
    assert scores.log_probs.shape == (0, 4) and scores.predictions() == []


# inputs that don't fit


def test_too_long_is_an_error():
    scorer = LabelScorer(model("gpt2"), tokenizer(), TASK)
    with pytest.raises(ValueError, match="input 1 with its 3 demonstrations takes .* tokens, but 503 fit"):
        scorer.score(["short", "long " * 200], SHOWN)
    assert scorer.max_tokens == LENGTH - len(" goodness")


def test_demonstrations_are_dropped_from_the_front():
    scorer = LabelScorer(model("gpt2"), tokenizer(), TASK, overflow="drop_demonstrations", max_length=120)
    texts = ["s" * 20, "x" * 60, "y" * 90]
    with pytest.warns(UserWarning, match="3 of 3 inputs are too long for 111 tokens; 6 demonstrations were dropped"):
        scores = scorer.score(texts, SHOWN)
    assert scores.dropped.tolist() == [1, 2, 3] and scores.truncated.tolist() == [0, 0, 0]
    close(scores.log_probs, naive("gpt2", TASK, texts, [SHOWN[1:], SHOWN[2:], []]))
    with pytest.raises(ValueError, match="too long even without demonstrations; shorten it, or use"):
        scorer.score(["z" * 200], SHOWN)


def test_the_prior_is_behind_the_demonstrations_that_are_left():
    scorer = LabelScorer(model("gpt2"), tokenizer(), TASK, overflow="drop_demonstrations", max_length=120)
    with pytest.warns(UserWarning, match="dropped"):
        scores = scorer.score(["s" * 20], SHOWN, calibrate=True)
    assert scores.dropped.tolist() == [1]
    alone = LabelScorer(model("gpt2"), tokenizer(), TASK).score(["s" * 20], SHOWN[1:], calibrate=True)
    np.testing.assert_allclose(scores.prior, alone.prior, atol=1e-4)


def test_inputs_are_truncated():
    scorer = LabelScorer(model("gpt2"), tokenizer(), PAIR, overflow="truncate_input", max_length=60)
    texts = [{"premise": "p" * 100_000, "hypothesis": "h" * 5}, {"premise": "a", "hypothesis": "b"}]
    with pytest.warns(UserWarning, match="1 of 2 inputs are too long for 55 tokens; 1 were truncated"):
        scores = scorer.score(texts)
    kept = 55 - len("\nso hhhhh? ")
    assert scores.truncated.tolist() == [100_000 - kept, 0]
    cut = [{"premise": "p" * kept, "hypothesis": "h" * 5}, texts[1]]
    close(scores.log_probs, naive("gpt2", PAIR, cut, [[], []]))


def test_first_demonstrations_then_the_input():
    scorer = LabelScorer(model("gpt2"), tokenizer(), TASK, overflow="drop_then_truncate", max_length=60)
    with pytest.warns(UserWarning, match="2 of 2 inputs are too long"):
        scores = scorer.score(["a", "c" * 100], SHOWN)
    assert scores.dropped.tolist() == [2, 3] and scores.truncated.tolist() == [0, 100 - (51 - len("In: \nOut:"))]
    texts = ["a", "c" * (100 - scores.truncated[1])]
    close(scores.log_probs, naive("gpt2", TASK, texts, [SHOWN[2:], []]))
    with pytest.raises(ValueError, match="the template alone is too long"):
        LabelScorer(model("gpt2"), tokenizer(), TASK, overflow="drop_then_truncate", max_length=15).score(["a" * 9])


def test_demonstrations_that_leave_no_room():
    scorer = LabelScorer(model("gpt2"), tokenizer(), TASK, overflow="truncate_input", max_length=60)
    with pytest.raises(ValueError, match="too long even without the input; use fewer demonstrations"):
        scorer.score(["a"], SHOWN)


def test_more_classes_than_demonstrations_fit():
    task = Task("In: {text}\nOut:", {str(i): f" label{i}" for i in range(60)})
    shown = [(f"text {i}", str(i)) for i in range(60)]
    with pytest.raises(ValueError, match="input 0 with its 60 demonstrations takes"):
        LabelScorer(model("gpt2"), tokenizer(), task).score(["a"], shown)
    with pytest.warns(UserWarning, match="dropped"):
        scores = LabelScorer(model("gpt2"), tokenizer(), task, overflow="drop_demonstrations").score(["a"], shown)
    kept = shown[scores.dropped[0] :]
    assert 0 < len(kept) < 60
    close(scores.log_probs, naive("gpt2", task, ["a"], [kept]))


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "max"}, "normalization='max' is unknown"),
        ({"overflow": "ignore"}, "overflow='ignore' is unknown"),
        ({"max_length": 0}, "max_length=0 must be positive"),
        ({"memory_limit": 0}, "memory_limit=0 must be a positive"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LabelScorer(model("gpt2"), tokenizer(), TASK, **options)


def test_models_that_cannot_be_scored():
    with pytest.raises(ValueError, match="is an encoder"):
        LabelScorer(model("bert"), tokenizer(), TASK)
    with pytest.raises(TypeError, match="transformers model"):
        LabelScorer(torch.nn.Linear(2, 2), tokenizer(), TASK)
    prompts = get_peft_model(
        copy.deepcopy(model("gpt2")), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match="learned prompts"):
        LabelScorer(prompts, tokenizer(), TASK)
    headless = model("gpt2").transformer
    with pytest.raises(TypeError, match="no output head"):
        LabelScorer(headless, tokenizer(), TASK).score(TEXTS)
    damaged = copy.deepcopy(model("gpt2"))
    damaged.transformer.ln_f.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        LabelScorer(damaged, tokenizer(), TASK).score(TEXTS)


def test_models_that_share_no_prefix_say_so():
    """(tests/families/test_reading.py compares their scores.)"""
    import transformers

    config = transformers.MambaConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, state_size=4)
    recurrent = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.warns(
        UserWarning, match=r"model \(MambaForCausalLM\) can't share a prefix .*Every text runs by itself"
    ):
        LabelScorer(recurrent, tokenizer(), TASK)
    with pytest.raises(ValueError, match="Use a model with full or sliding attention"):
        language_model(recurrent, must_share=True)
    other = copy.deepcopy(model("llama"))
    other.config._attn_implementation = "flash_attention_2"
    with pytest.warns(UserWarning, match="attn_implementation='sdpa'"):
        LabelScorer(other, tokenizer(), TASK)


class Nothing:
    """A tokenizer that drops or joins what it is told to."""

    bos_token_id = eos_token_id = None

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, text, add_special_tokens=True, verbose=True):
        texts = [text] if isinstance(text, str) else text
        found = [[ord(character) % 250 for character in self.ids(each)] for each in texts]
        return {"input_ids": found[0] if isinstance(text, str) else found}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (lambda text: text.replace(" bad", ""), "no token of ' bad', the word of 'neg'"),
        (lambda text: text.replace(" bad", " good"), "'neg' and 'pos' are the same tokens"),
    ],
)
def test_labels_of_the_tokenizer(ids, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LabelScorer(model("gpt2"), Nothing(ids), TASK)


@pytest.mark.parametrize("shown", [[], SHOWN], ids=["zero-shot", "demonstrations"])
@pytest.mark.parametrize("template", ["{text}", "In: {text}", "Q {text} A"])
def test_labels_begin_where_the_tokens_of_the_whole_strings_part(template, shown):
    """Some inputs end in a character that the tokenizer joins with the labels' first ones, to one or to two tokens."""
    words = Nothing(lambda text: text.replace("!\n", "J").replace("?\nN", "K"))
    task = Task(template, {"neg": "\nNo", "pos": "\nYes", "other": "\nx"}, separator=" ; ")
    texts = ["so so", "a fine film!", "is it good?", "dull", "on!", "", "a joy", "it", "what?", "hm"]
    if template == "{text}":
        texts.remove("")
    scores = LabelScorer(model("gpt2"), words, task).score(texts, shown)
    rows = []
    for text in texts:
        context = task.context(text, shown)
        wholes = [words(context + word)["input_ids"] for word in task.words]
        own = words(context)["input_ids"]
        common = min(
            next((i for i in range(len(own)) if whole[i : i + 1] != own[i : i + 1]), len(own)) for whole in wholes
        )
        with torch.no_grad():
            found = [model("gpt2")(torch.tensor([whole])).logits[0].log_softmax(-1) for whole in wholes]
        rows.append([
            sum(logits[at - 1, whole[at]].item() for at in range(common, len(whole)))
            for logits, whole in zip(found, wholes)
        ])  # fmt: skip
    close(scores.log_probs, np.array(rows))


def test_a_start_token_that_is_written_out_is_not_put_there_again():
    """(A chat template's string has one; two were read before.)"""
    words = tokenizer_for("llama")
    start = words.convert_ids_to_tokens(words("x")["input_ids"][:1])[0]
    written = LabelScorer(model("llama"), words, Task(start + TASK.template, TASK.labels)).score(TEXTS)
    np.testing.assert_array_equal(written.log_probs, LabelScorer(model("llama"), words, TASK).score(TEXTS).log_probs)


@pytest.mark.parametrize("shown", [[], SHOWN], ids=["zero-shot", "demonstrations"])
def test_a_conversation(shown):
    """The user shows the example, the assistant says the label; demonstrations are earlier turns."""
    words = chat_tokenizer()
    scores = LabelScorer(model("gpt2"), words, TASK, chat=True).score(TEXTS, shown)
    rows = []
    for text in TEXTS:
        talk = [{"role": "user", "content": TASK.text(text)}]
        for example, label in reversed(shown):
            talk = [
                {"role": "user", "content": TASK.text(example)},
                {"role": "assistant", "content": TASK.word(label).strip()},
                *talk,
            ]
        before = words.apply_chat_template(talk, tokenize=True, add_generation_prompt=True, return_dict=False)
        row = []
        for word in TASK.words:
            label = words(word.strip(), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model("gpt2")(torch.tensor([before + label])).logits[0].log_softmax(-1)
            row.append(sum(logits[len(before) - 1 + i, token].item() for i, token in enumerate(label)))
        rows.append(row)
    close(scores.log_probs, np.array(rows))
    with pytest.raises(ValueError, match="has no chat template"):
        LabelScorer(model("gpt2"), tokenizer(), TASK, chat=True)


def test_white_space_that_is_joined_with_the_label():
    """As byte-pair tokenizers do with 'Out: ' and 'bad': the space belongs to the label's token."""
    joined = Nothing(lambda text: text.replace(": bad", ":B").replace(": good", ":G"))
    task = Task("In: {text}\nOut: ", {"neg": "bad", "pos": "good"})
    scorer = LabelScorer(model("gpt2"), joined, task)
    assert [len(ids) for ids in scorer.labels.usual.ids] == [1, 1]
    plain = Nothing(lambda text: text)
    apart = LabelScorer(model("gpt2"), plain, Task("In: {text}\nOut:", {"neg": "B", "pos": "G"}))
    close(scorer.score(TEXTS).log_probs, apart.score(TEXTS).log_probs)


def test_a_token_that_the_model_lacks():
    words = copy.deepcopy(tokenizer())
    words.add_tokens([f"<{number}>" for number in range(9)])
    with pytest.raises(ValueError, match=r"text 0 has the token '<8>' \(266\), which the model lacks"):
        LabelScorer(model("gpt2"), words, TASK).score(["a <8>"])


def test_examples_that_are_none():
    scorer = LabelScorer(model("gpt2"), tokenizer(), TASK)
    with pytest.raises(TypeError, match="single string"):
        scorer.score("a text")
    with pytest.raises(TypeError, match="must be a string or a mapping"):
        scorer.score([3])
    with pytest.raises(ValueError, match="label='nope' is unknown"):
        scorer.score(["a"], [("b", "nope")])
    with pytest.raises(ValueError, match="2 examples, but demonstrations for 1"):
        scorer.score_each(["a", "b"], [[]])


def test_nothing_to_begin_with():
    """No start token, no template text, an empty input: nothing that a label could follow."""
    task = Task("{text}", {"a": "a", "b": "b"})
    with pytest.raises(ValueError, match="no start token"):
        LabelScorer(model("gpt2"), Nothing(lambda text: text), task).score([""])
    scores = LabelScorer(model("gpt2"), tokenizer(), task).score(["", "x"])
    with torch.no_grad():
        logits = model("gpt2")(torch.tensor([[tokenizer().eos_token_id]])).logits[0, -1].log_softmax(-1)
    expected = [logits[tokenizer()(word)["input_ids"][0]].item() for word in "ab"]
    np.testing.assert_allclose(scores.log_probs[0], expected, atol=1e-4)
