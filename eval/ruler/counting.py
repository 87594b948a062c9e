"""Common words in a numbered list, and frequent words in a coded text."""

import string
from collections.abc import Sequence
from math import pi
from random import Random
from typing import NamedTuple

import numpy as np

from eval.ruler import templates
from eval.ruler.fit import Plan
from eval.ruler.sources import draw_words
from eval.ruler.tokens import TokenCounter

COMMON = 10
ZETA_2 = pi**2 / 6


class Repeats(NamedTuple):
    """How often common and other words stand in the example, of so many words, and the question."""

    example_words: int
    example: tuple[int, int]
    question: tuple[int, int]


LONG = Repeats(40, (10, 3), (30, 3))
SHORT = Repeats(20, (3, 1), (6, 1))
LONG_FROM = 4096
SPARE = 0.9


def listing(words: Sequence[str], repeats: tuple[int, int], rng: Random) -> str:
    """Return a shuffled numbered list: the first ten words more often than the others."""
    common, other = repeats
    entries = list(words[:COMMON]) * common + list(words[COMMON:]) * other
    rng.shuffle(entries)
    return templates.numbered(entries)


class CommonWords(Plan):
    """Ten words stand more often than all others; size counts distinct words.

    Args:
        rng: of the sample.
        counter: of the tokenizer.
        words: to draw from.
        room: tokens of the prompt; a list longer than that is never asked for.
        repeats: `LONG` or `SHORT`.
    """

    minimum = COMMON + 1

    def __init__(
        self,
        rng: Random,
        counter: TokenCounter,
        words: Sequence[str],
        room: int,
        repeats: Repeats,
    ) -> None:
        self._counter, self._repeats, self._room = counter, repeats, room
        self._shuffle = str(rng.getrandbits(64))
        # Every entry of the list has at least a number, its full stop and a word.
        most = self.minimum + room // (3 * repeats.question[1])
        drawn = draw_words(rng, words, most + repeats.example_words)
        example, self._words = drawn[: repeats.example_words], drawn[repeats.example_words :]
        self.wording = templates.COMMON_WORDS
        self.outputs = self._words[:COMMON]
        solved = self.wording.prompt(listing(example, repeats.example, rng))
        self.lead = f"{solved} {templates.numbered(example[:COMMON])}\n"
        self._tokens = [0]

    def estimate(self, size: int) -> int:
        common, other = self._repeats.question
        if size > len(self._words):
            return size * self._room  # more than ever fits
        while len(self._tokens) <= size:
            # The next words, doubling: each is counted once.
            done = len(self._tokens) - 1
            new = self._words[done : max(2 * done, 64)]
            for place, tokens in enumerate(self._counter.costs(f" {word}" for word in new), done):
                times = common if place < COMMON else other
                self._tokens.append(self._tokens[-1] + times * tokens)
        entries = COMMON * common + (size - COMMON) * other
        return self._tokens[size] + self._counter.numbers(entries)

    def context(self, size: int) -> str:
        return listing(self._words[:size], self._repeats.question, Random(self._shuffle))


def choose_repeats(
    rng: Random, counter: TokenCounter, words: Sequence[str], length: int, room: int
) -> Repeats:
    """Choose how often words stand: `LONG` from 4096 tokens on, where it fits with some to spare.

    A byte tokenizer needs more tokens for the same words: lengths in which the long form cannot
    stand take the short one.
    """
    if length < LONG_FROM:
        return SHORT
    plan = CommonWords(rng, counter, words, room, LONG)
    (around,) = counter.count([plan.lead + plan.wording.prompt("")])
    return LONG if around + plan.estimate(plan.minimum) <= SPARE * room else SHORT


class FrequentWords(Plan):
    """Coded words whose counts fall with the square of their rank; size sets the counts.

    The word of the first rank is noise, "...", and the next three are the answer. Size is the
    number of words that an infinite vocabulary would make.
    """

    LETTERS = 6
    # From here on ranks 4 and 5 differ in count, so that the answer is unique.
    minimum = 74

    def __init__(self, rng: Random, counter: TokenCounter, vocabulary: int) -> None:
        coded: dict[str, None] = {}
        while len(coded) < max(vocabulary, 6):
            coded["".join(rng.choices(string.ascii_lowercase, k=self.LETTERS))] = None
        self._words = ["...", *list(coded)[1:]]
        self._counter = counter
        self._shuffle = str(rng.getrandbits(64))
        self.wording = templates.FREQUENT_WORDS
        self.outputs = self._words[1:4]

    def estimate(self, size: int) -> int:
        counts = zeta_counts(size, len(self._words))
        counts = counts[counts > 0]
        words = self._words[: len(counts)]
        tokens = self._counter.costs(f" {word}" for word in words)
        return int(counts @ np.array(tokens))

    def context(self, size: int) -> str:
        counts = zeta_counts(size, len(self._words)).tolist()
        text = [word for word, n in zip(self._words, counts, strict=True) for _ in range(n)]
        Random(self._shuffle).shuffle(text)
        return " ".join(text)


def zeta_counts(size: int, vocabulary: int) -> np.ndarray:
    """Return how often the words of each rank stand: floor(size * rank^-2 / zeta(2))."""
    ranks = np.arange(1, vocabulary + 1)
    return (size * (ranks**-2.0) / ZETA_2).astype(int)
