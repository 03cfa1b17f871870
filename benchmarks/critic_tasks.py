# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""CriticControl's three tasks: prompts, the reward that a critic learns from, and judges that had no part in it.

A reward and its judge are classifiers of different kinds, trained on different halves of the labelled data.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import numpy as np

from benchmarks.core.run import data_folder
from benchmarks.sentence_encoder import FineTunedEncoder, SentenceEncoder
from peft_ext.rows import read_rows


# What a task's functions take: texts without their control code, and the code that each was to follow (or None).
Score = Callable[[Sequence[str], Sequence[Optional[str]]], np.ndarray]

# To train on; the 20 prefixes of the paper are kept for the test.
OPENINGS = (
    "It is well known that",
    "The story begins with",
    "In recent years,",
    "Many people believe that",
    "According to the report,",
    "The main reason is",
    "On Monday,",
    "One of the most",
    "At the beginning of",
    "As a result of",
    "The first thing to note is",
    "There are several",
    "Experts say that",
    "Last week,",
    "The new",
    "This article describes",
    "Despite the",
    "While it is true that",
    "A recent study",
    "The question is whether",
    "For example,",
    "Most of us",
    "In the past,",
    "The most important",
    "Today,",
    "However, the",
    "The following",
    "After a long",
    "It turns out that",
    "The history of",
)
REVIEW_OPENINGS = (
    "This is a review of the",
    "Last week I tried the",
    "Many people ask me about the",
    "After all I had heard of the",
    "We finally got to see the",
    "Here is what I think of the",
    "My friends told me about the",
    "To be honest, the",
)
TEST_OPENINGS = (
    "I must say that the",
    "In my opinion, the",
    "Yesterday I went to see the",
    "The first thing about the",
)
# every second one is for the test
REVIEW_SUBJECTS = (
    "film",
    "movie",
    "book",
    "novel",
    "restaurant",
    "hotel",
    "play",
    "concert",
    "album",
    "new phone",
    "museum",
    "show",
    "laptop",
    "series",
    "city",
    "cafe",
    "game",
    "exhibition",
    "course",
    "documentary",
)
# Topics of the universal critic, none of which is one of AG News's.
OTHER_TOPICS = (
    "Religion",
    "Military",
    "Legal",
    "Food",
    "Music",
    "Education",
    "Medicine",
    "Weather",
    "Cars",
    "Animals",
    "History",
    "Movies",
    "Gardening",
    "Travel",
    "Fashion",
    "Crime",
)


@dataclass
class Task:
    """One row of the study.

    Args:
        name: What tables call it.
        attribute: What success is.
        train_prompts, test_prompts: Texts to go on from.
        reward: In [0, 1]; what critics, best-of-N and RLOO see.
        judges: Name -> success in {0, 1}; the first one decides.
        whole_texts: Labelled texts, and their code, for weighted decoding: (text, code, has the attribute).
        codes: What is put before a prompt; (None,) without control codes.
        unseen_codes: Codes that are tested and that the critic for them never sees.
        instruction: How a user asks for the attribute in words, `{code}` and `{prompt}` filled in.
        universal_reward: The reward of other topics than the codes, by their names.
        described: Sentence embeddings of texts and of topics, see `describe`.
        new_tokens, samples: Length of a continuation, and continuations for each prompt and code.
    """

    name: str
    attribute: str
    train_prompts: list[str]
    test_prompts: list[str]
    reward: Score
    judges: dict[str, Score]
    whole_texts: list[tuple[str, Optional[str], bool]]
    instruction: str
    codes: tuple[Optional[str], ...] = (None,)
    unseen_codes: tuple[str, ...] = ()
    universal_reward: Optional[Score] = None
    described: Optional[Callable[[Sequence[str]], np.ndarray]] = None
    new_tokens: int = 24
    samples: int = 2
    generation: dict[str, Any] = field(default_factory=lambda: {"top_p": 0.9, "top_k": 0})

    @staticmethod
    def describe(topic: str) -> str:
        """A topic in the words that its embedding is taken of."""
        return f"This text is about {topic.lower()}."


WORDS, EMBEDDINGS, FINE_TUNED = "words", "MiniLM", "MiniLM, fine-tuned"


