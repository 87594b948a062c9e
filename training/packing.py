"""Examples -> packed rows, and the order in which rows are trained on."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

IGNORED = -100  # the label that transformers' losses skip


class Example(NamedTuple):
    """One encoded document.

    ids (L,) int: its tokens. targets (L,) bool: True where the token is to be predicted.
    n_bytes: UTF-8 bytes of the predicted text.
    """

    ids: np.ndarray
    targets: np.ndarray
    n_bytes: int


class Row(NamedTuple):
    """One packed row. ids (T,); starts (T,) bool: first token of a document or of a piece of one;
    targets (T,) bool; length: tokens before the padding."""

    ids: np.ndarray
    starts: np.ndarray
    targets: np.ndarray
    length: int


def pack(
    examples: Iterable[Example], seq_len: int, pad_id: int, *, split: bool, overlap: int = 0
) -> Iterator[Row]:
    """Lay examples one after another into rows of `seq_len` tokens.

    A document that does not fit is continued in the next row, where its positions start at 0 again:
    rows are independent samples (shuffled, on any process), so no state could be carried over.

    Args:
        examples: encoded documents in the order to be packed.
        split: True fills every row to its end. False starts a new row for an example that would
            not fit into the present one, so that a completion stays with its prompt; only an
            example longer than a whole row is cut.
        overlap: tokens that a continued piece repeats. With 1 every token but the first of a
            document is predicted exactly once, which a held-out loss in bits per byte needs; with
            0 no token is trained on twice.
        pad_id: fills the end of the last row, and of others where `split` is False. Padding counts
            as a document of its own without targets: it comes last, so it changes nothing else.

    Returns:
        Rows with at least one target; the others have nothing to learn from.
    """
    room = seq_len
    ids, starts, targets = _empty_row(seq_len, pad_id)

    def finish() -> Iterator[Row]:
        if room < seq_len:
            if room:
                starts[seq_len - room] = True
            if targets.any():
                yield Row(ids, starts, targets, seq_len - room)

    for example in examples:
        at, length = 0, len(example.ids)
        while at < length:
            too_long = length - at > room
            if room <= overlap or (too_long and not split and room < seq_len):
                yield from finish()
                ids, starts, targets = _empty_row(seq_len, pad_id)
                room = seq_len
            take = min(room, length - at)
            here = slice(seq_len - room, seq_len - room + take)
            ids[here] = example.ids[at : at + take]
            targets[here] = example.targets[at : at + take]
            starts[here.start] = True
            targets[here.start] = False  # the first token of a piece has nothing before it
            room -= take
            at += take
            if at < length:
                at -= overlap
    yield from finish()


def _empty_row(seq_len: int, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.full(seq_len, pad_id, dtype=np.int64),
        np.zeros(seq_len, dtype=bool),
        np.zeros(seq_len, dtype=bool),
    )


def row_tensors(
    ids: np.ndarray, starts: np.ndarray, targets: np.ndarray
) -> dict[str, torch.Tensor]:
    """Model inputs of one row, each (T,) int64: input_ids, position_ids that restart at every
    document (the model resets its convolution and state there), labels (-100 where no target)."""
    index = np.arange(len(ids))
    position_ids = index - np.maximum.accumulate(np.where(starts, index, 0))
    ids = ids.astype(np.int64)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(position_ids),
        "labels": torch.from_numpy(np.where(targets, ids, IGNORED)),
    }


class PackedRows(Dataset):
    """All rows in memory.

    ids (N, T) uint16 or uint32; starts and targets (N, T) bool; lengths (N,); n_bytes: UTF-8 bytes
    of the text that the targets spell.
    """

    def __init__(self, rows: Iterable[Row], vocab_size: int, n_bytes: int = 0) -> None:
        dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        kept = [row._replace(ids=row.ids.astype(dtype)) for row in rows]
        if not kept:
            raise ValueError("no row has a token to learn from: the data is empty or all masked")
        self.ids = np.stack([row.ids for row in kept])
        self.starts = np.stack([row.starts for row in kept])
        self.targets = np.stack([row.targets for row in kept])
        self.lengths = np.array([row.length for row in kept])
        self.n_bytes = n_bytes

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return row_tensors(self.ids[index], self.starts[index], self.targets[index])

    def fingerprint(self) -> str:
        """A short hash of all rows: two datasets of one fingerprint train alike."""
        digest = hashlib.sha256()
        for array in (self.ids, self.starts, self.targets):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def summary(self) -> str:
        return f"{self.lengths.sum():,} tokens"


def epoch_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order (n_rows,) in which pass number `epoch` over the rows visits them."""
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


class RowOrder(Sampler[int]):
    """Row numbers for ever, epoch after epoch, beginning with the sample number `start`."""

    def __init__(self, n_rows: int, seed: int, start: int) -> None:
        self.n_rows, self.seed, self.start = n_rows, seed, start

    def __iter__(self) -> Iterator[int]:
        epoch, offset = divmod(self.start, self.n_rows)
        while True:
            yield from epoch_order(self.n_rows, self.seed, epoch)[offset:].tolist()
            epoch, offset = epoch + 1, 0
