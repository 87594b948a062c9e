"""Needles in a haystack: of repeated noise, of running text, or of other needles."""

import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from random import Random

import numpy as np

from eval.ruler import templates
from eval.ruler.fit import Plan
from eval.ruler.sources import Haystack
from eval.ruler.specs import Kind, NeedleSpec
from eval.ruler.tokens import TokenCounter

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


def draw(rng: Random, kind: Kind, word: Callable[[Random], str]) -> str:
    """Return a random key or value."""
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return word(rng)


class Hidden:
    """The needles of one sample: keys and values that differ, and what is asked about them."""

    def __init__(self, rng: Random, spec: NeedleSpec, word: Callable[[Random], str]) -> None:
        self._rng, self._spec, self._word = rng, spec, word
        self._taken: set[str] = set()
        keys = [self._new(spec.key) for _ in range(spec.keys)]
        values = {key: [self._new(spec.value) for _ in range(spec.values)] for key in keys}
        asked = rng.sample(keys, spec.queries)
        self.outputs = [value for key in asked for value in values[key]]
        self.wording = templates.needles(spec.value, asked, len(self.outputs))
        self.marks = [templates.needle(spec.value, k, value) for k in asked for value in values[k]]
        self.lines = [
            templates.needle(spec.value, key, value) for key in keys for value in values[key]
        ]
        rng.shuffle(self.lines)

    def another(self) -> str:
        """Return a needle that nobody asks for."""
        kinds = self._spec.key, self._spec.value
        return templates.needle(self._spec.value, *(self._new(kind) for kind in kinds))

    def _new(self, kind: Kind) -> str:
        while (text := draw(self._rng, kind, self._word)) in self._taken:
            pass
        self._taken.add(text)
        return text


def insert(lines: Sequence[str], items: Iterable[tuple[int, str]]) -> list[str]:
    """Return the lines with each (gap, line) inserted before line number `gap`, in that order."""
    result, begin = [], 0
    for gap, item in sorted(items, key=lambda pair: pair[0]):
        result += lines[begin:gap]
        result.append(item)
        begin = gap
    return [*result, *lines[begin:]]


class LinesPlan(Plan):
    """Lines in which other lines stand at given depths."""

    items: Sequence[str]
    depths: Sequence[float]

    def lines(self, size: int) -> list[str]:
        """Return the lines of the haystack alone."""
        raise NotImplementedError

    def context(self, size: int) -> str:
        lines = self.lines(size)
        gaps = [int(depth * (len(lines) + 1)) for depth in self.depths]
        return "\n".join(insert(lines, zip(gaps, self.items, strict=True)))


class NoisePlan(LinesPlan):
    """Lines of five noise sentences, the last of which may be shorter; size counts sentences."""

    def __init__(self, items: Sequence[str], depths: Sequence[float], counter: TokenCounter):
        self.items, self.depths = items, depths
        pieces = [NOISE[0], *(f" {sentence}" for sentence in NOISE[1:])]
        pieces[-1] += "\n"
        costs = counter.costs(pieces)
        self._partial = [sum(costs[:i]) for i in range(len(costs) + 1)]
        self._items = sum(counter.count([item + "\n" for item in items]))

    def estimate(self, size: int) -> int:
        lines, rest = divmod(size, len(NOISE))
        return self._items + lines * self._partial[-1] + self._partial[rest]

    def lines(self, size: int) -> list[str]:
        lines, rest = divmod(size, len(NOISE))
        whole = [" ".join(NOISE)] * lines
        return [*whole, " ".join(NOISE[:rest])] if rest else whole


class NoiseNeedles(NoisePlan):
    """Needles in noise."""

    def __init__(self, rng: Random, hidden: Hidden, counter: TokenCounter) -> None:
        depths = [rng.random() for _ in hidden.lines]
        super().__init__(hidden.lines, depths, counter)
        self.wording, self.outputs, self.marks = hidden.wording, hidden.outputs, hidden.marks


