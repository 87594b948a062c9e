"""State tracking: parity, sums modulo m, word problems of finite groups, modular arithmetic.

Sources: Deletang et al. 2023 (parity, modular arithmetic), Merrill et al. 2024 and Grazzi et al.
2025 (word problems).
"""

import itertools
import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Generator, Tensor

from eval.tasks.base import IGNORED, Samples, Task, empty, put, put_token, require, uniform

END = 1  # stands where the last label needs a place
FIRST_ELEMENT = 2


@cache
def group(name: str) -> tuple[tuple[int, ...], ...]:
    """The elements of a group, the identity first: permutations for "S3", "A4", "A5", "S5", ...
    (Sn, An with n up to 6), rotations of m points for "Zm".

    Raises:
        ValueError: no such group.
    """
    match = re.fullmatch(r"([SAZ])(\d+)", name)
    if match is None:
        raise ValueError(f'group must be "Zm", "Sn" or "An", got {name!r}')
    kind, size = match.group(1), int(match.group(2))
    if kind == "Z":
        require(2 <= size <= 256, f"Zm needs 2 <= m <= 256, got {name}")
        return tuple(tuple((i + k) % size for i in range(size)) for k in range(size))
    require(2 <= size <= 6, f"Sn and An need 2 <= n <= 6, got {name}")
    elements = itertools.permutations(range(size))
    return tuple(p for p in elements if kind == "S" or _is_even(p))


def _is_even(permutation: tuple[int, ...]) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(a > b for a, b in pairs) % 2 == 0


@cache
def product_table(name: str) -> Tensor:
    """(n, n): table[a, b] is the number of the element "first a, then b"."""
    elements = group(name)
    number = {element: i for i, element in enumerate(elements)}
    rows = [[number[tuple(b[i] for i in a)] for b in elements] for a in elements]
    return torch.tensor(rows)


def input_elements(name: str, inputs: str) -> list[int]:
    """Numbers of the elements that a word is made of.

    inputs: "all"; "swaps", the permutations that exchange two points; or "generators", two
    elements that generate the group (of S3, A4, ...: found by trying in order).

    Raises:
        ValueError: none of these, or the group has none such.
    """
    elements = group(name)
    if inputs == "all":
        return list(range(len(elements)))
    if inputs == "swaps":
        moved = [sum(i != j for i, j in enumerate(p)) for p in elements]
        chosen = [i for i, count in enumerate(moved) if count == 2]
        require(bool(chosen), f"inputs is 'swaps', but {name} holds none")
        return chosen
    require(inputs == "generators", f"inputs must be all, swaps or generators, got {inputs!r}")
    table = product_table(name)
    for a, b in itertools.combinations(range(1, len(elements)), 2):
        if len(_generated(table, (a, b))) == len(elements):
            return [a, b]
    raise ValueError(f"inputs is 'generators', but no two elements generate {name}")


def _generated(table: Tensor, seeds: tuple[int, ...]) -> set[int]:
    rows = table.tolist()
    found, frontier = {0}, [0]
    while frontier:
        element = frontier.pop()
        for seed in seeds:
            after = rows[element][seed]
            if after not in found:
                found.add(after)
                frontier.append(after)
    return found


@dataclass(frozen=True, kw_only=True)
class WordProblem(Task):
    """`length` elements of a group; at each, what is the product of all so far?

    Tokens are elements, labels too. Products of a solvable group (Z, S3, A4) are within reach of
    constant-depth circuits, those of A5 and S5 are not (Barrington 1989).

    Args:
        name: the group, see `group`.
        inputs: which elements words are made of, see `input_elements`.
        running: ask at every element; False asks at the last one alone.
    """

    name: str = "S5"
    inputs: str = "all"
    running: bool = True

    def __post_init__(self) -> None:
        input_elements(self.name, self.inputs)

    @property
    def vocab_size(self) -> int:
        return FIRST_ELEMENT + len(group(self.name))

    @property
    def choices(self) -> int:
        return len(group(self.name))

    def tokens(self, length: int) -> int:
        return length + 1

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        device = lengths.device
        longest = int(lengths.max())
        allowed = torch.tensor(input_elements(self.name, self.inputs), device=device)
        word = allowed[uniform(0, len(allowed), (len(lengths), longest), generator)]
        products = self._products(word)
        ids, labels = empty(lengths, longest + 1)
        put(ids, torch.zeros_like(lengths), FIRST_ELEMENT + word, lengths)
        put_token(ids, lengths, END)
        put(labels, torch.ones_like(lengths), FIRST_ELEMENT + products, lengths)
        if not self.running:
            index = torch.arange(longest + 1, device=device)
            labels[index != lengths[:, None]] = IGNORED
        return Samples(ids, labels, lengths + 1)

    def _products(self, word: Tensor) -> Tensor:
        """Running products (N, L) of elements (N, L)."""
        if self.name.startswith("Z"):
            return word.cumsum(1) % len(group(self.name))
        table = product_table(self.name).to(word.device)
        products = word.clone()
        # Prefix products by doubling: associativity is all that a group needs for that.
        step = 1
        while step < word.shape[1]:
            products[:, step:] = table[products[:, :-step], products[:, step:]]
            step *= 2
        return products


@dataclass(frozen=True, kw_only=True)
class Parity(WordProblem):
    """Is the number of ones among the bits so far odd? The word problem of Z2."""

    name: str = "Z2"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.name == "Z2", f"parity is the word problem of Z2, got {self.name}")


