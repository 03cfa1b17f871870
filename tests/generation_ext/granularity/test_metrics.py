# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Measures of paraphrases, and the tokenizer and encoding of pairs."""

from __future__ import annotations

import zipfile

import pytest


pytest.importorskip("nltk"), pytest.importorskip("rouge_score"), pytest.importorskip("sacrebleu")

from generation_ext.granularity.metrics import PAPERS_IBLEU, paraphrase_metrics, sentence_bleu, wordnet  # noqa: E402
from generation_ext.granularity.tokenizer import train_tokenizer  # noqa: E402
from generation_ext.granularity.training import encode_pairs  # noqa: E402


SOURCE = "how can i learn to play the piano at home"
REFERENCE = "what is the best way to learn to play the piano at home"


def test_perfect_and_copied():
    perfect = paraphrase_metrics([REFERENCE], [REFERENCE], [SOURCE])
    for name in ("ROUGE-L", "corpus BLEU"):
        assert perfect[name] == pytest.approx(100)
    copied = paraphrase_metrics([SOURCE], [REFERENCE], [SOURCE])
    said = SOURCE.split()
    expected = 0.8 * sentence_bleu(said, REFERENCE.split(), 4) - 0.2 * sentence_bleu(said, said, 4)
    assert copied["iBLEU"] == pytest.approx(100 * expected)
    assert copied["iBLEU"] < copied["BLEU-4"] < perfect["BLEU-4"]


def test_the_papers_code_takes_the_sources_first_word_for_the_source():
    copied = paraphrase_metrics([SOURCE], [REFERENCE], [SOURCE])
    said = SOURCE.split()
    expected = 0.8 * sentence_bleu(said, REFERENCE.split(), 4) - 0.2 * sentence_bleu(said, ["how"], 4)
    assert copied[PAPERS_IBLEU] == pytest.approx(100 * expected) and copied[PAPERS_IBLEU] > copied["iBLEU"] + 10
    otherwise = paraphrase_metrics([SOURCE], [REFERENCE], ["how come"])
    assert otherwise[PAPERS_IBLEU] == copied[PAPERS_IBLEU], "more than the first word counts"


def test_copies():
    predictions = ["How can I learn  it ?", "how can i learn it", "c++", "", "x"]
    sources = ["how can i learn it?", "how can you learn it", "c#", "how", ""]
    assert paraphrase_metrics(predictions, ["a"] * 5, sources)["copies"] == pytest.approx(20)