class NeedleNeedles(LinesPlan):
    """Needles among needles; size counts the others."""

    def __init__(self, rng: Random, hidden: Hidden, counter: TokenCounter) -> None:
        self.items, self.depths = hidden.lines, [rng.random() for _ in hidden.lines]
        self.wording, self.outputs, self.marks = hidden.wording, hidden.outputs, hidden.marks
        self._hidden, self._counter = hidden, counter
        self._others: list[str] = []
        self._tokens = [sum(counter.count([line + "\n" for line in hidden.lines]))]

    def _grow(self, size: int) -> None:
        missing = size - len(self._others)
        if missing > 0:
            new = [self._hidden.another() for _ in range(max(missing, 16))]
            self._others += new
            for tokens in self._counter.count([line + "\n" for line in new]):
                self._tokens.append(self._tokens[-1] + tokens)

    def estimate(self, size: int) -> int:
        self._grow(size)
        return self._tokens[size]

    def lines(self, size: int) -> list[str]:
        self._grow(size)
        return self._others[:size]


class Text:
    """A haystack text with the tokens up to each of its words, repeated without end."""

    def __init__(self, haystack: Haystack, counter: TokenCounter) -> None:
        self.haystack = haystack
        self._tokens = counter.cumulative(haystack.words)

    def tokens(self, words: int) -> int:
        """Return about how many tokens the first `words` words have."""
        rounds, rest = divmod(words, len(self.haystack.words))
        return int(rounds * self._tokens[-1] + self._tokens[rest])

    def words_up_to(self, tokens: int) -> int:
        """Return the most words that have at most so many tokens."""
        rounds, rest = divmod(tokens, int(self._tokens[-1]))
        place = int(np.searchsorted(self._tokens, rest, side="right")) - 1
        return rounds * len(self.haystack.words) + place

    def slice(self, begin: int, end: int) -> list[str]:
        """Return the words with these numbers."""
        words = self.haystack.words
        begin, end = begin % len(words), end - begin // len(words) * len(words)
        if end <= len(words):
            return words[begin:end]
        return (words * -(-end // len(words)))[begin:end]

    def boundaries(self, begin: int, end: int) -> list[int]:
        """Return the ends of sentences from word `begin` to word `end`, these two included."""
        total, ends = len(self.haystack.words), self.haystack.ends
        found = [begin]
        for turn in range(begin // total, end // total + 1):
            inside = ends + turn * total
            found += inside[(inside > begin) & (inside < end)].tolist()
        return found if end == begin else [*found, end]

    def start(self, rng: Random, tokens: int) -> int:
        """Draw the beginning of a sentence after which `tokens` tokens follow, if there is one."""
        last = self.words_up_to(max(int(self._tokens[-1]) - tokens, 0))
        starts = [0, *self.haystack.ends[:-1].tolist()]
        return starts[rng.randrange(max(bisect_left(starts, last + 1), 1))]


class EssayNeedles(Plan):
    """Needles between the sentences of running text; size counts words.

    The text begins with a sentence drawn at random, so that samples do not share one haystack.
    """

    def __init__(
        self, rng: Random, hidden: Hidden, counter: TokenCounter, text: Text, room: int
    ) -> None:
        self._text = text
        self._begin = text.start(rng, room)
        self._lines, self._depths = hidden.lines, [rng.random() for _ in hidden.lines]
        self.wording, self.outputs, self.marks = hidden.wording, hidden.outputs, hidden.marks
        self._fixed = sum(counter.count([f" {line}" for line in hidden.lines]))
        self._fixed -= text.tokens(self._begin)

    def estimate(self, size: int) -> int:
        return self._fixed + self._text.tokens(self._begin + size)

    def context(self, size: int) -> str:
        text, begin, end = self._text, self._begin, self._begin + size
        words = text.slice(begin, end)
        boundaries = text.boundaries(begin, end)
        tokens = [text.tokens(place) for place in boundaries]
        cuts = []
        for depth, line in zip(self._depths, self._lines, strict=True):
            wanted = tokens[0] + depth * (tokens[-1] - tokens[0])
            after = bisect_left(tokens, wanted)
            before = max(after - 1, 0)
            near = before if wanted - tokens[before] < tokens[after] - wanted else after
            cuts.append((boundaries[near] - begin, line))
        return " ".join(insert(words, cuts))