PLUS, MINUS, TIMES, OPEN, CLOSE, EQUALS = 1, 2, 3, 4, 5, 6
FIRST_DIGIT = 7


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(Task):
    """The value modulo m of an expression such as `3 + 2 x 4 - 1 =`, at most `length` tokens long.

    Operators are drawn uniformly from + - x, digits from 0 to m - 1. Without brackets x binds
    tighter than + and -. With brackets every operation has its own pair and none binds tighter:
    `((3 + 2) x (4 - 1))`; two neighbouring terms are joined at random until one is left.

    Args:
        modulus: m.
        brackets: see above.
        running: without brackets, ask at every digit for the value so far; False asks once, at the
            end.
    """

    modulus: int = 5
    brackets: bool = False
    running: bool = False

    def __post_init__(self) -> None:
        require(self.modulus >= 2, f"modulus must be 2 or more, got {self.modulus}")
        require(
            not (self.brackets and self.running),
            "running needs brackets: false, for a bracket that is still open has no value",
        )

    @property
    def vocab_size(self) -> int:
        return FIRST_DIGIT + self.modulus

    @property
    def choices(self) -> int:
        return self.modulus

    def _digits(self, lengths: Tensor) -> Tensor:
        """n digits make 2n - 1 tokens, with brackets 4n - 3."""
        return (lengths + 3) // 4 if self.brackets else (lengths + 1) // 2

    def tokens(self, length: int) -> int:
        return length + 2

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        counts = self._digits(lengths)
        most = int(counts.max())
        digits = uniform(0, self.modulus, (len(lengths), most), generator)
        operators = uniform(PLUS, TIMES + 1, (len(lengths), most), generator)
        ids, labels = empty(lengths, self.tokens(int(lengths.max())))
        if self.brackets:
            opened, closed, value = self._join(digits, operators, counts, generator)
            width = 1 + opened + closed  # the tokens of each digit and its brackets
            begin = width.cumsum(1) - width + torch.arange(most, device=ids.device)
            for i in range(most):
                exists = i < counts
                put(ids, begin[:, i], torch.full_like(digits, OPEN), opened[:, i] * exists)
                put(ids, begin[:, i] + opened[:, i], FIRST_DIGIT + digits[:, i : i + 1], 1 * exists)
                after = begin[:, i] + opened[:, i] + 1
                put(ids, after, torch.full_like(digits, CLOSE), closed[:, i] * exists)
                put(ids, after + closed[:, i], operators[:, i : i + 1], 1 * (i + 1 < counts))
            equals = 4 * counts - 3
        else:
            values = self._left_to_right(digits, operators)
            spread = torch.stack([FIRST_DIGIT + digits, operators], dim=2).flatten(1)
            put(ids, torch.zeros_like(lengths), spread, 2 * counts - 1)
            value = values.gather(1, counts[:, None] - 1)[:, 0]
            equals = 2 * counts - 1
            if self.running:
                index = torch.arange(ids.shape[1], device=ids.device)
                odd = (index % 2 == 1) & (index < equals[:, None])
                values = values.repeat_interleave(2, 1)
                values = torch.nn.functional.pad(values, (1, max(0, len(index) - values.shape[1])))
                labels = torch.where(odd, FIRST_DIGIT + values[:, : len(index)], labels)
        put_token(ids, equals, EQUALS)
        put_token(ids, equals + 1, EQUALS)  # holds the label's place
        put(labels, equals + 1, FIRST_DIGIT + value[:, None])
        return Samples(ids, labels, equals + 2)

    def _left_to_right(self, digits: Tensor, operators: Tensor) -> Tensor:
        """(N, n): the value of the first 1, 2, ... n digits, x before + and -."""
        total = torch.zeros_like(digits[:, 0])
        term = digits[:, 0]
        values = [term]
        for i in range(1, digits.shape[1]):
            operator, digit = operators[:, i - 1], digits[:, i]
            is_times = operator == TIMES
            signed = torch.where(operator == MINUS, -digit, digit)
            total = torch.where(is_times, total, (total + term) % self.modulus)
            term = torch.where(is_times, term * digit, signed) % self.modulus
            values.append((total + term) % self.modulus)
        return torch.stack(values, dim=1)

    def _join(
        self, digits: Tensor, operators: Tensor, counts: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Brackets opened before and closed behind each digit (N, n), and the value (N,)."""
        rows, most = digits.shape
        opened, closed = torch.zeros_like(digits), torch.zeros_like(digits)
        index = torch.arange(most, device=digits.device)
        # Terms not yet joined: first digit, last digit, value; column j is the j-th term.
        first = index.expand(rows, most).clone()
        last, value, between = first.clone(), digits.clone(), operators.clone()
        row = torch.arange(rows, device=digits.device)
        left = counts.clone()
        for _ in range(most - 1):
            active = left > 1
            share = torch.rand(rows, generator=generator, device=digits.device, dtype=torch.float64)
            j = (share * (left - 1).clamp(min=1)).long()
            k = (j + 1).clamp(max=most - 1)
            a, b, operator = value[row, j], value[row, k], between[row, j]
            joined = torch.where(
                operator == TIMES, a * b, torch.where(operator == PLUS, a + b, a - b)
            )
            opened[row, first[row, j]] += 1 * active
            closed[row, last[row, k]] += 1 * active
            value[row, j] = torch.where(active, joined % self.modulus, a)
            last[row, j] = torch.where(active, last[row, k], last[row, j])
            between[row, j] = torch.where(active, between[row, k], operator)
            # Term k is gone: those behind it move up by one.
            shift = active[:, None] & (index >= k[:, None])
            source = (index + shift.long()).clamp(max=most - 1)
            first, last = first.gather(1, source), last.gather(1, source)
            value, between = value.gather(1, source), between.gather(1, source)
            left = left - 1 * active
        return opened, closed, value[:, 0]
