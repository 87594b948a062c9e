"""What a synthetic task is: samples of tokens and labels, drawn from a seeded generator.

Generators are pure functions of (generator state, options, lengths) and know nothing but torch.
"""

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

IGNORED = -100  # the label that losses skip
PAD = 0  # fills samples to one width, in every task


class Samples(NamedTuple):
    """A batch of samples, padded on the right.

    input_ids: (N, T) int64.
    labels: (N, T) int64. `labels[:, t]` is what the model says after reading `input_ids[:, :t]`,
        as in transformers' losses; IGNORED where nothing is asked, always so at t = 0.
    lengths: (N,) int64, tokens of each sample before its padding.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> "Samples":
        """The same samples on another device."""
        return Samples(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Options of a task are the fields of its class; `length` is what the task is measured over.

    choices: answers that are equally likely to somebody who guesses, for accuracies scaled to
        0 = chance; None where no such number exists.
    """

    needs_tokenizer: ClassVar[bool] = False

    @property
    def vocab_size(self) -> int | None:
        """Token ids run from 0 to this, exclusive; None: they are the tokenizer's."""
        raise NotImplementedError

    @property
    def choices(self) -> int | None:
        """See the class."""
        return None

    @property
    def minimum_length(self) -> int:
        """The smallest length that samples can have."""
        return 1

    def tokens(self, length: int) -> int:
        """Tokens of a sample of this length (an upper bound where it depends on the draw)."""
        raise NotImplementedError

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        """One sample for each length (N,), all of them at least `minimum_length`."""
        raise NotImplementedError

    def sample(self, lengths: Tensor | Sequence[int], generator: Generator) -> Samples:
        """One sample for each length (N,), on the generator's device.

        Raises:
            ValueError: a length below the task's minimum, or no length at all.
        """
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device=generator.device)
        if lengths.ndim != 1 or len(lengths) == 0:
            raise ValueError(f"expected a list of lengths, got shape {tuple(lengths.shape)}")
        for length in {int(lengths.min()), int(lengths.max())}:
            self.check_length(length)
        return self.draw(lengths, generator)

    def check_length(self, length: int) -> None:
        """Raise ValueError where no sample can be as short, or as long, as this."""
        if length < self.minimum_length:
            raise ValueError(
                f"{type(self).__name__}: length {length} is below the smallest possible, "
                f"{self.minimum_length}, with the options {options_of(self)}"
            )


def options_of(task: Task) -> dict[str, Any]:
    """The options of a task, as they are written in a config."""
    return {entry.name: getattr(task, entry.name) for entry in _option_fields(type(task)).values()}


def _option_fields(kind: type[Task]) -> dict[str, Field]:
    return {entry.name: entry for entry in fields(kind) if entry.metadata.get("option", True)}


def require(holds: bool, message: str) -> None:
    """Raise ValueError(message) unless `holds`."""
    if not holds:
        raise ValueError(message)


def build_task(
    kinds: Mapping[str, type[Task]],
    name: str,
    options: Mapping[str, Any],
    encode: Callable[[str], list[int]] | None,
) -> Task:
    """See `eval.tasks.make_task`."""
    if name not in kinds:
        raise ValueError(f"unknown task {name!r}{_closest(name, kinds)}; known: {sorted(kinds)}")
    kind = kinds[name]
    known = _option_fields(kind)
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"task {name} has no option {key!r}{_closest(key, known)}")
        expected = known[key].type
        # `type` and not `isinstance`: True is an int to Python, but not to the writer of a config.
        fits = type(value) is expected or (expected is float and type(value) is int)
        if isinstance(expected, type) and not fits:
            raise ValueError(
                f"task {name}: option {key} must be of type {expected.__name__}, got {value!r}"
            )
    missing = [
        key for key, entry in known.items() if entry.default is MISSING and key not in options
    ]
    require(not missing, f"task {name} needs the options {missing}")
    if kind.needs_tokenizer:
        require(encode is not None, f"task {name} is made of text and needs a tokenizer")
        return kind(**options, encode=encode)  # pyright: ignore[reportCallIssue]
    return kind(**options)


