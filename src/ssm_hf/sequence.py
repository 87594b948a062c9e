"""Facts about one batch: which tokens are real, and which belong to one document.

`SequenceInfo.from_inputs` is the only place that reads `attention_mask`, `position_ids`, `seq_idx`,
`cu_seqlens` and the spellings that trainers use for them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssm_hf.ops.causal_conv1d import real_first
from ssm_hf.ops.packing import (
    check_cu_seqlens,
    check_later,
    document_numbers,
    host_may_read,
    previous_real,
)


class SequenceInfo(NamedTuple):
    """What mixers need to know beside the hidden states; a field is None where it says nothing.

    Where the host may not read values (training on a GPU, tracing), a mask of ones and the numbers
    of a single document stay: they change no result, and cost less than waiting would.

    Attributes:
        mask: (B, T) bool, True at real tokens; None when there is no padding.
        seq_idx: (B, T) int64 document number within the row; None when each row is one document.
        position_ids: (B, T) positions as given by the caller, for layers that rotate by them.
        real_first: of the mask, what layers would otherwise find out each by itself; see
            `ssm_hf.ops.causal_conv1d.real_first`.
        derived: what layers have found out from the fields above, for the layers after them; None
            = nothing is shared.
    """

    mask: Tensor | None = None
    seq_idx: Tensor | None = None
    position_ids: Tensor | None = None
    real_first: tuple[Tensor, Tensor] | None = None
    derived: dict[Any, Any] | None = None

    @classmethod
    def from_inputs(
        cls,
        batch: int,
        length: int,
        *,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | Tensor | None = None,
        max_length_k: int | Tensor | None = None,
        past_length: int = 0,
    ) -> "SequenceInfo":
        """Read every spelling of padding and packing, and hold those given to one another.

        Args:
            batch: B.
            length: T, the new tokens of this call.
            attention_mask: (B, T), or (B, past_length + T) as `generate` passes it; 1 = real token.
                A dict of ready-made masks is searched for a two-dimensional one.
            position_ids: (B, T) or (1, T). A real token starts a document exactly when its position
                is not larger than that of the real token before it; the first real token of the
                call starts none: it continues the cache.
            seq_idx: (B, T) integers; a change starts a document, a negative number is padding.
            cu_seqlens: (n+1,) document offsets into one row.
            cu_seq_lens_q: the same under another name.
            cu_seq_lens_k: the same under another name.
            max_length_q: length of the longest document, only held against the offsets.
            max_length_k: the same.
            past_length: tokens that the cache has seen.

        Raises:
            ValueError: a shape is wrong, or two descriptions of the packing disagree.
        """
        if length < 1:
            raise ValueError(f"the sequence is empty: expected T >= 1, got T={length}")
        if isinstance(attention_mask, dict):
            masks = [m for m in attention_mask.values() if m is not None and m.ndim == 2]
            attention_mask = masks[0] if masks else None
        mask = _padding_mask(attention_mask, batch, length, past_length)

        if position_ids is not None:
            if position_ids.ndim != 2 or position_ids.shape not in ((batch, length), (1, length)):
                raise ValueError(
                    f"position_ids must have shape {(batch, length)} or {(1, length)}, "
                    f"got {tuple(position_ids.shape)}"
                )
            position_ids = position_ids.expand(batch, length)
        if seq_idx is not None:
            if seq_idx.shape != (batch, length) or seq_idx.is_floating_point():
                raise ValueError(
                    f"seq_idx must be an integer tensor of shape {(batch, length)}, "
                    f"got {seq_idx.dtype} of shape {tuple(seq_idx.shape)}"
                )
            mask = _unless_full(seq_idx >= 0 if mask is None else mask & (seq_idx >= 0))
        offsets = _offsets(
            cu_seqlens, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, batch, length
        )

        documents: dict[str, Tensor] = {}
        if length > 1:
            if position_ids is not None:
                documents["position_ids"] = _restarts(position_ids, mask).cumsum(dim=1)
            if seq_idx is not None:
                documents["seq_idx"] = document_numbers(seq_idx, mask)
            if offsets is not None:
                token = torch.arange(length, device=offsets.device)
                number = torch.searchsorted(offsets[1:].contiguous(), token, right=True)[None]
                documents["cu_seqlens"] = document_numbers(number, mask)
        order = None if mask is None else real_first(mask)
        return cls(mask, _agreed(documents), position_ids, order, {})


def check_ids(ids: Tensor, name: str, size: int, ignored: int | None = None) -> None:
    """Raise `ValueError` unless token numbers lie in [0, size) or are `ignored`.

    On a GPU the program is stopped instead, without making the host wait.
    """
    if torch.compiler.is_compiling() or ids.numel() == 0:
        return
    wrong = (ids < 0) | (ids >= size)
    if ignored is not None:
        wrong &= ids != ignored
    if ids.device.type == "cpu":
        if bool(wrong.any()):
            raise ValueError(
                f"{name} must lie in [0, {size}), the vocabulary, got {int(ids[wrong][0])}"
            )
    else:
        check_later(~wrong.any(), f"{name} must lie in [0, {size}), the vocabulary")


def _padding_mask(
    attention_mask: Tensor | None, batch: int, length: int, past_length: int
) -> Tensor | None:
    if attention_mask is None:
        return None
    widths = (length, past_length + length)
    shape = tuple(attention_mask.shape)
    if shape not in [(batch, width) for width in widths]:
        raise ValueError(
            f"attention_mask must have shape {(batch, length)}"
            + (f" or {(batch, past_length + length)}, cache included" if past_length else "")
            + f", got {shape}"
        )
    return _unless_full(attention_mask[:, -length:].bool())


def _unless_full(mask: Tensor) -> Tensor | None:
    return None if host_may_read(mask) and bool(mask.all()) else mask


def _restarts(position_ids: Tensor, mask: Tensor | None) -> Tensor:
    """True (B, T) at real tokens whose position does not exceed that of the real token before."""
    if mask is None:
        restarts = position_ids[:, 1:] <= position_ids[:, :-1]
        return torch.nn.functional.pad(restarts, (1, 0))
    previous = previous_real(mask)
    before = position_ids.gather(1, previous.clamp(min=0))
    return mask & (previous >= 0) & (position_ids <= before)


def _offsets(
    cu_seqlens: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | Tensor | None,
    max_length_k: int | Tensor | None,
    batch: int,
    length: int,
) -> Tensor | None:
    """The document offsets under whichever names they came, checked against one another."""
    given = {
        name: value
        for name, value in (
            ("cu_seqlens", cu_seqlens),
            ("cu_seq_lens_q", cu_seq_lens_q),
            ("cu_seq_lens_k", cu_seq_lens_k),
        )
        if value is not None
    }
    longest = {
        name: value
        for name, value in (("max_length_q", max_length_q), ("max_length_k", max_length_k))
        if value is not None
    }
    if not given:
        for name, value in longest.items():
            if _fails(value >= length, f"{name} is given without offsets"):
                raise ValueError(
                    f"{name}={int(value)} says that rows of {length} tokens hold several "
                    "documents, but no cu_seqlens, cu_seq_lens_q or cu_seq_lens_k says where they "
                    "start"
                )
        return None
    (first, offsets), *others = given.items()
    for name, other in others:
        what = f"{name} and {first} disagree"
        if other.shape != offsets.shape or _fails((other == offsets).all(), what):
            raise ValueError(f"{what}: {other} != {offsets}")
    check_cu_seqlens(offsets, batch, length)
    for name, value in longest.items():
        actual = offsets.diff().max()
        if _fails(actual <= value, f"{name} is less than the longest document of {first}"):
            raise ValueError(
                f"{name}={int(value)}, but {first} holds a document of {int(actual)} tokens"
            )
    return offsets


def _agreed(documents: dict[str, Tensor]) -> Tensor | None:
    """The document numbers all descriptions share; None when every row is a single document."""
    if not documents:
        return None
    (first, doc), *others = documents.items()
    for name, other in others:
        what = f"{first} and {name} disagree about document boundaries"
        if _fails((doc == other).all(), what):
            row, token = (int(i) for i in (doc != other).nonzero()[0])
            raise ValueError(
                f"{what}: row {row}, token {token} lies in document {int(doc[row, token])} by "
                f"{first}, {int(other[row, token])} by {name}"
            )
    return None if host_may_read(doc) and not bool((doc[:, -1] > 0).any()) else doc


def _fails(holds: Tensor | bool, what: str) -> bool:
    """Whether a condition is seen not to hold; where the host may not look, the device will."""
    if isinstance(holds, bool):
        return not holds
    if host_may_read(holds):
        return not bool(holds)
    check_later(holds, what)
    return False
