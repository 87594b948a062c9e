"""What the backward kernels of Mamba-3's scan share."""

import triton
import triton.language as tl

from ssm_hf.ops.ssd.kernels import load_tile


@triton.jit
def prefetch(pointers, wanted):
    """Have 128 bytes at each pointer brought from memory into L2, of 16-bit numbers 64 at a time.

    A program's loads wait for one another, with too few programs at work to hide that.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $2, 0;
        @p prefetch.global.L2 [$1];
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [pointers.to(tl.int64), wanted.to(tl.int32)], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def prefetch_tokens(
    ptr, batch, head, token, end, sb, st, sh, wanted, HEAD_DIM: tl.constexpr, Q: tl.constexpr
):
    """A chunk's rows of a head of x, dy or z."""
    if ptr is not None:
        j = tl.arange(0, Q)
        at = ptr + batch * sb + head * sh + token * st + j * st
        for n in tl.static_range(0, HEAD_DIM, 64):
            prefetch(at + n, wanted & (token + j < end))


@triton.jit
def prefetch_state(
    ptr, here, wanted, FIRST: tl.constexpr, LAST: tl.constexpr, HEAD_DIM: tl.constexpr,
    PITCH: tl.constexpr, BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Columns from FIRST to LAST of a head's state."""
    for p_block in tl.static_range(P_BLOCKS):
        p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
        for n in tl.static_range(FIRST, LAST, 64):
            at = ptr + here * (HEAD_DIM * PITCH) + p * PITCH + n
            prefetch(at, wanted & (p < HEAD_DIM))


@triton.jit
def of_tokens(value, Q: tl.constexpr, RANKS: tl.constexpr):
    """Sums (Q,) over the ranks of (ROWS,)."""
    if RANKS == 1:
        return value
    else:
        return tl.sum(tl.reshape(value, (Q, RANKS)), axis=1)


@triton.jit
def store_ranks(
    to, stride, value, n, n_in, ranks, Q: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums over a chunk's tokens of (ROWS, COLUMNS), a row for each rank, at to + r stride + n."""
    if RANKS == 1:
        tl.store(to + n, tl.sum(value, axis=0), mask=n_in)
    else:
        r = tl.arange(0, RANKS)
        total = tl.sum(tl.reshape(value, (Q, RANKS, COLUMNS)), axis=0)
        inside = (r < ranks)[:, None] & n_in[None, :]
        tl.store(to + r[:, None] * stride + n[None, :], total, mask=inside)


@triton.jit
def load_state(
    at, p, rows, TYPE: tl.constexpr, CUT_P: tl.constexpr, WIDTH: tl.constexpr, PITCH: tl.constexpr
):
    """One tile of a head's state or its gradient, channels p."""
    return load_tile(at, PITCH, p, tl.arange(0, WIDTH), rows, CUT_P, False, WIDTH).to(TYPE)


@triton.jit
def turning(a, b, d_a, d_b):
    """Gradients of the angles by which a and b are turned, from their gradients d_a and d_b."""
    return a.to(tl.float32) * d_b - b.to(tl.float32) * d_a


@triton.jit
def turned_back(d1, d2, cos, sin, ROPE: tl.constexpr):
    """Gradients before the rotation."""
    if ROPE:
        return d1 * cos + d2 * sin, d2 * cos - d1 * sin
    else:
        return d1, d2
