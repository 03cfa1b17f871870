# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Judges of two answers to a question: a reward model, or a chat model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Protocol

from peft_ext.rows import RowFile
from trl_ext.almost.data.row_formats import SCORE
from trl_ext.almost.rewards import RewardModel


# Our own writing, after the shape of FastChat's: two scores on the first line, then the reasons.
INSTRUCTION = (
    "You compare the answers of two assistants to a user's question. Judge how helpful, correct, relevant and detailed "
    "each is; neither the order of the answers nor their length by itself is a merit. Write two numbers from 1 to 10 on "
    "the first line, the first assistant's score and the second's, with a space between them and nothing else. On the "
    "next lines, give your reasons briefly."
)
QUESTION = "[Question]\n{question}\n\n[First assistant's answer]\n{first}\n\n[Second assistant's answer]\n{second}"
_NUMBER = r"(\d+(?:\.\d+)?)"
_SCORES = re.compile(rf"\W*{_NUMBER}[\s,;]+{_NUMBER}\W*")
_TEMPORARY = (408, 409, 429, 500, 502, 503, 504)


class Judgement(NamedTuple):
    """Scores of the first and of the second answer; None where the judge gave none that can be read."""

    first: Optional[float]
    second: Optional[float]


class AnswerPair(NamedTuple):
    """A question and the two answers to compare, in the order in which a judge sees them."""

    question: str
    first: str
    second: str


class Judge(Protocol):
    """Something that scores two answers to each question.

    Attributes:
        symmetric: Whether the order of the answers can't matter.
        batch_size: How many comparisons to ask for at once; what it has said is kept after each time.
    """

    symmetric: bool
    batch_size: int

    def compare(self, pairs: Sequence[AnswerPair]) -> list[Judgement]:
        """Scores of both answers, for each comparison."""


class RewardJudge:
    """A reward model as judge: the higher reward wins, whatever the order. It scores an answer once, however many others it is
    compared with.

    Args:
        rewards: The reward model; for a fair comparison not the one that the answers were trained on.
        path: A .jsonl file to keep scores in, of this reward model alone; default: they are kept as long as the judge is.
    """

    symmetric = True
    batch_size = 64  # its texts are sorted by length, so that more of them are padded less

    def __init__(self, rewards: RewardModel, path: Optional[Path] = None) -> None:
        self.rewards, self._file = rewards, None if path is None else RowFile(path, SCORE)
        self._scores = {} if self._file is None else {name: row["score"] for name, row in self._file.rows.items()}

    def compare(self, pairs: Sequence[AnswerPair]) -> list[Judgement]:
        """Rewards of both answers."""
        names = {(each.question, text): _name(each.question, text) for each in pairs for text in each[1:]}
        missing = [texts for texts, name in names.items() if name not in self._scores]
        if missing:
            made = self.rewards.score([question for question, _ in missing], [text for _, text in missing])
            new = {names[texts]: score for texts, score in zip(missing, made)}
            self._scores.update(new)
            if self._file is not None:
                self._file.append([{"id": name, "score": score} for name, score in new.items()])
        return [Judgement(*(self._scores[names[each.question, text]] for text in each[1:])) for each in pairs]


class ChatJudge:
    """A chat model behind an OpenAI-compatible endpoint (OpenAI, vLLM, llama.cpp, ...).

    Args:
        model: The model's name there.
        base_url: Where the endpoint is, up to `/v1`.
        api_key_variable: Environment variable that holds the key; unset, no key is sent.
        temperature: Of the judge's sampling; the paper's.
        max_tokens: Most tokens of a judgement.
        attempts: Tries of a request that fails for the moment, or whose answer has no scores.
        timeout: Seconds to wait for an answer.
        pause: Seconds before the second try; doubles at each further one.

    Raises:
        ValueError: If `attempts` isn't positive or `base_url` is no http address.
    """

    symmetric = False
    batch_size = 1

    def __init__(
        self,
        model: str,
        base_url: str = "https://api.openai.com/v1",
        *,
        api_key_variable: str = "OPENAI_API_KEY",
        temperature: float = 0.2,
        max_tokens: int = 512,
        attempts: int = 5,
        timeout: float = 120.0,
        pause: float = 1.0,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts={attempts} must be at least 1.")
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={base_url!r} must begin with http:// or https://.")
        self.model, self.url = model, base_url.rstrip("/") + "/chat/completions"
        self.api_key_variable, self.temperature, self.max_tokens = api_key_variable, temperature, max_tokens
        self.attempts, self.timeout, self.pause = attempts, timeout, pause

    def compare(self, pairs: Sequence[AnswerPair]) -> list[Judgement]:
        """The judge's scores.

        Raises:
            ValueError: If the endpoint refuses the request, or keeps failing.
        """
        return [self._scores(each) for each in pairs]

    def _scores(self, pair: AnswerPair) -> Judgement:
        content = QUESTION.format(**pair._asdict())
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": content}]
        failure = ""
        for attempt in range(self.attempts):
            if attempt and failure:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                failure, scores = "", parse_scores(self._ask(messages))
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                failure, scores = self._failure(error), None
            if scores is not None:
                return scores
        if failure:
            raise ValueError(f"base_url: {self.url} failed {self.attempts} times; at last: {failure}")
        return Judgement(None, None)

    def _ask(self, messages: Sequence[dict[str, str]]) -> str:
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.api_key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode("utf-8"), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            text = response.read().decode("utf-8", errors="replace")
        return _content(text, self.url)

    def _failure(self, error: Exception) -> str:
        """What to say of an error that may pass.

        Raises:
            ValueError: If it won't.
        """
        if isinstance(error, urllib.error.HTTPError):
            said = error.read().decode("utf-8", errors="replace")[:300]
            if error.code not in _TEMPORARY:
                raise ValueError(
                    f"{self.url} refused model={self.model!r}: {error.code} {said}. The key is read from the environment "
                    f"variable {self.api_key_variable}."
                ) from error
            return f"{error.code} {said}"
        return str(error)


def _name(question: str, answer: str) -> str:
    return hashlib.sha256(f"{question}\0{answer}".encode()).hexdigest()[:24]


def parse_scores(text: str) -> Optional[Judgement]:
    """The two scores that are the first line of a judgement; None if that is anything else, or one is outside 1 to 10."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    match = _SCORES.fullmatch(line)
    numbers = [float(number) for number in match.groups()] if match else []
    return Judgement(*numbers) if numbers and all(1 <= number <= 10 for number in numbers) else None


def _content(text: str, url: str) -> str:
    try:
        answer: Any = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{url} gave no chat completion: {text[:300]!r}") from error
    return str(answer or "")
