"""Which keys a query sees: padding, documents and windows as one interval of token numbers.

The real tokens of a row are numbered, cached ones first. A query of number n sees the keys whose
numbers lie in [low, n]; low is where its document begins, or where its window does. A pad has a
number beyond all others and sees pads alone, so that no query sees nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssm_hf.ops.packing import document_numbers, document_starts
from ssm_hf.sequence import SequenceInfo

_PAD = 1 << 62
EMPTY = _PAD + 1  # seen by nobody


class Places(NamedTuple):
    """Places of T tokens in their rows; (B, T) int64, or (1, T) where all rows are alike.

    Attributes:
        number: among the real tokens of the row, cached ones included; at pads beyond all others.
        low: the least number that the token sees.
        rank: among the real tokens of the document in this call; at pads that of the token before,
            -1 where there is none.
        doc: numbers of the documents of this call; document 0 continues what is cached. None where
            each row is one document.
    """

    number: Tensor
    low: Tensor
    rank: Tensor
    doc: Tensor | None


def places(
    seq: SequenceInfo, length: int, window: int | None, device: torch.device, seen: Tensor | None
) -> Places:
    """Places of the `length` tokens that `seq` describes.

    Args:
        seq: padding and documents.
        length: T.
        window: tokens that a query sees, itself included; None = all.
        device: of the result.
        seen: (B,) int64 real tokens of each row in the cache; None = there is none.
    """
    mask, doc = seq.mask, seq.seq_idx
    if mask is None:
        rank = torch.arange(length, device=device)[None]
    else:
        rank = mask.long().cumsum(dim=1) - 1
    number = rank if seen is None else rank + seen[:, None]
    low = torch.zeros_like(number)
    if doc is not None:
        doc = document_numbers(doc, mask)
        start = torch.where(document_starts(doc), rank, 0).cummax(dim=1).values
        low = torch.where(doc == 0, 0, start if seen is None else start + seen[:, None])
        number, rank = number.expand(low.shape), rank - start
    if window is not None:
        low = torch.maximum(low, number - (window - 1))
    if mask is not None:
        number, low = number.masked_fill(~mask, _PAD), low.masked_fill(~mask, _PAD)
    return Places(number, low, rank, doc)


def shared_fact(seq: SequenceInfo, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` derives from `seq`, by the first layer that asks for it."""
    if seq.derived is None:
        return make()
    if key not in seq.derived:
        seq.derived[key] = make()
    return seq.derived[key]


def positions(seq: SequenceInfo, own: Places, before: Tensor | None) -> Tensor:
    """Positions (B, T), or (1, T), by which tokens are rotated: by their distances as given, or
    counted. The first real token of a call follows what is cached, at the position `before` (B,).
    """
    if seq.position_ids is None:
        position, after = own.rank, before
    else:
        position = seq.position_ids
        if seq.mask is None:
            first = position[:, 0]
        else:
            first = position.gather(1, seq.mask.int().argmax(dim=1, keepdim=True))[:, 0]
        after = -first if before is None else before - first
    if after is None:
        return position
    if own.doc is None:
        return position + after[:, None]
    return position + torch.where(own.doc == 0, after[:, None], 0)


def next_position(seq: SequenceInfo, position: Tensor, before: Tensor | None) -> Tensor:
    """Positions (B, T) of what would follow each token; pads move nothing on."""
    if seq.mask is None:
        return position + 1
    index = torch.arange(seq.mask.shape[1], device=seq.mask.device)
    last = torch.where(seq.mask, index, -1).cummax(dim=1).values
    following = position.expand(last.shape).gather(1, last.clamp(min=0)) + 1
    return torch.where(last >= 0, following, 0 if before is None else before[:, None])


def cached_numbers(seen: Tensor, slots: int) -> Tensor:
    """Numbers (B, S) of the tokens in a `KVLayer`'s slots after `seen` (B,) tokens."""
    last = seen[:, None] - 1
    token = last - (last - torch.arange(slots, device=seen.device)) % slots
    return token.masked_fill(token < 0, EMPTY)


def latest(keys: Tensor, seen: Tensor, ring: int | None) -> Tensor:
    """Slots (B, S') of the tokens last seen, the latest one last; rows that have seen `seen` (B,)
    fewer begin with slots of no meaning.

    Args:
        keys: (B, S, G, d) of a `KVLayer`.
        seen: tokens of each row.
        ring: tokens that a query may see at most; None = all.
    """
    slots = keys.shape[1]
    size = slots if ring is None else min(slots, ring)
    return (seen[:, None] - size + torch.arange(size, device=seen.device)) % slots


