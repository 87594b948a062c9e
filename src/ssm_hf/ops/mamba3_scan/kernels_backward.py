"""What the backward kernels of Mamba-3's scan share."""

import triton
import triton.language as tl

from ssm_hf.ops.mamba3_scan.kernels_tiles import load_pairs, load_rest, rotation
from ssm_hf.ops.ssd.kernels import load_tile, place_of_chunk


@triton.jit
def prefetch(pointers, wanted):
    """Have the 128 bytes at each pointer, 64 numbers of 16 bits, brought from memory into L2."""
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
def prefetch_dense(pointer, BYTES: tl.constexpr, wanted):
    """BYTES bytes from a pointer on, by one instruction (from compute capability 9 on)."""
    i = tl.arange(0, 128)
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $2, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], $3;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [pointer.to(tl.int64) + i * 0, (wanted & (i == 0)).to(tl.int32),
         tl.full((), BYTES, tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def fetch(
    x_ptr, z_ptr, dy_ptr, angle_ptr, token_ptr, pid, x_sb, x_st, x_sh, z_sb, z_st, z_sh,
    dy_sb, dy_st, dy_sh, rows, length, heads: tl.constexpr, cu_ptr, first_ptr, row_ptr,
    VARLEN: tl.constexpr, HEAD_DIM: tl.constexpr, Q: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Have brought into L2 what program pid, if there is one, reads of its own chunk and head, in
    16 bits.
    """
    if pid < tl.num_programs(0):
        head = pid % heads
        v = pid // heads
        batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
        here = v.to(tl.int64) * heads + head
        prefetch_dense(token_ptr + here * (4 * Q), 16 * Q, token < end)
        if angle_ptr is not None:
            prefetch_dense(angle_ptr + here * (Q * W), 2 * Q * W, token < end)
        prefetch_tokens(x_ptr, batch, head, token, end, x_sb, x_st, x_sh, True, HEAD_DIM, Q)
        prefetch_tokens(z_ptr, batch, head, token, end, z_sb, z_st, z_sh, True, HEAD_DIM, Q)
        prefetch_tokens(dy_ptr, batch, head, token, end, dy_sb, dy_st, dy_sh, True, HEAD_DIM, Q)


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


@triton.jit
def turned(a, b, cos, sin, TYPE: tl.constexpr, ROPE: tl.constexpr):
    """Tiles a and b, turned and rounded."""
    if ROPE:
        return (a * cos - b * sin).to(TYPE), (a * sin + b * cos).to(TYPE)
    else:
        return a.to(TYPE), b.to(TYPE)


@triton.jit
def operands(
    B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, angle_ptr, at_rows, here, head, i, in_row,
    TYPE: tl.constexpr, RAGGED: tl.constexpr, ROPE: tl.constexpr, FAST: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Cosine and sine, tiles a and b of keys and queries of a chunk and head."""
    PITCH: tl.constexpr = 2 * W + V
    B_bias, C_bias = B_bias_ptr, C_bias_ptr
    if B_bias_ptr is not None:
        B_bias = B_bias_ptr + head * (RANKS * PITCH)
    if C_bias_ptr is not None:
        C_bias = C_bias_ptr + head * (RANKS * PITCH)
    ka, kb = load_pairs(B_ptr + at_rows, B_bias, i, in_row, RAGGED, FAST, RANKS, W, PITCH)
    qa, qb = load_pairs(C_ptr + at_rows, C_bias, i, in_row, RAGGED, FAST, RANKS, W, PITCH)
    cos, sin = 1.0, 0.0
    if ROPE:
        cos, sin = rotation(angle_ptr + here * (Q * W), i, RANKS, FAST, W)
    ka, kb = turned(ka, kb, cos, sin, TYPE, ROPE)
    qa, qb = turned(qa, qb, cos, sin, TYPE, ROPE)
    return cos, sin, ka, kb, qa, qb


@triton.jit
def rest_of(
    ptr, bias_ptr, at_rows, head, i, in_row, TYPE: tl.constexpr, RAGGED: tl.constexpr,
    FAST: tl.constexpr, RANKS: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Tile c of keys or of queries."""
    PITCH: tl.constexpr = 2 * W + V
    bias = bias_ptr
    if bias_ptr is not None:
        bias = bias_ptr + head * (RANKS * PITCH)
    return load_rest(ptr + at_rows, bias, i, in_row, TYPE, RAGGED, FAST, RANKS, W, V, PITCH)
