"""Tiles that the Triton kernels of Mamba-3's scan work on, formed from memory; see kernels.py."""

import triton
import triton.language as tl

from ssm_hf.ops.kernels_dtype import widened
from ssm_hf.ops.ssd.kernels import load_tile, store_tile

TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2^x; FAST flushes results below 2^-126 to 0, without the steps that save them."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + e^-x); FAST takes the GPU's own reciprocal, exact to two units in the last place.

    Triton's quotient takes a dozen instructions, in places a fifth of a kernel's.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def laid_out_alike(x, y, FAST: tl.constexpr):
    """x and y, fp32, both as Triton lays out y, a product, in registers.

    Whatever x comes from is then formed in that layout alone, not in another one besides.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $2; mov.b32 $1, $3;", "=f,=f,f,f", [x, y],
            dtype=(tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return x, y


@triton.jit
def fresh(x, FAST: tl.constexpr):
    """x, an int32 that a loop counts, as a number that LLVM knows nothing about.

    Addresses that it can foresee it keeps in registers from step to step, of which there are too
    few: steps that form them anew took a seventh less time.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return x


@triton.jit
def fresh_zero(x, FAST: tl.constexpr):
    """0, a multiple of 64, as a number that may be another one in each step; see `fresh`."""
    if FAST:
        zero = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
        return zero * 64
    else:
        return x * 0