def first_true(flags: Tensor) -> Tensor:
    """flags (B, T) bool -> places (B, T) of the True ones and then of the others, in order."""
    rank = flags.cumsum(dim=1)
    index = torch.arange(flags.shape[1], device=flags.device).expand(flags.shape)
    target = torch.where(flags, rank - 1, rank[:, -1:] + index - rank)
    return torch.empty_like(rank).scatter_(1, target, index)


def columns(
    own: Places, mask: Tensor | None, seen: Tensor | None, cached: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The first and the last key that each token sees, as places among the keys; pads see none.

    Args:
        own: places of T tokens.
        mask: (B, T), True at real tokens.
        seen: (B,) real tokens of each row before them; None = there are none.
        cached: keys before those of the T tokens: of the tokens last seen, the latest one last.

    Returns:
        low and high, (B, T) or (1, T), and which keys are real, (B, cached + T) or None = all.
    """
    length = own.number.shape[1]
    low = own.low if seen is None else own.low - seen[:, None]
    high = torch.arange(cached, cached + length, device=low.device)[None]
    if mask is None:
        return low + cached, high.expand_as(low), None
    first = first_true(mask).gather(1, low.clamp(0, length - 1))
    low = torch.where(low < 0, low, first) + cached
    real = torch.nn.functional.pad(mask, (cached, 0), value=True)
    return low.masked_fill(~mask, 1), torch.where(mask, high, 0), real


def shared_columns(
    seq: SequenceInfo, own: Places, window: int | None, seen: Tensor | None, cached: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`columns`, once for all layers of a call with this window where nothing is cached."""
    if seen is not None:
        return columns(own, seq.mask, seen, cached)
    key = ("columns", window, own.low.device)
    return shared_fact(seq, key, lambda: columns(own, seq.mask, None, cached))


def dense_mask(own: Places, keys: Tensor) -> Tensor:
    """True (B, 1, T, S) where a query of `own` (B, T) sees a key of number `keys` (B, S)."""
    key = keys[:, None, None]
    return (key >= own.low[:, None, :, None]) & (key <= own.number[:, None, :, None])


def block_mask(own: Places, keys: Tensor, batch: int) -> Any:
    """The same for FlexAttention, a `BlockMask`."""
    # Imported by those who ask for it: it takes a second.
    from torch.nn.attention.flex_attention import create_block_mask

    number, low = (t.expand(batch, -1).contiguous() for t in (own.number, own.low))
    keys = keys.expand(batch, -1).contiguous()

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (keys[b, key] >= low[b, query]) & (keys[b, key] <= number[b, query])

    return create_block_mask(
        sees, batch, None, number.shape[1], keys.shape[1], device=str(keys.device),
        _compile=keys.is_cuda,
    )  # fmt: skip


class Documents(NamedTuple):
    """Queries and keys of a batch laid out document by document, for kernels that take offsets.

    Attributes:
        queries: (N,) places in the flattened (B T) queries.
        keys: (M,) places in the flattened (B S) keys.
        query_offsets, key_offsets: (n + 1,) int32.
        most_queries, most_keys: of one document.
    """

    queries: Tensor
    keys: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    most_queries: int
    most_keys: int


def by_document(own: Places, keys: Tensor, batch: int) -> Documents:
    """The layout of queries `own` (B, T) and keys of numbers `keys` (B, S); the host waits for it.

    The last T keys are those of the queries, the ones before are cached.
    """
    number = own.number.expand(batch, -1)
    keys = keys.expand(batch, -1)
    length = number.shape[1]
    doc = torch.zeros_like(number) if own.doc is None else own.doc
    key_doc = torch.cat([doc.new_zeros(batch, keys.shape[1] - length), doc], dim=1)
    row = torch.arange(batch, device=number.device)[:, None] * length
    # In every row by number; pads last, where they are cut off.
    order = keys.sort(dim=1).indices
    real = keys.gather(1, order) < _PAD
    flat = order + torch.arange(batch, device=keys.device)[:, None] * keys.shape[1]
    offsets, most = [], []
    for name in ((doc + row)[number < _PAD], (key_doc.gather(1, order) + row)[real]):
        counts = torch.bincount(name, minlength=batch * length)
        offsets.append(torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int())
        most.append(int(counts.max()))
    queries = (number < _PAD).flatten().nonzero()[:, 0]
    return Documents(queries, flat[real], offsets[0], offsets[1], most[0], most[1])
