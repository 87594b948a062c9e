"""What the backward kernels of Mamba-3's scan share."""

import triton
import triton.language as tl

from ssm_hf.ops.mamba3_scan.kernels_tiles import (
    load_gradients,
    load_inputs,
    load_pairs,
    load_rest,
    rotation,
)
from ssm_hf.ops.ssd.kernels import load_tile, place_of_chunk


@triton.jit
def place_of_program(
    pid, rows, length, heads: tl.constexpr, cu_ptr, first_ptr, row_ptr, VARLEN: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    """Program pid, of a chunk and head -> head; batch row, first token, end of the row; place of
    both in tensors (chunks, H, ...), int64.
    """
    head = pid % heads
    v = pid // heads
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    here = v.to(tl.int64) * heads + head
    return head, batch, token, end, here


@triton.jit
def masks_of_chunk(batch, token, end, of_token, j, mask_ptr, mask_sb, mask_st):
    """Which rows of a chunk, of tokens of_token (ROWS,), and which of its tokens j (Q,) lie before
    `end`, and which of these tokens are not padding. of_token and j count from `token`, its first.
    """
    in_row = token + of_token < end
    in_tokens = token + j < end
    is_real = in_tokens
    if mask_ptr is not None:
        at_mask = mask_ptr + batch * mask_sb + (token + j) * mask_st
        is_real = in_tokens & (tl.load(at_mask, mask=in_tokens, other=0) != 0)
    return in_row, in_tokens, is_real


@triton.jit
def at_head(ptr, batch, head, token, sb, sh, st):
    """Where the channels of a head and token begin in x, dy or z, by its strides of batch rows,
    heads and tokens; None if there is no such tensor.
    """
    if ptr is not None:
        return ptr + batch * sb + head * sh + token * st


@triton.jit
def load_x_and_dy(
    at_x, x_st, mx_ptr, at_dy, dy_st, dy_sr, at_z, z_st, mz_ptr, mo_ptr, head, j, p, in_tokens,
    is_real, ranks, TYPE: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr,
    PER_RANK: tl.constexpr, RANKS: tl.constexpr, CUT_P: tl.constexpr, HEAD_DIM: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Inputs and gradients of y (ROWS, BLOCK_P each) of tokens j and channels p, rounded; see
    `load_inputs` and `load_gradients`.
    """
    x = load_inputs(at_x, x_st, mx_ptr, head, j, p, in_tokens, ranks, RAGGED, RANKS, CUT_P,
                    HEAD_DIM)  # fmt: skip
    x = x.to(TYPE)
    dy = load_gradients(at_dy, dy_st, dy_sr, at_z, z_st, mz_ptr, mo_ptr, head, j, p, is_real, ranks,
                        MASKED, RANKS, PER_RANK, CUT_P, HEAD_DIM, FAST)  # fmt: skip
    return x, dy.to(TYPE)


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
    """Have brought into L2 a chunk's rows (Q, P) of a head of x, dy or z, of 16 bits each."""
    if ptr is not None:
        j = tl.arange(0, Q)
        at = at_head(ptr, batch, head, token, sb, sh, st) + j * st
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
    """Have brought into L2 what program pid, if there is one, reads of its own chunk and head:
    token (Q, 4) in fp32, angle (Q, W) and rows (Q, P) of x, z and dy, in 16 bits.
    """
    if pid < tl.num_programs(0):
        head, batch, token, end, here = place_of_program(
            pid, rows, length, heads, cu_ptr, first_ptr, row_ptr, VARLEN, Q
        )
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
    """Channels p of one tile (BLOCK_P, WIDTH) of a head's state (P, PITCH) or its gradient."""
    return load_tile(at, PITCH, p, tl.arange(0, WIDTH), rows, CUT_P, False, WIDTH).to(TYPE)


@triton.jit
def turning(a, b, d_a, d_b):
    """Gradients of the angles by which tiles a and b are turned, from the tiles' gradients d_a and
    d_b; all of one shape, a row for each row or channel, W columns.
    """
    return a.to(tl.float32) * d_b - b.to(tl.float32) * d_a


@triton.jit
def turned_back(d1, d2, cos, sin, ROPE: tl.constexpr):
    """Gradients (ROWS, W) of tiles a and b before the rotation, from those after it."""
    if ROPE:
        return d1 * cos + d2 * sin, d2 * cos - d1 * sin
    else:
        return d1, d2


@triton.jit
def turned(a, b, cos, sin, TYPE: tl.constexpr, ROPE: tl.constexpr):
    """Tiles a and b (ROWS, W), turned and rounded."""
    if ROPE:
        return (a * cos - b * sin).to(TYPE), (a * sin + b * cos).to(TYPE)
    else:
        return a.to(TYPE), b.to(TYPE)


@triton.jit
def at_group(
    batch, head, token, length, heads: tl.constexpr, groups, RANKS: tl.constexpr,
    PITCH: tl.constexpr,
):  # fmt: skip
    """Where in B and C (B, G, T, RANKS, PITCH) a token of a head's group begins."""
    group = head // (heads // groups)
    return ((batch * groups + group) * length + token) * (RANKS * PITCH)


@triton.jit
def at_bias(ptr, head, RANKS: tl.constexpr, PITCH: tl.constexpr):
    """Where a head's bias of B or C (H, RANKS, PITCH) begins; None if there is none."""
    if ptr is not None:
        return ptr + head * (RANKS * PITCH)


@triton.jit
def operands(
    B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, angle_ptr, at_rows, here, head, i, in_row,
    TYPE: tl.constexpr, RAGGED: tl.constexpr, ROPE: tl.constexpr, FAST: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Cosine and sine (ROWS, W) of the angles of a chunk and head, numbers 1 and 0 without ROPE;
    tiles a and b (ROWS, W) of its keys and of its queries, turned and rounded.

    at_rows: where the chunk's rows begin in B and C, see `at_group`; here: see `place_of_program`.
    Tile c is not among them, see `rest_of`: Triton 3.6 hands no None on in a tuple.
    """
    PITCH: tl.constexpr = 2 * W + V
    B_bias = at_bias(B_bias_ptr, head, RANKS, PITCH)
    C_bias = at_bias(C_bias_ptr, head, RANKS, PITCH)
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
    """Tile c (ROWS, V) of a chunk's keys (of B) or queries (of C), which does not turn, rounded;
    None where V is 0. at_rows: as in `operands`.
    """
    PITCH: tl.constexpr = 2 * W + V
    if V > 0:
        bias = at_bias(bias_ptr, head, RANKS, PITCH)
        return load_rest(ptr + at_rows, bias, i, in_row, TYPE, RAGGED, FAST, RANKS, W, V, PITCH)
