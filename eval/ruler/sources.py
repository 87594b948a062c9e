"""What samples are made of: a haystack text, word lists, and questions with their documents."""

import functools
import hashlib
import importlib.resources
import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from eval.documents import read_documents, read_text, sha256

DATA = Path(__file__).with_name("data")
NOVEL = DATA / "moby_dick.txt.xz"
WONDERWORDS = "3.0.1"
# Key words that training documents use and samples do not: one of this many.
RESERVED_SHARE = 8


# --- haystack -------------------------------------------------------------------------------------

# A full stop after these does not end a sentence.
_ABBREVIATION = re.compile(
    r"(Mr|Mrs|Ms|Messrs|Dr|Prof|Rev|Hon|Capt|Col|Gen|Lieut|Lt|Sgt|St|Mt|Jr|Sr|Esq|Inc|Ltd|Co"
    r"|vs|viz|cf|i\.e|e\.g|etc|[Vv]ol|[Ff]ig|pp?|[Cc]h|Chap|[A-Z])\.$"
)
_SENTENCE_END = re.compile(r"""[.!?…]+["'”’)\]]*$""")
_SENTENCE_START = re.compile(r"""["'“‘(\[—-]*[A-Z0-9]""")


class Haystack(NamedTuple):
    """A text as words without white space, and the sentences in it.

    Args:
        words: of the whole text.
        ends: for each sentence, the number of words up to its end.
        name: of its file.
        sha256: of that file.
        splitter: "builtin" or "punkt", what found the sentences.
    """

    words: list[str]
    ends: np.ndarray
    name: str
    sha256: str
    splitter: str


def sentence_ends(words: Sequence[str]) -> list[int]:
    """Return the number of words up to the end of each sentence; the last is `len(words)`.

    A sentence ends with a word that closes with `.`, `!` or `?` where the next word begins with a
    capital letter or a digit. Initials and common abbreviations do not end one.
    """
    ends = [
        index + 1
        for index, (word, following) in enumerate(itertools.pairwise(words))
        if _SENTENCE_END.search(word)
        and _SENTENCE_START.match(following)
        and not _ABBREVIATION.match(word)
    ]
    return [*ends, len(words)]


def punkt_ends(words: Sequence[str]) -> list[int]:
    """Return what `sentence_ends` does, found by NLTK's punkt model, which must be installed.

    Raises:
        ValueError: nltk or its model is missing.
    """
    if importlib.util.find_spec("nltk") is None:
        raise ValueError('ruler.splitter "punkt" needs the package nltk; "builtin" needs nothing')
    from nltk.tokenize import sent_tokenize

    try:
        sentences = sent_tokenize(" ".join(words))
    except LookupError as error:
        raise ValueError(
            'ruler.splitter "punkt" needs the data of NLTK\'s punkt model, which is not installed; '
            '"builtin" needs nothing'
        ) from error
    return list(itertools.accumulate(len(sentence.split(" ")) for sentence in sentences))


