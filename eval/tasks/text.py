"""Copying and look-up in text, for models that read through a tokenizer.

Source: Jelassi et al. 2024 (section 4.2: natural text, shuffled text, phone book).
"""

import gzip
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Generator, Tensor

from eval.tasks.base import IGNORED, PAD, Samples, Task, require, uniform

Encode = Callable[[str], list[int]]  # text -> ids, without special tokens

# Common names, as in any register.
FIRST_NAMES = """
    Aaron Abigail Adam Agnes Alan Alice Amanda Amy Andrew Angela Anna Anthony Arthur Barbara
    Benjamin Betty Brandon Brenda Brian Carl Carol Catherine Charles Christine Claire Daniel
    David Deborah Denise Dennis Diana Donald Dorothy Douglas Edward Eleanor Elizabeth Emily Emma
    Eric Ethan Eugene Evelyn Florence Frances Frank Gary George Gerald Gloria Grace Gregory
    Hannah Harold Heather Helen Henry Isaac Jack Jacob James Janet Jason Jean Jennifer Jesse
    Joan John Jonathan Joseph Judith Julia Karen Kathleen Keith Kenneth Kevin Larry Laura
    Lawrence Linda Louis Madison Margaret Maria Mark Martha Martin Mary Matthew Megan Michael
    Nancy Nathan Nicholas Nicole Noah Olivia Pamela Patrick Paul Peter Philip Rachel Ralph
    Raymond Rebecca Richard Robert Roger Rose Roy Ruth Samuel Sandra Sarah Scott Sean Sharon
    Sophia Stephen Steven Susan Teresa Thomas Timothy Tyler Victoria Vincent Virginia Walter
    Wayne William Zachary
""".split()  # noqa: SIM905 (a list of 130 names would take 130 lines)
LAST_NAMES = """
    Adams Allen Anderson Bailey Baker Barnes Bell Bennett Brooks Brown Bryant Butler Campbell
    Carter Clark Coleman Collins Cook Cooper Cox Cruz Davis Diaz Edwards Evans Fisher Flores
    Ford Foster Garcia Gibson Gomez Gonzalez Graham Gray Green Griffin Hall Hamilton Harris
    Harrison Hayes Henderson Hernandez Hill Howard Hughes Jackson James Jenkins Johnson Jones
    Jordan Kelly Kennedy King Lee Lewis Long Lopez Marshall Martin Martinez Mason McDonald
    Miller Mitchell Moore Morgan Morris Murphy Murray Myers Nelson Ortiz Owens Parker Patterson
    Perez Perry Peterson Phillips Powell Price Ramirez Reed Reynolds Richardson Rivera Roberts
    Robinson Rodriguez Rogers Ross Russell Sanchez Sanders Scott Simmons Smith Stevens Stewart
    Sullivan Taylor Thomas Thompson Torres Turner Walker Wallace Ward Washington Watson West
    White Williams Wilson Wood Woods Wright Young
""".split()  # noqa: SIM905 (a list of 130 names would take 130 lines)


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A task made of text. encode: the tokenizer, given by who builds the task."""

    needs_tokenizer: ClassVar[bool] = True
    encode: Encode = field(repr=False, metadata={"option": False})

    @property
    def vocab_size(self) -> int | None:
        return None


@dataclass(frozen=True, kw_only=True)
class PhoneBook(TextTask):
    """A book of `length` entries `First Last: 6123456789`, then two of them once more as examples,
    then the name of a third, whose number is asked for. No two entries have one name.

    Args:
        examples: entries repeated before the question.
    """

    examples: int = 2

    def __post_init__(self) -> None:
        require(self.examples >= 0, f"examples must be 0 or more, got {self.examples}")

    @property
    def minimum_length(self) -> int:
        return self.examples + 1

    def tokens(self, length: int) -> int:
        """A bound that holds for every tokenizer: the bytes of the longest names."""
        longest = max(map(len, FIRST_NAMES)) + max(map(len, LAST_NAMES)) + len(" : 0123456789\n")
        return (length + self.examples + 1) * longest + 2

    def texts(self, length: int, generator: Generator) -> tuple[str, str]:
        """(prompt, answer)."""
        # Drawn one after another, and again where a name is already there.
        entries: dict[str, str] = {}
        while len(entries) < length:
            first, last = uniform(0, len(FIRST_NAMES) * len(LAST_NAMES), (1,), generator).item(), 0
            first, last = divmod(int(first), len(LAST_NAMES))
            number = uniform(6 * 10**9, 10**10, (1,), generator).item()
            entries.setdefault(f"{FIRST_NAMES[first]} {LAST_NAMES[last]}", str(number))
        names = list(entries)
        order = torch.randperm(length, generator=generator, device=generator.device).tolist()
        asked = names[order[0]]
        book = "".join(f"{name}: {number}\n" for name, number in entries.items())
        shown = "".join(f"{names[i]}: {entries[names[i]]}\n" for i in order[1 : 1 + self.examples])
        return f"{book}\n{shown}\n{asked}:", f" {entries[asked]}"

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        pieces = []
        for length in lengths.tolist():
            prompt, answer = self.texts(length, generator)
            pieces.append((self.encode(prompt), self.encode(answer)))
        return _join(pieces, lengths.device)

    @property
    def capacity(self) -> int:
        """Entries with different names that there can be."""
        return len(FIRST_NAMES) * len(LAST_NAMES)

    def check_length(self, length: int) -> None:
        super().check_length(length)
        require(length <= self.capacity, f"a phone book has at most {self.capacity} entries")


@dataclass(frozen=True, kw_only=True)
class TextCopy(TextTask):
    """`length` tokens of a text, a blank line, the same again, a blank line, and its first token:
    how does it go on?

    Args:
        file: the text, UTF-8; it may end in .gz or .xz. Line breaks become spaces.
        copies: how often the passage is shown before.
        shuffled: put the passage's tokens into random order first: nothing of it can be guessed.
        max_characters: how much of the file is used, from its start.
    """

    file: str
    copies: int = 2
    shuffled: bool = False
    max_characters: int = 1_000_000

    def __post_init__(self) -> None:
        require(self.copies >= 1, f"copies must be 1 or more, got {self.copies}")
        if not Path(self.file).is_file():
            raise FileNotFoundError(f"text file {self.file} does not exist")
        require(len(self._ids) >= 2, f"text file {self.file} holds no text")

    @cached_property
    def _ids(self) -> Tensor:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(self.file).suffix, open)
        with opener(self.file, "rt", encoding="utf-8") as stream:
            text = stream.read(self.max_characters)
        return torch.tensor(self.encode(" ".join(text.split())), dtype=torch.int64)

    @cached_property
    def _blank_line(self) -> Tensor:
        return torch.tensor(self.encode("\n\n"), dtype=torch.int64)

    @property
    def minimum_length(self) -> int:
        return 2

    def check_length(self, length: int) -> None:
        super().check_length(length)
        have = len(self._ids)
        require(length <= have, f"{self.file} has {have} tokens, fewer than the length {length}")

    def tokens(self, length: int) -> int:
        return (self.copies + 1) * length + self.copies * len(self._blank_line)

    def draw(self, lengths: Tensor, generator: Generator) -> Samples:
        pieces = []
        blank = self._blank_line.tolist()
        device = generator.device
        for length in lengths.tolist():
            start = int(uniform(0, len(self._ids) - length + 1, (1,), generator))
            passage = self._ids[start : start + length]
            if self.shuffled:
                order = torch.randperm(length, generator=generator, device=device)
                passage = passage[order.cpu()]
            ids = passage.tolist()
            pieces.append(((ids + blank) * self.copies + ids[:1], ids[1:]))
        return _join(pieces, lengths.device)


def _join(pieces: list[tuple[list[int], list[int]]], device: torch.device) -> Samples:
    """(prompt, answer) ids -> samples with labels on the answers."""
    sizes = [len(prompt) + len(answer) for prompt, answer in pieces]
    ids = torch.full((len(pieces), max(sizes)), PAD, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for i, (prompt, answer) in enumerate(pieces):
        ids[i, : sizes[i]] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : sizes[i]] = torch.tensor(answer)
    return Samples(ids, labels, torch.tensor(sizes)).to(device)
