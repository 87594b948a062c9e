"""Associative recall: MQAR, needles in a haystack of tokens, and a directory.

Sources: Arora et al. 2023 (Zoology), Dao and Gu 2024 (the hard setting of MQAR), Jelassi et al.
2024 (the phone book).
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from eval.tasks.base import (
    IGNORED,
    Samples,
    Task,
    distinct,
    empty,
    put,
    put_token,
    random_places,
    require,
    uniform,
)


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Multi-query associative recall: `length` pairs key value, then every key once, in random
    order and places; at each the value is asked for.

    The number of tokens T is `tokens_per_pair` times the pairs, but at least `min_context` and, if
    that is not 0, at most `max_context`. Upstream's training mix of (T, pairs) = (64, 4), (128, 8),
    (256, 16), (256, 32), (256, 64) is tokens_per_pair=16, min_context=64, max_context=256 over the
    lengths 4,8,16,32,64; its tests are the defaults over 4,8,...,256. The hard setting has
    min_context = max_context = T.

    Args:
        vocabulary: keys are drawn from the lower half of it, values from the upper.
        tokens_per_pair, min_context, max_context: see above.
        power: keys come back at even distances i behind the pairs with weight i^(power - 1): the
            smaller, the sooner.
        random_fillers: tokens between the questions are random, of all the vocabulary (they may
            equal a key); False makes them padding, which is easier.
    """

    vocabulary: int = 8192
    tokens_per_pair: int = 4
    min_context: int = 64
    max_context: int = 0
    power: float = 0.01
    random_fillers: bool = True

    def __post_init__(self) -> None:
        require(self.vocabulary >= 4, f"vocabulary must be 4 or more, got {self.vocabulary}")
        require(
            self.tokens_per_pair >= 4 or self.min_context == self.max_context != 0,
            "tokens_per_pair must be 4 or more, a pair and its question take as many; got "
            f"{self.tokens_per_pair}",
        )
        require(self.power > 0, f"power must be above 0, got {self.power}")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def choices(self) -> int:
        return self.vocabulary - self.vocabulary // 2

    def context(self, pairs: int) -> int:
        """T for this many pairs."""
        size = max(self.min_context, self.tokens_per_pair * pairs)
        return min(size, self.max_context) if self.max_context else size

    def tokens(self, length: int) -> int:
        require(
            4 * length <= self.context(length),
            f"MQAR: {length} pairs and their questions need {4 * length} tokens, the context is "
            f"{self.context(length)}",
        )
        return self.context(length) + 1

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        device = lengths.device
        width = max(self.tokens(pairs) for pairs in set(lengths.tolist()))
        ids, labels = empty(lengths, width)
        # One width of all tensors for each number of pairs.
        for pairs in sorted(set(lengths.tolist())):
            of_these = (lengths == pairs).nonzero()[:, 0]
            some_ids, some_labels = self._equal(len(of_these), pairs, generator)
            columns = torch.arange(some_ids.shape[1], device=device)
            ids[of_these[:, None], columns] = some_ids
            labels[of_these[:, None], columns] = some_labels
        sizes = [self.tokens(pairs) for pairs in lengths.tolist()]
        return Samples(ids, labels, torch.tensor(sizes, device=device))

    def _equal(self, rows: int, pairs: int, generator: Generator) -> tuple[Tensor, Tensor]:
        size, half = self.context(pairs), self.vocabulary // 2
        device = generator.device
        keys = distinct(1, half, rows, pairs, generator)
        values = distinct(half, self.vocabulary, rows, pairs, generator)
        ids = torch.zeros(rows, size + 1, dtype=torch.int64, device=device)
        labels = torch.full_like(ids, IGNORED)
        if self.random_fillers:
            ids = uniform(0, self.vocabulary, (rows, size + 1), generator)
        ids[:, 0 : 2 * pairs : 2] = keys
        ids[:, 1 : 2 * pairs : 2] = values
        slots = torch.arange(1, (size - 2 * pairs) // 2 + 1, device=device, dtype=torch.float64)
        weights = slots.pow(self.power - 1).expand(rows, -1)
        places = 2 * pairs + 2 * torch.multinomial(weights, pairs, generator=generator)
        ids.scatter_(1, places, keys)
        labels.scatter_(1, places + 1, values)
        return ids, labels


@dataclass(frozen=True, kw_only=True)
class Needles(Task):
    """`keys` pairs key value among `length` tokens of filler; at the end one key is asked for.

    Accuracy against `keys` at one length is the state-capacity curve. Pairs lie at uniformly random
    places; fillers, keys and values are tokens of three different sets.

    Args:
        keys: pairs in a sample.
        fewest: if not 0, the number of pairs is drawn from `fewest` to `keys` for each sample.
        vocabulary: different keys, and as many different values.
        fillers: different filler tokens.
    """

    keys: int = 8
    fewest: int = 0
    vocabulary: int = 256
    fillers: int = 16

    def __post_init__(self) -> None:
        require(
            1 <= self.keys <= self.vocabulary,
            f"keys must lie between 1 and vocabulary ({self.vocabulary}), got {self.keys}",
        )
        require(
            0 <= self.fewest <= self.keys,
            f"fewest must lie between 0 and keys ({self.keys}), got {self.fewest}",
        )
        require(self.fillers >= 1, f"fillers must be 1 or more, got {self.fillers}")

    @property
    def vocab_size(self) -> int:
        return 2 + self.fillers + 2 * self.vocabulary  # pad, question mark

    @property
    def choices(self) -> int:
        return self.vocabulary

    @property
    def minimum_length(self) -> int:
        return 2 * self.keys

    def tokens(self, length: int) -> int:
        return length + 3

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        ask, rows = 1, len(lengths)
        first_key = 2 + self.fillers
        ids, labels = empty(lengths, self.tokens(int(lengths.max())))
        noise = uniform(2, first_key, tuple(ids.shape), generator)
        index = torch.arange(ids.shape[1], device=ids.device)
        ids = torch.where(index < lengths[:, None] + 3, noise, ids)
        keys = distinct(first_key, first_key + self.vocabulary, rows, self.keys, generator)
        values = uniform(first_key + self.vocabulary, self.vocab_size, (rows, self.keys), generator)
        count = torch.full_like(lengths, self.keys)
        if self.fewest:
            count = uniform(self.fewest, self.keys + 1, (rows,), generator)
        # A pair takes two tokens: places in a text shortened by one token a pair, spread again.
        places = random_places(lengths - count, count, self.keys, generator)
        order = torch.arange(self.keys, device=ids.device)
        is_there = order < count[:, None]
        # Pairs beyond a row's number go to columns of their own, which are cut off again.
        width = ids.shape[1]
        places = torch.where(is_there, places + order, width)
        ids = torch.nn.functional.pad(ids, (0, 2))
        ids.scatter_(1, places, keys)
        ids.scatter_(1, places + 1, values)
        ids = ids[:, :width].contiguous()
        share = torch.rand(rows, generator=generator, device=ids.device, dtype=torch.float64)
        asked = (share * count).long()[:, None]
        put_token(ids, lengths, ask)
        put(ids, lengths + 1, keys.gather(1, asked))
        put(labels, lengths + 2, values.gather(1, asked))
        return Samples(ids, labels, lengths + 3)


@dataclass(frozen=True, kw_only=True)
class Directory(Task):
    """A phone book of tokens: `length` entries name number, a separator, and some of the names once
    more, in random order, each followed by its number.

    Names consist of letters and numbers of digits, tokens of their own; no two entries have one
    name.

    Args:
        letters: size of their alphabet.
        name: letters of a name.
        number: digits of a number.
        questions: names that are asked for.
    """

    letters: int = 26
    name: int = 3
    number: int = 4
    questions: int = 1

    def __post_init__(self) -> None:
        for option in ("letters", "name", "number", "questions"):
            value = getattr(self, option)
            require(value >= 1, f"{option} must be 1 or more, got {value}")

    @property
    def vocab_size(self) -> int:
        return _DIGIT + 10 + self.letters

    @property
    def choices(self) -> int:
        return 10

    @property
    def minimum_length(self) -> int:
        return self.questions

    def check_length(self, length: int) -> None:
        super().check_length(length)
        require(
            length <= self.letters**self.name,
            f"Directory: {length} entries, but only {self.letters**self.name} names of {self.name} "
            f"of {self.letters} letters",
        )

    def tokens(self, length: int) -> int:
        return (length + self.questions) * (self.name + self.number) + 1

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        rows, most = len(lengths), int(lengths.max())
        codes = distinct(0, self.letters**self.name, rows, most, generator)
        powers = self.letters ** torch.arange(self.name, device=lengths.device)
        names = _DIGIT + 10 + codes[..., None] // powers % self.letters
        numbers = uniform(_DIGIT, _DIGIT + 10, (rows, most, self.number), generator)
        entries = torch.cat((names, numbers), dim=2)
        asked = random_places(
            lengths, torch.full_like(lengths, self.questions), self.questions, generator,
            ordered=False,
        )  # fmt: skip
        answers = entries.gather(1, asked[..., None].expand(-1, -1, entries.shape[2]))
        answered = answers.clone()
        answered[..., : self.name] = IGNORED

        ids, labels = empty(lengths, self.tokens(most))
        end = lengths * entries.shape[2]
        put(ids, torch.zeros_like(end), entries.flatten(1), end)
        put_token(ids, end, _ASKED)
        put(ids, end + 1, answers.flatten(1))
        put(labels, end + 1, answered.flatten(1))
        return Samples(ids, labels, end + 1 + answers.shape[1] * answers.shape[2])


_ASKED, _DIGIT = 1, 2  # the separator of a directory, its first digit