def _closest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f", the closest is {close[0]!r}" if close else ""


def seeded(seed: int, *parts: object, device: torch.device | str = "cpu") -> Generator:
    """A generator for one purpose: other `parts` give a stream that shares nothing with this one.

    Training and evaluation name different parts, so no test sample is ever trained on by seed.
    """
    text = repr((seed, *parts)).encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
    return torch.Generator(device=device).manual_seed(number)


# --- drawing lengths ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths: uniform over `values`."""

    values: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """ "3-40" is every length from 3 to 40, "4,8,16" those three, "64" always 64.

        Raises:
            ValueError: anything else.
        """
        values: list[int] = []
        for part in str(text).split(","):
            low, dash, high = part.strip().partition("-")
            if (
                not low.isdigit()
                or (dash and not high.isdigit())
                or (dash and int(high) < int(low))
            ):
                raise ValueError(
                    f"lengths {text!r}: expected a range such as '3-40' or a list such as '4,8,16'"
                )
            values.extend(range(int(low), int(high) + 1) if dash else [int(low)])
        return cls(tuple(values))

    def draw(self, count: int, generator: Generator) -> Tensor:
        """(count,) lengths."""
        table = torch.tensor(self.values, device=generator.device)
        return table[_below(len(self.values), (count,), generator)]


# --- building blocks of generators ----------------------------------------------------------------


def _below(high: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=generator.device)


