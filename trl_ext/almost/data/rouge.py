# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Is a text too close to one of many others? ROUGE-L against an index that leaves out whoever can't reach a threshold."""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from math import ceil

import numpy as np


# Letters with the marks that combine with them, and digits. Scripts without spaces have a word for each character.
_MARKS = "".join(map(chr, (code for code in range(0x300, 0x1F000) if unicodedata.category(chr(code)).startswith("M"))))
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_NO_SPACES}][{_MARKS}]*|(?:(?![{_NO_SPACES}])[^\\W_][{_MARKS}]*)+")
# Of sums and products of small integers in floating point.
_SLACK = 1e-9


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers: of ASCII texts as `rouge_score` has them, which drops all other letters."""
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def rouge_l(words: Sequence[str], others: Sequence[str]) -> float:
    """ROUGE-L's F between two texts (Lin 2004): twice their longest common subsequence over both lengths."""
    total = len(words) + len(others)
    return 2 * _common_subsequence(_places(words), len(words), others) / total if words and others else 0.0


class RougeIndex:
    """Texts, and whether a new one has ROUGE-L of at least `threshold` with any of them.

    Exact. F >= t needs a common subsequence of t (n + m) / 2 words, so that many shared words, and more than t / (2 - t) of
    either text: such a text has one of the query's rarest words, all but the needed number less one.

    Args:
        threshold: In (0, 1].
        texts: To begin with.
    """

    def __init__(self, threshold: float = 0.5, texts: Iterable[str] = ()) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold} must be above 0 and at most 1.")
        self.threshold = threshold
        self._texts: list[list[str]] = []
        self._lengths = array("i")
        # the k-th occurrence of a word in a text is a key of its own, so that counting keys counts shared words
        self._postings: dict[tuple[str, int], array] = {}
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Put a text into the index."""
        words, number = words_of(text), len(self._texts)
        self._texts.append(words)
        self._lengths.append(len(words))
        for key in _keys(words):
            self._postings.setdefault(key, array("i")).append(number)

    def has_similar(self, text: str) -> bool:
        """Whether any text reaches the threshold."""
        words = words_of(text)
        if not words or not self._texts:
            return False
        places = _places(words)
        for number in self._candidates(words):
            other = self._texts[number]
            needed = self.threshold * (len(words) + len(other)) / 2 - _SLACK
            if _common_subsequence(places, len(words), other) >= needed:
                return True
        return False

    def _candidates(self, words: Sequence[str]) -> list[int]:
        """Texts that share enough words, those that share most first."""
        count, share = len(words), self.threshold / (2 - self.threshold)
        fewest = max(1, ceil(share * count - _SLACK))
        lists = sorted((self._postings.get(key, array("i")) for key in _keys(words)), key=len)
        rare = [np.frombuffer(texts, dtype=np.int32) for texts in lists[: count - fewest + 1] if texts]
        if not rare:
            return []
        numbers, shared = np.unique(np.concatenate(rare), return_counts=True)
        lengths = np.array(self._lengths, dtype=np.int32)[numbers]
        needed = self.threshold * (count + lengths) / 2 - _SLACK
        # the common words that were left out may all be there
        possible = np.minimum(np.minimum(shared + fewest - 1, lengths), count) >= needed
        numbers, shared, needed = numbers[possible], shared[possible], needed[possible]
        for texts in lists[count - fewest + 1 :]:
            held = np.frombuffer(texts, dtype=np.int32)
            if len(numbers) and len(held):
                nearest = np.searchsorted(held, numbers).clip(max=len(held) - 1)
                shared = shared + (held[nearest] == numbers)
        enough = shared >= needed
        numbers, shared = numbers[enough], shared[enough]
        return numbers[np.argsort(-shared, kind="stable")].tolist()


def _keys(words: Sequence[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    keys = []
    for word in words:
        keys.append((word, seen[word]))
        seen[word] += 1
    return keys


def _places(words: Sequence[str]) -> dict[str, int]:
    """Word -> bits at the places where it stands."""
    places: dict[str, int] = {}
    for place, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << place
    return places


def _common_subsequence(places: dict[str, int], count: int, others: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time in the bits of an integer (Hyyrö 2004)."""
    full = (1 << count) - 1
    row = full
    for word in others:
        matches = places.get(word, 0) & row
        if matches:
            row = (row + matches | row - matches) & full
    return count - row.bit_count()