def read_json(path: str | Path) -> Any:
    """Read a JSON file, plain, `.gz` or `.xz`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken, or not JSON.
    """
    try:
        return json.loads(read_text(Path(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


@functools.lru_cache(maxsize=4)
def load_haystack(
    path: str | None, splitter: str = "builtin", max_bytes: int | None = None
) -> Haystack:
    """Read a haystack.

    Args:
        path: text file, `.jsonl` with rows {"text"} or `.json` with one {"text"}, plain, `.gz` or
            `.xz`; None is the novel that comes with the project.
        splitter: "builtin" or "punkt".
        max_bytes: read only this many bytes of text, from its start.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken or without text, or punkt is not installed.
    """
    file = NOVEL if path is None else Path(path)
    if ".json" in file.suffixes[-2:]:
        content = read_json(file)
        text = content.get("text") if isinstance(content, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{file} must hold a JSON object with a string "text"')
    else:
        text = "\n".join(document.text for document in read_documents(file, max_bytes))
    words = text.split()
    if not words:
        raise ValueError(f"{file} holds no text")
    find = punkt_ends if splitter == "punkt" else sentence_ends
    name = file.name if path is None else str(path)
    return Haystack(words, np.array(find(words)), name, sha256(file), splitter)


# --- words ----------------------------------------------------------------------------------------


class KeyWords:
    """Keys "adjective-noun", of which one in eight by adjective and noun is kept for training.

    A key made of two kept words is used in training documents only, one made of two others in
    samples only; no word stands in keys of both.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self.adjectives = _split(adjectives)
        self.nouns = _split(nouns)

    def draw(self, rng: Random, reserved: bool = False) -> str:
        """Return one key; `reserved` takes the words of training documents."""
        return f"{rng.choice(self.adjectives[reserved])}-{rng.choice(self.nouns[reserved])}"


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    parts: tuple[list[str], list[str]] = ([], [])
    for word in words:
        # By the word and not by its place, so that both lists agree about a word in both.
        parts[hashlib.sha256(word.encode()).digest()[0] % RESERVED_SHARE == 0].append(word)
    return parts


@functools.lru_cache(maxsize=1)
def key_words() -> KeyWords:
    """Return the keys of the word lists that come with the project."""
    return KeyWords(*(read_lines(DATA / f"{kind}.txt") for kind in ("adjectives", "nouns")))


@functools.lru_cache(maxsize=1)
def counted_words() -> list[str]:
    """Return the words to count, sorted: both lists and all plain words of the novel."""
    text = " ".join(load_haystack(None).words)
    words = set(re.findall(r"\b[a-z]{3,14}\b", text))
    words.update(*(read_lines(DATA / f"{kind}.txt") for kind in ("adjectives", "nouns")))
    return sorted(words)


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a word list, plain or compressed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken, or without words.
    """
    (document,) = read_documents(path)
    words = [line.strip() for line in document.text.split("\n") if line.strip()]
    if not words:
        raise ValueError(f"{path} holds no words")
    return words


_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


def draw_words(rng: Random, words: Sequence[str], count: int) -> list[str]:
    """Draw distinct words; where the list is too short, pseudo-words join it first.

    A pseudo-word is four open syllables ("mobelita"; 24 million of them). It joins the list and is
    drawn like any other word, so that common and rare words look alike.
    """
    if count <= len(words):
        return rng.sample(words, count)
    extended = dict.fromkeys(words)
    while len(extended) < count:
        extended["".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(4))] = None
    return rng.sample(list(extended), count)


# --- the word lists of NVIDIA's scripts -----------------------------------------------------------


def wonderwords(kind: str) -> list[str]:
    """Return a word list of the package wonderwords: kind is "adjective", "noun" or "verb".

    Raises:
        ValueError: the package is missing or of another version, whose lists differ.
    """
    found = version("wonderwords") if importlib.util.find_spec("wonderwords") else "none"
    if found != WONDERWORDS:
        raise ValueError(
            f"ruler.compat takes its words from wonderwords=={WONDERWORDS}, installed is {found}; "
            f"install that version or set ruler.compat to false"
        )
    file = importlib.resources.files("wonderwords.assets") / f"{kind}list.txt"
    return [line.rstrip() for line in file.read_text(encoding="utf-8").splitlines()]


class SortedPairs:
    """The sorted set of all "adjective-noun", without making its six million members.

    Pairs are sorted as whole texts. Adjectives sorted with their hyphen already are in that order,
    except where one continues another's ("teeny-", "teeny-tiny-"): those are merged.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._groups: list[str | list[str]] = []
        heads = sorted({f"{adjective}-" for adjective in adjectives})
        while heads:
            first = heads.pop(0)
            group = [first]
            while heads and heads[0].startswith(first):
                group.append(heads.pop(0))
            if len(group) == 1:
                self._groups.append(first)
            else:
                self._groups.append(sorted({h + noun for h in group for noun in self._nouns}))
        sizes = [len(self._nouns) if isinstance(g, str) else len(g) for g in self._groups]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> str:
        at = int(np.searchsorted(self._starts, index, side="right")) - 1
        group, place = self._groups[at], index - int(self._starts[at])
        return group + self._nouns[place] if isinstance(group, str) else group[place]
