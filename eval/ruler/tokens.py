"""Counting tokens: of whole prompts, which decides, and of their pieces, which guides."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


class Counted(NamedTuple):
    """A text's number of tokens, and for some of its characters the token that holds them."""

    tokens: int
    places: list[int]


class TokenCounter:
    """Counts the tokens of texts with a tokenizer of its own (the caller's keeps its state).

    Args:
        tokenizer: any fast tokenizer; no special tokens are added to the texts.
        parse_special: names of special tokens in a text are those tokens, as in a rendered chat;
            False takes them for plain text.

    Attributes:
        hash: identifies the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, parse_special: bool = False) -> None:
        description = tokenizer.backend_tokenizer.to_str()
        self.hash = hashlib.sha256(description.encode("utf-8")).hexdigest()[:16]
        self._backend = Tokenizer.from_str(description)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = not parse_special
        # One token a byte needs no tokenizer to count, unless there are special tokens to find.
        self._bytes = not parse_special and _is_bytes(json.loads(description))
        self._costs: dict[str, int] = {}
        self._numbers = [0]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text."""
        if self._bytes:
            return [len(text.encode("utf-8")) for text in texts]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding) for encoding in encodings]

    def locate(self, texts: Sequence[str], places: Sequence[Sequence[int]]) -> list[Counted]:
        """Count the tokens of each text, and find the tokens of some of its characters.

        Args:
            texts: to count.
            places: for each text, indices of characters in it; its length is allowed.

        Returns:
            For each text, its tokens and for each place the number of tokens before the one that
            holds that character.
        """
        if self._bytes:
            return [
                Counted(len(text.encode("utf-8")), [len(text[:i].encode("utf-8")) for i in at])
                for text, at in zip(texts, places, strict=True)
            ]
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            Counted(len(encoding), [_token_at(encoding, i) for i in at])
            for encoding, at in zip(encodings, places, strict=True)
        ]

    def costs(self, pieces: Iterable[str]) -> list[int]:
        """Return the tokens of each piece alone; equal pieces are counted once and remembered.

        The tokens of a text are not always those of its pieces, so this only guides.
        """
        pieces = list(pieces)
        new = [piece for piece in dict.fromkeys(pieces) if piece not in self._costs]
        if new:
            self._costs.update(zip(new, self.count(new), strict=True))
        return [self._costs[piece] for piece in pieces]

    def numbers(self, upto: int) -> int:
        """Return the tokens of " 1.", " 2.", ... to " `upto`." together."""
        while len(self._numbers) <= upto:
            begin = len(self._numbers)
            for tokens in self.count([f" {i}." for i in range(begin, 2 * begin + 64)]):
                self._numbers.append(self._numbers[-1] + tokens)
        return self._numbers[upto]

    def cumulative(self, words: Sequence[str]) -> np.ndarray:
        """Return, for the words joined by spaces, how many tokens begin before each word's end.

        Returns:
            int64 of shape (len(words) + 1,), from 0 for no words to the tokens of all.
        """
        lengths = np.fromiter((len(word) for word in words), np.int64, len(words))
        ends = np.concatenate([[0], np.cumsum(lengths + 1) - 1])
        text = " ".join(words)
        if self._bytes:
            sizes = np.fromiter((len(word.encode("utf-8")) for word in words), np.int64, len(words))
            return np.concatenate([[0], np.cumsum(sizes + 1) - 1])
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        counts = np.searchsorted(starts, ends, side="left")
        counts[-1] = len(starts)
        return counts


def _is_bytes(description: dict[str, Any]) -> bool:
    """Whether every UTF-8 byte is one token, whatever stands beside it."""
    model, split = description["model"], description["pre_tokenizer"] or {}
    return (
        model["type"] == "BPE"
        and not model["merges"]
        and len(model["vocab"]) == 256
        and description["normalizer"] is None
        and split.get("type") == "ByteLevel"
        and not split["add_prefix_space"]
        and all(token["special"] for token in description["added_tokens"])
    )


def _token_at(encoding: Any, place: int) -> int:
    """Return the token that holds a character, or the first one after it."""
    for at in range(place, place + 4):
        token = encoding.char_to_token(at)
        if token is not None:  # a space may belong to no token
            return token
    return len(encoding)