class Classifier:
    """A classifier of texts: of the words in them, of MiniLM's embeddings, or MiniLM itself, fine-tuned.

    Args:
        texts, labels: To train on.
        kind: WORDS, EMBEDDINGS or FINE_TUNED.
        encoder: Of EMBEDDINGS.
        folder: Where a fine-tuned one is kept for the next run.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[str],
        kind: str,
        encoder: Optional[SentenceEncoder] = None,
        folder: Optional[Path] = None,
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import FunctionTransformer

        if kind == FINE_TUNED:
            self._model: Any = FineTunedEncoder(folder).fit(list(texts), list(labels))
        else:
            vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
            features = vectorizer if kind == WORDS else FunctionTransformer(encoder)
            self._model = make_pipeline(features, LogisticRegression(C=10.0, max_iter=1000))
            self._model.fit(list(texts), list(labels))
        self.classes = [str(name) for name in self._model.classes_]

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """`[n, classes]`."""
        return self._model.predict_proba(list(texts))

    def accuracy(self, texts: Sequence[str], labels: Sequence[str]) -> float:
        """On other texts."""
        found = self.probabilities(texts).argmax(1)
        return float(np.mean([self.classes[index] == label for index, label in zip(found, labels)]))

    def of_label(self, label: str) -> Score:
        """The probability of one label, whatever the code."""
        column = self.classes.index(label)
        return lambda texts, codes: self.probabilities(texts)[:, column]

    def of_code(self) -> Score:
        """The probability of each text's code."""

        def score(texts: Sequence[str], codes: Sequence[Optional[str]]) -> np.ndarray:
            columns = [self.classes.index(str(code)) for code in codes]
            return self.probabilities(texts)[np.arange(len(columns)), columns]

        return score


def is_likely(score: Score) -> Score:
    """1 where the probability is above a half."""
    return lambda texts, codes: (score(texts, codes) > 0.5).astype(float)


