"""Interpolated byte n-grams: the baseline that a trained model is measured against.

Witten-Bell interpolation, recursive down to the uniform distribution over 256 bytes:

    P_k(b | c) = (n(c b) + t(c) P_{k-1}(b | c')) / (n(c) + t(c))

where c is the last k bytes, c' the last k - 1, n counts occurrences in the training bytes, t(c) is
the number of distinct bytes seen after c, and P_{-1} = 1/256. A context that was never seen gives
P_k = P_{k-1}. (Witten and Bell 1991, method C; Chen and Goodman 1999, section 2.5.)

The order is the number of context bytes. Contexts do not cross document boundaries: near the start
of a document the model of the available length is used.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

MAX_ORDER = 7  # context and byte then fill the 64 bits of a code
SEPARATOR = 256


class _Level(NamedTuple):
    """Counts for one context length; codes hold bytes in base 256, the newest lowest."""

    grams: np.ndarray  # (G,) uint64, sorted codes of context and next byte
    gram_counts: np.ndarray  # (G,)
    contexts: np.ndarray  # (C,) uint64, sorted codes
    context_counts: np.ndarray  # (C,) n(c)
    context_types: np.ndarray  # (C,) t(c)


class ByteNgram:
    """Byte n-grams of every order from 0 to `order`, from one pass over the training tokens.

    Args:
        tokens: (N,) integers; 0..255 are bytes, anything above separates documents.
        order: largest number of context bytes, 0..7.

    Raises:
        ValueError: the order is out of range or there is no byte.
    """

    def __init__(self, tokens: np.ndarray, order: int) -> None:
        if not 0 <= order <= MAX_ORDER:
            raise ValueError(f"order must be from 0 to {MAX_ORDER}, got {order}")
        if not (tokens < SEPARATOR).any():
            raise ValueError(f"no byte (id 0..255) among the {len(tokens)} training tokens")
        self.order = order
        self._levels = []
        codes = _Codes(tokens)
        for k in tqdm(range(order + 1), desc="byte n-grams", unit="order"):
            extended = codes.extend(k)
            if not codes.long_enough.any():
                break  # no document is that long: higher orders predict like the ones there are
            grams, counts = np.unique(extended[codes.long_enough], return_counts=True)
            contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
            # Sorted grams keep the grams of one context together.
            totals = np.add.reduceat(counts, first)
            distinct = np.diff(np.append(first, len(grams)))
            self._levels.append(_Level(grams, counts, contexts, totals, distinct))

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Predict each byte from those before it in its document.

        Args:
            tokens: (N,) integers as in training.

        Returns:
            (order + 1, N) float64: row k is the probability that the order-k model gives; NaN at
            separators.
        """
        codes = _Codes(tokens)
        rows = np.empty((self.order + 1, len(tokens)))
        p = np.where(tokens < SEPARATOR, 1 / 256, np.nan)
        for k, level in enumerate(self._levels):
            gram = codes.extend(k)
            context, known = _find(level.contexts, gram >> np.uint64(8))
            seen, counted = _find(level.grams, gram)
            known &= codes.long_enough
            n = np.where(counted, level.gram_counts[seen], 0)
            total, distinct = level.context_counts[context], level.context_types[context]
            p = np.where(known, (n + distinct * p) / (total + distinct), p)
            rows[k] = p
        rows[len(self._levels) :] = p
        return rows


class _Codes:
    """Codes of the last k + 1 bytes at every position, grown one byte at a time."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._bytes = np.where(tokens < SEPARATOR, tokens, 0).astype(np.uint64)
        index = np.arange(len(tokens))
        last_separator = np.maximum.accumulate(np.where(tokens < SEPARATOR, -1, index))
        self._run = index - last_separator  # bytes of the document up to here, this one included
        self._codes = np.zeros(len(tokens), np.uint64)
        self.long_enough = self._run > 0

    def extend(self, k: int) -> np.ndarray:
        """Add the byte k places back (call with k = 0, 1, ...) and return the codes.

        Codes are right where `long_enough`: the document holds k bytes before this one.
        """
        older = self._bytes[: len(self._bytes) - k]
        self._codes[k:] |= older << np.uint64(8 * k)
        self.long_enough = self._run > k
        return self._codes


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each key an index into the sorted table, and whether the key is there."""
    index = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return index, table[index] == keys


def read_seen_tokens(path: str | Path) -> np.ndarray:
    """Read the token ids a model was trained on.

    Args:
        path: raw little-endian ids; the file of the same name ending in `.json` beside it says
            {"dtype": "uint16" or "uint32", "count": N}.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the description is malformed or disagrees with the size of the file.
    """
    path = Path(path)
    description = path.with_suffix(".json")
    for file in (path, description):
        if not file.is_file():
            raise FileNotFoundError(f"ngram.seen_tokens: {file} does not exist")
    try:
        facts = json.loads(description.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{description} is not JSON: {error}") from error
    if (
        not isinstance(facts, dict)
        or facts.get("dtype") not in ("uint16", "uint32")
        or not isinstance(facts.get("count"), int)
    ):
        raise ValueError(
            f'{description} must hold "dtype" ("uint16" or "uint32") and an integer "count", '
            f"got {facts}"
        )
    expected = facts["count"] * np.dtype(facts["dtype"]).itemsize
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, but {description.name} describes {expected}"
        )
    return np.fromfile(path, np.dtype(facts["dtype"]).newbyteorder("<"))


def bits_per_byte(
    model: ByteNgram, texts: Sequence[str], orders: Sequence[int], *, skip_first: bool
) -> dict[int, float]:
    """Score texts by the n-grams of the given orders.

    Args:
        model: n-grams of at least the largest order.
        texts: documents.
        orders: numbers of context bytes.
        skip_first: leave out each document's first byte, as a model without a prefix token does.

    Returns:
        order -> -log2 p, summed over the scored bytes, per UTF-8 byte of all texts.
    """
    separator = np.array([SEPARATOR], np.uint16)
    parts = [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16) for text in texts]
    tokens = np.concatenate([part for text in parts for part in (separator, text)])
    scored = tokens < SEPARATOR
    if skip_first:
        scored[1:] &= scored[:-1]
    rows = model.probabilities(tokens)
    size = sum(map(len, parts))
    return {order: float(-np.log2(rows[order][scored]).sum() / size) for order in orders}