@triton.jit
def load_token(at, Q: tl.constexpr, RANKS: tl.constexpr):
    """The four numbers of the token of each of a chunk's rows; see `mamba3_prepare_kernel`.

    One load, of more elements than there are threads: Triton repeats smaller ones for every layout.
    """
    e = tl.arange(0, 4 * Q * RANKS)
    if RANKS > 1:
        e = (e // (4 * RANKS)) * 4 + e % 4
    ac, bd = tl.split(tl.reshape(tl.load(at + e), (Q * RANKS, 2, 2)))
    a, c = tl.split(ac)
    b, d = tl.split(bd)
    return a, b, c, d


@triton.jit
def to_rows(value, RANKS: tl.constexpr):
    """Rows of tokens (Q, X), repeated for each rank: (ROWS, X)."""
    if RANKS == 1:
        return value
    else:
        Q: tl.constexpr = value.shape[0]
        X: tl.constexpr = value.shape[1]
        value = tl.broadcast_to(value[:, None, :], (Q, RANKS, X))
        return tl.reshape(value, (Q * RANKS, X))


@triton.jit
def for_tokens(value, Q: tl.constexpr):
    """Rows of ranks (RANKS, X), repeated for each token: (ROWS, X)."""
    if value.shape[0] == 1:
        return value
    else:
        RANKS: tl.constexpr = value.shape[0]
        X: tl.constexpr = value.shape[1]
        value = tl.broadcast_to(value[None, :, :], (Q, RANKS, X))
        return tl.reshape(value, (Q * RANKS, X))


@triton.jit
def rotation(at, i, RANKS: tl.constexpr, FAST: tl.constexpr, W: tl.constexpr):
    """Cosine and sine (ROWS, W) of the angles of rows i of a chunk and head; see
    `mamba3_angles_kernel`.
    """
    angle = tl.load(at + (i // RANKS)[:, None] * W + tl.arange(0, W)[None, :])
    if angle.dtype == tl.int16:
        angle = angle.to(tl.float32) * (TWO_PI / 65536)
    else:
        angle *= TWO_PI
    if FAST:
        # Not called pure, or Triton computes them once for each layout that they are needed in.
        cos, sin = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $2; sin.approx.ftz.f32 $1, $2;", "=&f,=f,f", [angle],
            dtype=(tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        cos, sin = tl.cos(angle), tl.sin(angle)
    return cos, sin


@triton.jit
def load_columns(
    base, bias_ptr, i, n, in_row, RAGGED: tl.constexpr, FAST: tl.constexpr, RANKS: tl.constexpr,
    WIDTH: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """One tile of B's or C's rows plus bias (a head's, (RANKS, PITCH)), in fp32."""
    value = widened(load_tile(base, PITCH, i, n, in_row, RAGGED, False, WIDTH), FAST)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + tl.arange(0, RANKS)[:, None] * PITCH + n[None, :])
        value += for_tokens(bias, value.shape[0] // RANKS)
    return value


@triton.jit
def load_pairs(
    base, bias_ptr, i, in_row, RAGGED: tl.constexpr, FAST: tl.constexpr, RANKS: tl.constexpr,
    W: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """Tiles a and b; see `load_columns`."""
    n = tl.arange(0, W)
    a = load_columns(base, bias_ptr, i, n, in_row, RAGGED, FAST, RANKS, W, PITCH)
    return a, load_columns(base, bias_ptr, i, n + W, in_row, RAGGED, FAST, RANKS, W, PITCH)


@triton.jit
def load_rotated(
    base, bias_ptr, cos, sin, i, in_row, TYPE: tl.constexpr, RAGGED: tl.constexpr,
    FAST: tl.constexpr, RANKS: tl.constexpr, ROPE: tl.constexpr, W: tl.constexpr,
    PITCH: tl.constexpr,
):  # fmt: skip
    """Tiles a and b, turned and rounded."""
    a, b = load_pairs(base, bias_ptr, i, in_row, RAGGED, FAST, RANKS, W, PITCH)
    if ROPE:
        return (a * cos - b * sin).to(TYPE), (a * sin + b * cos).to(TYPE)
    else:
        return a.to(TYPE), b.to(TYPE)


@triton.jit
def load_rest(
    base, bias_ptr, i, in_row, TYPE: tl.constexpr, RAGGED: tl.constexpr, FAST: tl.constexpr,
    RANKS: tl.constexpr,     W: tl.constexpr, V: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """Tile c, rounded."""
    n = 2 * W + tl.arange(0, V)
    return load_columns(base, bias_ptr, i, n, in_row, RAGGED, FAST, RANKS, V, PITCH).to(TYPE)


@triton.jit
def products(qa, qb, qc, ka, kb, kc, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T over all slots."""
    p = tl.dot(qa, tl.trans(ka.to(TYPE)), input_precision=PRECISION)
    p = tl.dot(qb, tl.trans(kb.to(TYPE)), p, input_precision=PRECISION)
    if qc is not None:
        p = tl.dot(qc, tl.trans(kc.to(TYPE)), p, input_precision=PRECISION)
    return p


@triton.jit
def load_factor(ptr, head, p, ranks, Q: tl.constexpr, RANKS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """mimo_x, mimo_z or mimo_o (H, R, P) of a head's rows (ROWS, BLOCK_P), 0 beyond the rank."""
    r = tl.arange(0, RANKS)
    at = ptr + (head * ranks + r)[:, None] * HEAD_DIM + p[None, :]
    inside = (r < ranks)[:, None] & (p < HEAD_DIM)[None, :]
    return for_tokens(tl.load(at, mask=inside, other=0.0).to(tl.float32), Q)


@triton.jit
def load_inputs(
    base, stride, factor_ptr, head, j, p, in_tokens, ranks, RAGGED: tl.constexpr,
    RANKS: tl.constexpr, CUT_P: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Rows of x of tokens j, times mimo_x where it is given."""
    x = to_rows(load_tile(base, stride, j, p, in_tokens, RAGGED, CUT_P, HEAD_DIM), RANKS)
    if factor_ptr is not None:
        x = x.to(tl.float32) * load_factor(factor_ptr, head, p, ranks, j.shape[0], RANKS, HEAD_DIM)
    return x


@triton.jit
def gates(
    z_base, z_st, mz_ptr, head, j, p, in_tokens, ranks, RAGGED: tl.constexpr,
    RANKS: tl.constexpr, CUT_P: tl.constexpr, HEAD_DIM: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Of rows of tokens j: z, z mimo_z and its sigmoid."""
    z = widened(load_tile(z_base, z_st, j, p, in_tokens, RAGGED, CUT_P, HEAD_DIM), FAST)
    z = to_rows(z, RANKS)
    u = z
    if mz_ptr is not None:
        u = z * load_factor(mz_ptr, head, p, ranks, j.shape[0], RANKS, HEAD_DIM)
    return z, u, sigmoid(u, FAST)


@triton.jit
def load_gradients(
    base, dy_st, dy_sr, z_base, z_st, mz_ptr, mo_ptr, head, j, p, is_real, ranks,
    RAGGED: tl.constexpr, RANKS: tl.constexpr, PER_RANK: tl.constexpr, CUT_P: tl.constexpr,
    HEAD_DIM: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of rows of y before gate and mimo_o, of tokens j. `is_real`, of tokens, is read
    where RAGGED says so.
    """
    Q: tl.constexpr = j.shape[0]
    if PER_RANK:
        i = tl.arange(0, Q * RANKS)
        real = to_rows(is_real[:, None], RANKS) & ((i % RANKS < ranks)[:, None])
        at = base + (i // RANKS)[:, None] * dy_st + (i % RANKS)[:, None] * dy_sr + p[None, :]
        dy = tl.load(at, mask=real & (p < HEAD_DIM)[None, :], other=0.0)
    else:
        dy = to_rows(load_tile(base, dy_st, j, p, is_real, RAGGED, CUT_P, HEAD_DIM), RANKS)
        if z_base is not None:
            _z, u, sigmoid = gates(
                z_base, z_st, mz_ptr, head, j, p, is_real, ranks, RAGGED, RANKS, CUT_P, HEAD_DIM,
                FAST,
            )  # fmt: skip
            dy = widened(dy, FAST) * (u * sigmoid)
        if mo_ptr is not None:
            dy = dy.to(tl.float32) * load_factor(mo_ptr, head, p, ranks, Q, RANKS, HEAD_DIM)
    return dy


@triton.jit
def store_state(
    to, p, p_in, a, b, c, CUT_P: tl.constexpr, W: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """Store a head's state (P, PITCH)."""
    PITCH: tl.constexpr = 2 * W + V
    n = tl.arange(0, W)
    store_tile(to, PITCH, p, n, p_in, a, CUT_P, False, W)
    store_tile(to + W, PITCH, p, n, p_in, b, CUT_P, False, W)
    if V > 0:
        store_tile(to + 2 * W, PITCH, p, tl.arange(0, V), p_in, c, CUT_P, False, V)