@pytest.mark.parametrize(
    "text",
    [
        "как мне быстро научиться плавать",
        "我怎么能快一点学会游泳",
        "मैं कैसे सीखूँ",
        "πώς μπορώ",
        "l'élève est blessé",
        "c++",
    ],
)
def test_a_text_of_any_script_is_like_itself(text):
    """(rouge_score's own tokenizer has no word in most of them.)"""
    same = paraphrase_metrics([text], [text], [SOURCE])
    assert same["ROUGE-L"] == pytest.approx(100) and 0 < same["BLEU-2"] <= 100 and 0 < same["BLEU-4"] <= 100
    assert paraphrase_metrics(["c++ is good"], ["c# is good"], [SOURCE])["ROUGE-L"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("unpacked", [True, False])
def test_wordnet_is_found_as_nltk_finds_it(tmp_path, monkeypatch, unpacked):
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert wordnet().synsets("word") == []
    if unpacked:
        (tmp_path / "corpora" / "wordnet").mkdir(parents=True)
    else:
        (tmp_path / "corpora").mkdir()
        with zipfile.ZipFile(tmp_path / "corpora" / "wordnet.zip", "w") as file:
            file.writestr("wordnet/lexnames", "")
    assert wordnet() is nltk.corpus.wordnet


def test_bleu_falls_with_every_word_that_is_wrong():
    """(nltk's method 7 alone gives more than 1 for perfect texts.)"""
    wanted = "a b c d e f g h".split()
    found = [sentence_bleu(wanted[: 8 - wrong] + ["x"] * wrong, wanted, 4) for wrong in range(5)]
    assert found == sorted(found, reverse=True) and found[0] == 1 > found[-1]
    assert (
        sentence_bleu([], wanted, 4) == 0
        and sentence_bleu(["a"], ["a"], 4) == 1
        and sentence_bleu(["b"], ["a"], 4) == 0
    )


def test_case_does_not_matter_and_emptiness_counts_zero():
    assert paraphrase_metrics([REFERENCE.upper()], [REFERENCE], [SOURCE]) == pytest.approx(
        paraphrase_metrics([REFERENCE], [REFERENCE], [SOURCE])
    )
    half = paraphrase_metrics(["", REFERENCE], [REFERENCE, REFERENCE], [SOURCE, SOURCE])
    assert half["ROUGE-L"] == pytest.approx(50)
    assert paraphrase_metrics([REFERENCE], [""], [SOURCE])["BLEU-4"] == 0


def test_evaluate_metric():
    pytest.importorskip("evaluate")
    from generation_ext.granularity.evaluate_metrics import ParaphraseMetric

    texts = {"predictions": [SOURCE], "references": [REFERENCE], "sources": [SOURCE]}
    assert ParaphraseMetric().compute(**texts) == pytest.approx(paraphrase_metrics([SOURCE], [REFERENCE], [SOURCE]))
    for name in ("iBLEU", PAPERS_IBLEU, "copies"):
        assert list(ParaphraseMetric(name).compute(**texts)) == [name]


def test_bad_input():
    with pytest.raises(ValueError, match="2 predictions, 1 references"):
        paraphrase_metrics(["a", "b"], ["a"], ["a"])
    with pytest.raises(ValueError, match="predictions is empty"):
        paraphrase_metrics([], [], [])


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_tokenizer(kind, tmp_path):
    texts = [SOURCE, REFERENCE, "Can I learn the PIANO?"]
    tokenizer = train_tokenizer(texts, 120, kind, max_length=16)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    ids = tokenizer(SOURCE)["input_ids"]
    assert ids[0] == 1 and ids[-1] == 2 and tokenizer.decode(ids, skip_special_tokens=True).strip() == SOURCE
    tokenizer.save_pretrained(tmp_path)
    back = type(tokenizer).from_pretrained(tmp_path)
    assert back(SOURCE)["input_ids"] == ids and back.model_max_length == 16
    assert back.pad_token_id == 0 and back.bos_token_id == 1 and back.eos_token_id == 2


def test_bad_tokenizers():
    with pytest.raises(ValueError, match="kind='char'"):
        train_tokenizer(["a"], 50, "char")
    with pytest.raises(ValueError, match="vocab_size=5"):
        train_tokenizer(["a"], 5)
    with pytest.raises(ValueError, match="no words"):
        train_tokenizer(["", " "], 50)


class T5Tokenizer:
    """Tokens and an end token, with nothing before them."""

    cls_token_id, model_max_length, ids = None, 8, [5, 6, 7, 1]

    def __call__(self, texts, **options):
        return {"input_ids": [self.ids for _ in texts]}


def test_the_first_word_is_a_label_and_long_texts_are_cut():
    tokenizer = train_tokenizer([SOURCE, REFERENCE], 120, max_length=8)
    data = encode_pairs(tokenizer, [{"source": SOURCE, "target": REFERENCE}])
    ids = tokenizer(REFERENCE, truncation=True)["input_ids"]
    assert data[0]["labels"] == ids[1:] and len(data[0]["input_ids"]) == 8
    assert data[0]["labels"][0] == tokenizer("what")["input_ids"][1]
    # T5's tokenizer puts nothing before a text, BART's decoder reads another token than the one that its texts begin with
    assert encode_pairs(tokenizer, [{"source": SOURCE, "target": REFERENCE}], start=0)[0]["labels"] == ids
    words = T5Tokenizer()
    assert encode_pairs(words, [{"source": SOURCE, "target": REFERENCE}], start=0)[0]["labels"] == words.ids
    with pytest.raises(ValueError, match="pair 1 has an empty target"):
        encode_pairs(tokenizer, [{"source": "a", "target": "b"}, {"source": "a", "target": " "}])
    with pytest.raises(ValueError, match="no pairs"):
        encode_pairs(tokenizer, [])
