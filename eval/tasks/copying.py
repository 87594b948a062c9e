"""Copying and look-up: strings, n-grams, selected tokens, induction, the past of a signal.

Sources: Jelassi et al. 2024 (string copying, n-gram look-up), Gu and Dao 2023 (selective copying,
induction heads), Arjovsky et al. 2016 (copy memory).
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from eval.tasks.base import (
    IGNORED,
    Samples,
    Task,
    empty,
    put,
    put_token,
    random_places,
    require,
    uniform,
)

# Tokens of the string tasks besides PAD.
BEGIN, SEPARATOR, END, FIRST_LETTER = 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class _StringTask(Task):
    """alphabet: different letters, drawn uniformly."""

    alphabet: int = 26

    def __post_init__(self) -> None:
        require(self.alphabet >= 2, f"alphabet must be 2 or more, got {self.alphabet}")

    @property
    def vocab_size(self) -> int:
        return FIRST_LETTER + self.alphabet

    @property
    def choices(self) -> int:
        return self.alphabet

    def _letters(self, rows: int, width: int, generator: Generator) -> Tensor:
        return uniform(FIRST_LETTER, self.vocab_size, (rows, width), generator)


@dataclass(frozen=True, kw_only=True)
class StringCopy(_StringTask):
    """`begin s separator s end`: repeat a random string of `length` letters, and stop."""

    def tokens(self, length: int) -> int:
        return 2 * length + 3

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        longest = int(lengths.max())
        letters = self._letters(len(lengths), longest, generator)
        ids, labels = empty(lengths, self.tokens(longest))
        start = torch.ones_like(lengths)
        ids[:, 0] = BEGIN
        put(ids, start, letters, lengths)
        put_token(ids, lengths + 1, SEPARATOR)
        for target in (ids, labels):
            put(target, lengths + 2, letters, lengths)
            put_token(target, 2 * lengths + 2, END)
        return Samples(ids, labels, 2 * lengths + 3)


@dataclass(frozen=True, kw_only=True)
class NgramLookup(_StringTask):
    """Which letters follow a given n-gram in a string of `length` letters?

    key "prefix": `begin key separator s separator answer end`, asked before the string is read,
    so that one number of letters has to be kept; key "suffix": `begin s separator key answer end`,
    asked afterwards, so that all of the string has to be kept. The key occurs once in the string;
    lengths are bounded by half the number of different n-grams, so that there always is one.

    Args:
        key: "prefix" or "suffix".
        n: letters of the key.
        answer: letters of the answer.
    """

    key: str = "prefix"
    n: int = 3
    answer: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.key in ("prefix", "suffix"), f'key must be "prefix" or "suffix", got {self.key!r}'
        )
        require(self.n >= 1, f"n must be 1 or more, got {self.n}")
        require(self.answer >= 1, f"answer must be 1 or more, got {self.answer}")

    @property
    def minimum_length(self) -> int:
        return self.n + self.answer

    def check_length(self, length: int) -> None:
        super().check_length(length)
        require(
            2 * length <= self.alphabet**self.n,
            f"NgramLookup: in {length} letters too many of the {self.alphabet**self.n} n-grams "
            "would repeat; take a larger alphabet or n",
        )

    def tokens(self, length: int) -> int:
        return length + self.n + self.answer + (4 if self.key == "prefix" else 3)

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        longest = int(lengths.max())
        letters = self._letters(len(lengths), longest, generator)
        at = self._places(letters, lengths, generator)
        offsets = torch.arange(self.n + self.answer, device=letters.device)
        found = letters.gather(1, at[:, None] + offsets)
        key, answer = found[:, : self.n], found[:, self.n :]

        ids, labels = empty(lengths, self.tokens(longest))
        ids[:, 0] = BEGIN
        if self.key == "prefix":
            ids[:, 1 : 1 + self.n] = key
            ids[:, 1 + self.n] = SEPARATOR
            put(ids, torch.full_like(lengths, self.n + 2), letters, lengths)
            asked = lengths + self.n + 2
            put_token(ids, asked, SEPARATOR)
        else:
            put(ids, torch.ones_like(lengths), letters, lengths)
            put_token(ids, lengths + 1, SEPARATOR)
            put(ids, lengths + 2, key)
            asked = lengths + self.n + 1
        for target in (ids, labels):
            put(target, asked + 1, answer)
            put_token(target, asked + 1 + self.answer, END)
        return Samples(ids, labels, asked + self.answer + 2)

    def _places(self, letters: Tensor, lengths: Tensor, generator: Generator) -> Tensor:
        """Where the keys begin (N,): uniform over the n-grams that occur once."""
        windows = letters.unfold(1, self.n, 1)
        powers = self.alphabet ** torch.arange(self.n, device=letters.device)
        codes = ((windows - FIRST_LETTER) * powers).sum(-1)
        index = torch.arange(codes.shape[1], device=letters.device)
        # An n-gram of the whole string, not only of the part that has an answer, can repeat a key.
        inside = index <= lengths[:, None] - self.n
        codes = torch.where(inside, codes, -1 - index)
        ordered, order = codes.sort(1)
        equal = ordered[:, 1:] == ordered[:, :-1]
        repeated = torch.zeros_like(inside)
        repeated[:, 1:] |= equal
        repeated[:, :-1] |= equal
        once = ~torch.zeros_like(repeated).scatter(1, order, repeated)
        answered = index <= lengths[:, None] - self.n - self.answer
        draws = torch.rand(codes.shape, generator=generator, device=letters.device)
        return (draws + 2.0 * (once & answered) + 4.0 * answered).argmax(1)


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Task):
    """Among `length` tokens of noise stand a few data tokens; repeat these in their order.

    The answers are asked by marks, which say nothing: `noise and data | mark ... mark`, the j-th
    mark followed by the j-th data token's label. Where data tokens stand differs from sample to
    sample, so a filter that is fixed in time cannot pick them.

    Args:
        data_tokens: data tokens in a sample.
        alphabet: different data tokens.
    """

    data_tokens: int = 16
    alphabet: int = 16

    def __post_init__(self) -> None:
        require(self.data_tokens >= 1, f"data_tokens must be 1 or more, got {self.data_tokens}")
        require(self.alphabet >= 2, f"alphabet must be 2 or more, got {self.alphabet}")

    @property
    def vocab_size(self) -> int:
        return 3 + self.alphabet  # pad, noise, mark

    @property
    def choices(self) -> int:
        return self.alphabet

    @property
    def minimum_length(self) -> int:
        return self.data_tokens

    def tokens(self, length: int) -> int:
        return length + self.data_tokens + 1

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        noise, mark, first = 1, 2, 3
        rows, count = len(lengths), self.data_tokens
        ids, labels = empty(lengths, self.tokens(int(lengths.max())))
        index = torch.arange(ids.shape[1], device=ids.device)
        ids[index < lengths[:, None]] = noise
        places = random_places(lengths, torch.full_like(lengths, count), count, generator)
        data = uniform(first, self.vocab_size, (rows, count), generator)
        ids.scatter_(1, places, data)
        put(ids, lengths, torch.full_like(data, mark))
        put(labels, lengths + 1, data)
        put_token(ids, lengths + count, mark)  # holds the last label's place
        return Samples(ids, labels, lengths + count + 1)


@dataclass(frozen=True, kw_only=True)
class InductionHeads(Task):
    """Which token followed the special one, `length` tokens ago at most?

    `length` random tokens; one of them is the special token, which stands once more at the end.

    Args:
        alphabet: different tokens besides the special one.
    """

    alphabet: int = 16

    def __post_init__(self) -> None:
        require(self.alphabet >= 2, f"alphabet must be 2 or more, got {self.alphabet}")

    @property
    def vocab_size(self) -> int:
        return 2 + self.alphabet

    @property
    def choices(self) -> int:
        return self.alphabet

    @property
    def minimum_length(self) -> int:
        return 3

    def tokens(self, length: int) -> int:
        return length + 1

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        special = 1
        rows = len(lengths)
        ids, labels = empty(lengths, self.tokens(int(lengths.max())))
        index = torch.arange(ids.shape[1], device=ids.device)
        tokens = uniform(2, self.vocab_size, tuple(ids.shape), generator)
        ids = torch.where(index <= lengths[:, None], tokens, ids)
        share = torch.rand(rows, generator=generator, device=ids.device, dtype=torch.float64)
        # Up to length - 3: the token behind it is not the special one at the end.
        place = (share * (lengths - 2)).long()
        put_token(ids, place, special)
        put_token(ids, lengths - 1, special)
        put(labels, lengths, ids.gather(1, place[:, None] + 1))
        return Samples(ids, labels, lengths + 1)


@dataclass(frozen=True, kw_only=True)
class CopyMemory(Task):
    """`symbols`, `length` blanks, a cue, and the symbols are to be repeated (Arjovsky et al.).

    Labels stand at the repetition alone; the blanks before it, which Arjovsky et al. score too,
    carry no information.

    Args:
        symbols: tokens to be remembered.
        alphabet: different symbols.
    """

    symbols: int = 10
    alphabet: int = 8

    def __post_init__(self) -> None:
        require(self.symbols >= 1, f"symbols must be 1 or more, got {self.symbols}")
        require(self.alphabet >= 2, f"alphabet must be 2 or more, got {self.alphabet}")

    @property
    def vocab_size(self) -> int:
        return 3 + self.alphabet  # pad, blank, cue

    @property
    def choices(self) -> int:
        return self.alphabet

    def tokens(self, length: int) -> int:
        return length + 2 * self.symbols + 1

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        blank, cue = 1, 2
        count = self.symbols
        ids, labels = empty(lengths, self.tokens(int(lengths.max())))
        symbols = uniform(3, self.vocab_size, (len(lengths), count), generator)
        index = torch.arange(ids.shape[1], device=ids.device)
        ids[index < lengths[:, None] + 2 * count + 1] = blank
        ids[:, :count] = symbols
        put_token(ids, lengths + count, cue)
        put(labels, lengths + count + 1, symbols)
        return Samples(ids, labels, lengths + 2 * count + 1)


@dataclass(frozen=True, kw_only=True)
class Delay(Task):
    """At every token, which was the one `delay` tokens before it? `length` random tokens.

    The discrete form of delay reconstruction; eval/tasks/signals.py has the continuous one.

    Args:
        delay: tokens back; 0 asks for the token just read.
        alphabet: different tokens.
    """

    delay: int = 16
    alphabet: int = 8

    def __post_init__(self) -> None:
        require(self.delay >= 0, f"delay must be 0 or more, got {self.delay}")
        require(self.alphabet >= 2, f"alphabet must be 2 or more, got {self.alphabet}")

    @property
    def vocab_size(self) -> int:
        return 1 + self.alphabet

    @property
    def choices(self) -> int:
        return self.alphabet

    @property
    def minimum_length(self) -> int:
        return self.delay + 1

    def tokens(self, length: int) -> int:
        return length + 1

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        ids, labels = empty(lengths, self.tokens(int(lengths.max())))
        index = torch.arange(ids.shape[1], device=ids.device)
        tokens = uniform(1, self.vocab_size, tuple(ids.shape), generator)
        # One token more than is asked about: the last label needs a place.
        ids = torch.where(index <= lengths[:, None], tokens, ids)
        labels[:, self.delay + 1 :] = ids[:, : ids.shape[1] - self.delay - 1]
        labels[index > lengths[:, None]] = IGNORED
        return Samples(ids, labels, lengths + 1)