class TaskData:
    """Makes tasks out of the data sets `sst2`, `ag_news` and `prompts`; the encoder is loaded once.

    Args:
        work: Where classifiers that take long to train are kept.
        seed: Of the halves.
        labelled: Texts of each half that rewards and judges are trained on; all by default.
        reward: The kind of the sentiment's and the topic's reward, in place of their own.
    """

    def __init__(
        self, work: Path, seed: int = 0, labelled: Optional[int] = None, reward: Optional[str] = None
    ) -> None:
        self.work, self.seed, self.labelled, self.reward = work, seed, labelled, reward
        self.accuracies: dict[str, float] = {}

    @cached_property
    def encoder(self) -> SentenceEncoder:
        """MiniLM."""
        return SentenceEncoder()

    def task(self, name: str) -> Task:
        """One of `TASKS`."""
        self.accuracies = {}
        return {"sentiment": self.sentiment, "topic": self.topic, "detoxification": self.detoxification}[name]()

    def sentiment(self) -> Task:
        """Positive reviews: the paper continues reviews as well."""
        rows = self._read("sst2/train.jsonl")
        first, second = self._halves(rows)
        reward = self._classifier(
            f"sentiment reward, {self.reward or 'MiniLM'}", first, "sst2/validation.jsonl", self.reward or FINE_TUNED
        )
        judge = self._classifier("sentiment judge, words", second, "sst2/validation.jsonl", WORDS)
        return Task(
            name="sentiment",
            attribute="positive",
            train_prompts=[f"{opening} {subject}" for opening in REVIEW_OPENINGS for subject in REVIEW_SUBJECTS[::2]],
            test_prompts=[f"{opening} {subject}" for opening in TEST_OPENINGS for subject in REVIEW_SUBJECTS[1::2]],
            reward=reward.of_label("positive"),
            judges={"words, other half": is_likely(judge.of_label("positive")), "VADER": _vader},
            whole_texts=[(text, None, label == "positive") for text, label in first],
            instruction="The following text is very positive, happy and full of praise. {prompt}",
            samples=4,
        )

    def topic(self) -> Task:
        """Continuations about one of AG News's topics, named by a control code."""
        first, second = self._halves(self._read("ag_news/train.jsonl"))
        codes = sorted({label for _, label in first})
        kind = self.reward or EMBEDDINGS
        reward = self._classifier(f"topic reward, {kind}", first, "ag_news/test.jsonl", kind)
        judge = self._classifier("topic judge, words", second, "ag_news/test.jsonl", WORDS)
        rng = random.Random(self.seed)
        whole = [
            (text, code, code == label)
            for text, label in first
            for code in (label, rng.choice([other for other in codes if other != label]))
        ]
        return Task(
            name="topic",
            attribute="about the topic",
            train_prompts=list(OPENINGS),
            test_prompts=[row["text"] for row in self._read("prompts/topic_prefixes.jsonl")],
            reward=reward.of_code(),
            judges={"words, other half": is_likely(judge.of_code())},
            whole_texts=whole,
            codes=tuple(codes),
            unseen_codes=tuple(codes),
            universal_reward=self._similarity(OTHER_TOPICS),
            described=self.encoder,
            instruction="The following text is about {code}. {prompt}",
            new_tokens=40,
        )

    def detoxification(self) -> Task:
        """Continuations that aren't toxic, of prompts that often lead there."""
        rows = self._read("prompts/rtp_sample.jsonl")
        rows = [row for row in rows if row["prompt_toxicity"] is not None]
        first, second = self._halves(rows)
        labelled = [(row["text"], "toxic" if row["prompt_toxicity"] > 0.5 else "clean") for row in first]
        held_out = [(row["text"], "toxic" if row["prompt_toxicity"] > 0.5 else "clean") for row in second]
        reward = Classifier(*zip(*labelled), EMBEDDINGS, self.encoder)
        self.accuracies["toxicity reward, MiniLM"] = reward.accuracy(*zip(*held_out))
        # those that aren't toxic yet, but were continued so by their authors
        hard = [row for row in second if row["prompt_toxicity"] < 0.5 and (row["continuation_toxicity"] or 0) > 0.5]
        train = [row["text"] for row in first if row["prompt_toxicity"] < 0.5]
        return Task(
            name="detoxification",
            attribute="clean",
            train_prompts=train,
            test_prompts=[row["text"] for row in hard][:120],
            reward=reward.of_label("clean"),
            judges={"alt-profanity-check": _not_profane},
            whole_texts=[(text, None, label == "clean") for text, label in labelled],
            instruction="The following text is polite and respectful. {prompt}",
        )

    def _similarity(self, topics: Sequence[str]) -> Score:
        """The probability of a topic by nearness of sentence embeddings, among `topics`: needs no labelled text."""
        names = {topic: self.encoder([Task.describe(topic)])[0] for topic in topics}
        matrix = np.stack(list(names.values()))

        def score(texts: Sequence[str], codes: Sequence[Optional[str]]) -> np.ndarray:
            nearness = self.encoder(texts) @ matrix.T / 0.05
            odds = np.exp(nearness - nearness.max(1, keepdims=True))
            columns = [list(names).index(str(code)) for code in codes]
            return (odds / odds.sum(1, keepdims=True))[np.arange(len(columns)), columns]

        return score

    def _classifier(self, name: str, rows: list[tuple[str, str]], held_out: str, kind: str) -> Classifier:
        texts, labels = zip(*rows)
        folder = self.work / name.replace(" ", "-").replace(",", "")
        classifier = Classifier(texts, labels, kind, self.encoder if kind == EMBEDDINGS else None, folder)
        others = [self._pair(row) for row in self._read(held_out)[:1000]]
        self.accuracies[name] = classifier.accuracy(*zip(*others))
        return classifier

    def _halves(self, rows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        shuffled = [self._pair(row) if isinstance(row, dict) and "label" in row else row for row in rows]
        random.Random(self.seed).shuffle(shuffled)
        middle = len(shuffled) // 2
        return shuffled[:middle][: self.labelled], shuffled[middle:][: self.labelled]

    @staticmethod
    def _pair(row: dict[str, Any]) -> tuple[str, str]:
        return row["text"], row["label"]

    def _read(self, name: str) -> list[dict[str, Any]]:
        folder, file = name.split("/")
        return read_rows(data_folder(folder) / file)


TASKS = ("sentiment", "topic", "detoxification")


def _vader(texts: Sequence[str], codes: Sequence[Optional[str]]) -> np.ndarray:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return np.array([float(analyzer.polarity_scores(text)["compound"] > 0) for text in texts])


def _not_profane(texts: Sequence[str], codes: Sequence[Optional[str]]) -> np.ndarray:
    from profanity_check import predict

    return 1.0 - np.asarray(predict(list(texts)), dtype=float)
