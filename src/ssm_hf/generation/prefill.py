"""The prompt in pieces of fixed sizes, each a replay of the same captured pass.

A forward pass over a short prompt keeps the host busy for much longer than the GPU. The launches of
a piece are recorded once per batch size; a prompt of any length is then a few replays. What does
not fill a piece comes first, behind pads that a mask on the device tells apart from tokens.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.cache import RecurrentCache
from ssm_hf.generation.session import Session

# Tokens of a row in one piece. A small one costs little more than the launches; in a large one the
# GPU is busy with the weights it reads.
SMALL, LARGE = 64, 512
# Beyond these a pass as it is keeps the GPU busy, and the memory of a capture grows.
MOST_PIECES = 4
# Of one piece's residual stream, tokens of all rows times width: its memory stays.
MOST_NUMBERS = 32768 * 768
# More pads than these in all rows together cost more than another small piece.
_MOST_PADS = 4096


class Piece:
    """Input and output of a captured pass.

    Attributes:
        ids: (B, size) int64.
        mask: (B, size) bool, True at real tokens; None where all are.
        last: (B, 1, D), what the head is given for each row's last real token so far.
    """

    def __init__(self, ids: Tensor, mask: Tensor | None, last: Tensor) -> None:
        self.ids = torch.zeros_like(ids)
        self.mask = None if mask is None else torch.zeros_like(mask)
        self.last = last

    def fill(self, ids: Tensor, mask: Tensor | None) -> None:
        """The next tokens to read."""
        self.ids.copy_(ids)
        if self.mask is not None and mask is not None:
            self.mask.copy_(mask)


def cut(batch: int, length: int, width: int) -> list[int] | None:
    """Sizes of the pieces of a prompt, together at least its length; None where it is too long."""
    large, most = LARGE, MOST_NUMBERS // width
    while large > SMALL and batch * large > most:
        large //= 2
    rest = length % large
    small = -(-rest // SMALL)
    if small <= 1 or batch * (large - small * SMALL) > _MOST_PADS:
        first = [SMALL] * small
    else:
        first = [large]
    sizes = first + [large] * (length // large)
    return sizes if batch * large <= most and len(sizes) <= MOST_PIECES else None


def read_prompt(
    session: Session,
    cache: RecurrentCache,
    ids: Tensor,
    mask: Tensor | None,
    width: int,
    make_last: Callable[[], Tensor],
    read: Callable[[Piece, RecurrentCache], None],
    first: bool = False,
) -> Tensor | None:
    """Read ids (B, T), mask (B, T) or None, into `cache`, whose layers all hold a state.

    Args:
        session: open session of the model.
        cache: continued, and counted on.
        ids: new tokens, of which `cut` knows the pieces.
        mask: True at real tokens.
        width: of the residual stream.
        make_last: memory for `Piece.last`.
        read: the pass over one piece; it must not wait for the device.
        first: nothing stands before the prompt; the states in `cache` are not filled in yet.

    Returns:
        `Piece.last`, (B, 1, D), to be used before the next call; None where the prompt must be read
        in another way: nothing has happened then, but that states are filled in.
    """
    batch, length = ids.shape
    sizes = cut(batch, length, width)
    capture = session.capture_for(cache, length, zeros=first)
    if sizes is None or capture is None or capture.refused:
        if first and capture is None:
            cache.zero_()
        return None
    last: Tensor = capture.buffers("last", make_last)
    last.zero_()
    pads, real = sum(sizes) - length, mask
    if pads:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        ids, real = F.pad(ids, (pads, 0)), F.pad(real, (pads, 0), value=False)
    start = 0
    for size in sizes:
        span = slice(start, start + size)
        part, part_real = ids[:, span], None
        if real is not None and (mask is not None or start < pads):
            part_real = real[:, span]
        key = ("prompt", size, part_real is None)
        piece: Piece = capture.buffers(key, functools.partial(Piece, part, part_real, last))
        piece.fill(part, part_real)
        session.run_anyway(capture, key, functools.partial(read, piece, capture.cache))
        start += size
    cache.seen_tokens += length
    return last
