"""The prompt in pieces of one size, each a replay of the same captured pass.

A forward pass over a short prompt keeps the host busy for much longer than the GPU. The launches of
a piece are recorded once per batch size; a prompt of any length is then a few replays. The first
piece is filled up with pads on its left, which a mask on the device tells apart from tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.cache import RecurrentCache
from ssm_hf.generation.session import Session

# Tokens of a row in one piece: enough for a GPU to be busy with the weights it reads.
PIECE = 256
# Beyond these a pass as it is keeps the GPU busy, and the memory of a capture grows.
MOST_PIECES = 8
MOST_TOKENS = 4096  # of one piece, in all rows together


class Piece:
    """Input and output of the captured pass.

    Attributes:
        ids: (B, PIECE) int64.
        mask: (B, PIECE) bool, True at real tokens.
        last: (B, 1, D), what the head is given for each row's last real token so far.
    """

    def __init__(self, batch: int, last: Tensor) -> None:
        self.ids = torch.zeros(batch, PIECE, dtype=torch.long, device=last.device)
        self.mask = torch.zeros(batch, PIECE, dtype=torch.bool, device=last.device)
        self.last = last


def fits(batch: int, length: int) -> bool:
    """Whether prompts of (B, T) tokens are few pieces."""
    return length <= MOST_PIECES * PIECE and batch * PIECE <= MOST_TOKENS


def read_prompt(
    session: Session,
    cache: RecurrentCache,
    ids: Tensor,
    mask: Tensor | None,
    make_last: Callable[[], Tensor],
    read: Callable[[Piece, RecurrentCache], None],
) -> Tensor | None:
    """Read ids (B, T), mask (B, T) or None, into `cache`, whose layers all hold a state.

    Args:
        session: open session of the model.
        cache: continued, and counted on.
        ids: new tokens; see `fits`.
        mask: True at real tokens.
        make_last: memory for `Piece.last`.
        read: the pass over one piece; it must not wait for the device.

    Returns:
        `Piece.last`, (B, 1, D), to be used before the next call; None where the prompt must be read
        in another way: nothing has happened then.
    """
    batch, length = ids.shape
    pieces = -(-length // PIECE)
    capture = session.capture_for(cache)
    if capture is None or "prompt" in capture.refused:
        return None
    piece: Piece = capture.buffers("prompt", lambda: Piece(batch, make_last()))
    piece.last.zero_()
    if mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    pads = pieces * PIECE - length
    ids, mask = F.pad(ids, (pads, 0)), F.pad(mask, (pads, 0), value=False)

    def body() -> None:
        read(piece, capture.cache)

    for start in range(0, pieces * PIECE, PIECE):
        piece.ids.copy_(ids[:, start : start + PIECE])
        piece.mask.copy_(mask[:, start : start + PIECE])
        session.run_anyway(capture, "prompt", body)
    cache.seen_tokens += length
    return piece.last