def uniform(low: int, high: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform integers of [low, high)."""
    return low + _below(high - low, shape, generator)


def distinct(low: int, high: int, rows: int, count: int, generator: Generator) -> Tensor:
    """(rows, count) integers of [low, high), all different within a row, in random order.

    Repeated entries are drawn again until there are none. No step prefers one number to another,
    so every ordered choice is equally likely.

    Raises:
        ValueError: fewer numbers than asked for.
    """
    require(count <= high - low, f"cannot draw {count} different numbers of {high - low}")
    if 4 * count > high - low:  # most draws would collide
        order = torch.rand((rows, high - low), generator=generator, device=generator.device)
        return low + order.argsort(1)[:, :count]
    drawn = uniform(low, high, (rows, count), generator)
    while True:
        ordered, order = drawn.sort(1)
        repeated = torch.zeros_like(drawn, dtype=torch.bool)
        repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        again = torch.zeros_like(repeated).scatter(1, order, repeated)
        n_again = int(again.sum())
        if not n_again:
            return drawn
        drawn[again] = uniform(low, high, (n_again,), generator)


def random_places(
    widths: Tensor, counts: Tensor, most: int, generator: Generator, *, ordered: bool = True
) -> Tensor:
    """For each row, `counts` (N,) different places of [0, widths) (N,), uniform over all choices.

    Returns:
        (N, most): sorted (or with ordered=False in random order) in the first `counts` columns of
        a row; the others hold the row's width.
    """
    width = int(widths.max())
    device = generator.device
    keys = torch.rand((len(widths), width), generator=generator, device=device)
    keys = keys.masked_fill(torch.arange(width, device=device) >= widths[:, None], 2.0)
    places = keys.argsort(1)[:, :most]
    if places.shape[1] < most:
        places = torch.nn.functional.pad(places, (0, most - places.shape[1]))
    unused = torch.arange(most, device=device) >= counts[:, None]
    places = torch.where(unused, widths[:, None], places)
    return places.sort(1).values if ordered else places


def put(target: Tensor, start: Tensor, values: Tensor, counts: Tensor | None = None) -> None:
    """target[i, start[i] : start[i] + counts[i]] = values[i, : counts[i]] for every row, in place.

    target (N, T); start, counts (N,); values (N, W). Without counts all W columns are copied.
    """
    if counts is None:
        columns = start[:, None] + torch.arange(values.shape[1], device=target.device)
        target.scatter_(1, columns, values)
        return
    # Read by every place of the target: a mask as an index would cost many times as much.
    source = torch.arange(target.shape[1], device=target.device) - start[:, None]
    inside = (source >= 0) & (source < counts[:, None])
    found = values.gather(1, source.clamp(0, values.shape[1] - 1))
    torch.where(inside, found, target, out=target)


def put_token(target: Tensor, start: Tensor, token: int) -> None:
    """target[i, start[i]] = token for every row, in place."""
    target[torch.arange(len(target), device=target.device), start] = token


def empty(lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Padding and ignored labels, each (N, width)."""
    shape = (len(lengths), width)
    ids = torch.full(shape, PAD, dtype=torch.int64, device=lengths.device)
    return ids, torch.full_like(ids, IGNORED)


# --- packing --------------------------------------------------------------------------------------


def pack(
    task: Task,
    lengths: Lengths,
    *,
    rows: int,
    row_tokens: int,
    generator: Generator,
    several: bool = True,
    borders: bool = True,
) -> dict[str, Tensor]:
    """Fill rows with fresh samples, one after another while they fit; no sample is cut.

    Args:
        task, lengths: what is drawn.
        rows: rows to fill.
        row_tokens: their width.
        generator: decides all draws.
        several: False puts one sample into each row.
        borders: False lets positions run on, so that a row is one document and its samples are
            read with those before them in mind.

    Returns:
        `input_ids`, `labels`, `position_ids`, each (rows, row_tokens) int64 on the CPU. With
        borders positions restart at 0 at every sample and at the padding behind the last one,
        which is how models see where to forget.

    Raises:
        ValueError: the longest sample does not fit into a row.
    """
    sizes = {length: task.tokens(length) for length in lengths.values}
    check_fits(task, lengths, row_tokens)
    each = row_tokens // min(sizes.values()) if several else 1
    drawn = lengths.draw(rows * each, generator).tolist()
    chosen, row_of, start_of = [], [], []
    row, at = 0, 0
    for length in drawn:
        size = sizes[length]
        if at + size > row_tokens or (at and not several):
            row, at = row + 1, 0
            if row == rows:
                break
        chosen.append(length)
        row_of.append(row)
        start_of.append(at)
        at += size
    samples = task.sample(chosen, generator).to("cpu")
    begin = torch.tensor(row_of) * row_tokens + torch.tensor(start_of)
    laid = _lay(samples, begin, (rows, row_tokens))
    if not borders:
        laid["position_ids"] = torch.arange(row_tokens).repeat(rows, 1)
    return laid


def check_fits(task: Task, lengths: Lengths, row_tokens: int) -> None:
    """Raise ValueError where a length is too small for the task or too large for a row."""
    task.check_length(min(lengths.values))
    task.check_length(max(lengths.values))
    longest = max(task.tokens(length) for length in lengths.values)
    require(
        longest <= row_tokens,
        f"{type(task).__name__}: the longest sample has {longest} tokens, a row {row_tokens}",
    )


def _lay(samples: Samples, begin: Tensor, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Samples in places begin (N,), ascending, of the flattened rows; every row begins with one."""
    is_begin = torch.zeros(shape, dtype=torch.int64)
    is_begin.view(-1)[begin] = 1
    owner = is_begin.view(-1).cumsum(0) - 1
    offset = torch.arange(owner.numel()) - begin[owner]
    length = samples.lengths[owner]
    inside = offset < length
    width = samples.input_ids.shape[1]
    source = owner * width + offset.clamp(max=width - 1)
    ids = torch.where(inside, samples.input_ids.flatten()[source], PAD)
    labels = torch.where(inside, samples.labels.flatten()[source], IGNORED)
    position_ids = torch.where(inside, offset, offset - length)
    return {
        "input_ids": ids.view(shape),
        "labels": labels.view(shape),
        "position_ids": position_ids.view(shape),
    }
