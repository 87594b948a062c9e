"""Triton kernels of Mamba-3's scan: preparation of tokens, angles, states of chunks, forward pass.

With b_t = (1 - lambda_t) Δ_t and s_t = lambda_t Δ_t + b of the next token, Mamba-3 is Mamba-2's
scan of inputs s_t x_t, but that a token reaches itself with gamma_t = lambda_t Δ_t in place of s_t.
What b, padding and the bounds of documents come to is worked out once, by `mamba3_prepare_kernel`;
the other kernels see numbers of tokens.

A chunk has Q tokens and ROWS = Q * RANKS rows (t, r), rank by rank inside a token; RANKS is the
MIMO rank rounded up to a power of two, rows beyond the rank are zero. Queries and keys lie in two
tiles, the two halves of every rotated pair, of W columns each. They are rotated in registers.
Angles are counted in turns, from the start of the row: documents do not reset them, since only
differences within a document matter.

Chunks of all rows are numbered through by v. Rows are batch rows, or with `cu_seqlens` (VARLEN)
documents: row r then has tokens cu[r]..cu[r + 1] of one long row, and chunks first[r]..first[r+1].
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from ssm_hf.ops.ssd.kernels import load_tile, place_of_chunk, place_of_row, softplus, store_tile

LOG2E = tl.constexpr(1.4426950408889634)
# 2^-256 is 0 in fp32: a stronger decay, or the start of a document, is an exponent of -256.
LOWEST = tl.constexpr(-256.0)
# Running sums of exponents are kept as multiples of 1/512, which add and subtract exactly in fp32
# (64 tokens of at most 256), and a remainder below 1/8.
GRID = tl.constexpr(512.0)
TWO_PI = tl.constexpr(6.283185307179586)
# Adding and subtracting it rounds an fp32 number below 2^22 to the nearest integer.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def tanh(x):
    """Hyperbolic tangent to fp32 accuracy relative to 1."""
    u = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - u) / (1.0 + u)
    return tl.where(x < 0, -y, y)


@triton.jit
def sizes(
    dt_ptr, trap_ptr, bias_ptr, batch, t, t_in, h, h_in, dt_sb, dt_st, dt_sh,
    trap_sb, trap_st, trap_sh, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Of tokens t and heads h: dt + bias, Δ and lambda."""
    inside = t_in[:, None] & h_in[None, :]
    at = batch * dt_sb + t[:, None] * dt_st + h[None, :] * dt_sh
    raw = tl.load(dt_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + h, mask=h_in, other=0.0).to(tl.float32)[None, :]
    delta = raw
    if SOFTPLUS:
        delta = softplus(delta)
    share = tl.full(raw.shape, 1.0, tl.float32)
    if trap_ptr is not None:
        at = batch * trap_sb + t[:, None] * trap_st + h[None, :] * trap_sh
        logit = tl.load(trap_ptr + at, mask=inside, other=0.0).to(tl.float32)
        share = 1.0 / (1.0 + tl.exp(-logit))
    return raw, delta, share


@triton.jit
def exponents(
    A_ptr, doc_ptr, delta, batch, t, t_in, h, h_in, A_sb, A_st, A_sh, doc_sb, doc_st,
):  # fmt: skip
    """A and the exponent of a token's decay in powers of 2, LOWEST where a document starts."""
    at = batch * A_sb + t[:, None] * A_st + h[None, :] * A_sh
    A = tl.load(A_ptr + at, mask=t_in[:, None] & h_in[None, :], other=0.0).to(tl.float32)
    exponent = tl.maximum(delta * (A * LOG2E), LOWEST)
    if doc_ptr is not None:
        behind = t_in & (t > 0)
        at_doc = batch * doc_sb + t * doc_st
        doc = tl.load(doc_ptr + at_doc, mask=behind, other=0)
        before = tl.load(doc_ptr + at_doc - doc_st, mask=behind, other=0)
        exponent = tl.where((doc != before)[:, None], LOWEST, exponent)
    return A, exponent


@triton.jit
def column_of_slot(j, i, states, angles, PAIRWISE: tl.constexpr):
    """Column of the caller's B and C that lies at place i of half j; beyond `states` for none."""
    half = (states + 1) // 2
    column = j * half + i
    if PAIRWISE:
        rest = 2 * angles + j * (half - angles) + i - angles
        column = tl.where(i < angles, 2 * i + j, rest)
    return tl.where(i < half, column, states)


@triton.jit
def arrange(
    from_ptr, to_ptr, batch, token, end, g, from_sb, from_st, from_sr, from_sg, length, groups,
    states, angles, ranks, PAIRWISE: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Rows of B or C (B, T, R, G, N) of one chunk and group -> (B, G, T, RANKS, 2 W)."""
    row = tl.arange(0, ROWS)
    t, r = token + row // RANKS, row % RANKS
    i = tl.arange(0, W)
    in_row = t < end
    at_row = batch * from_sb + t * from_st + r * from_sr + g * from_sg
    to_row = (((batch * groups + g) * length + token) * RANKS + row) * (2 * W)
    for j in tl.static_range(2):
        column = column_of_slot(j, i, states, angles, PAIRWISE)
        inside = (in_row & (r < ranks))[:, None] & (column < states)[None, :]
        value = tl.load(from_ptr + at_row[:, None] + column[None, :], mask=inside, other=0.0)
        to = to_ptr + to_row[:, None] + (j * W + i)[None, :]
        tl.store(to, value.to(to_ptr.dtype.element_ty), mask=in_row[:, None])


@triton.jit
def mamba3_prepare_kernel(
    dt_ptr, A_ptr, trap_ptr, bias_ptr, B_ptr, C_ptr, angle_ptr, mask_ptr, next_ptr, doc_ptr,
    last_ptr, cu_ptr, first_ptr, row_ptr,
    token_ptr, scale_ptr, turns_ptr, sums_ptr, before_ptr, B_to_ptr, C_to_ptr,
    dt_sb, dt_st, dt_sh, A_sb, A_st, A_sh, trap_sb, trap_st, trap_sh,
    B_sb, B_st, B_sr, B_sg, C_sb, C_st, C_sr, C_sg, angle_sb, angle_st,
    mask_sb, mask_st, next_sb, next_st, doc_sb, doc_st,
    rows, length, heads, groups, states, angles, ranks,
    SOFTPLUS: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PAIRWISE: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr, W: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Numbers of tokens and the sums of their turns over a chunk.

    token (chunks, H, Q, 4): running sum a of exponents inside the chunk, a - log2(s), gamma and Δ;
    with WIDE a in two parts, gamma and Δ, and s in scale (chunks, H, Q). sums (chunks, H, W): turns
    of a chunk; before: of its tokens before last (rows,), where the row's last document starts.
    One program for a chunk and a block of heads; those of the first block also write
    tanh(angles) / 2, turns (B, T, W), and B and C as the other kernels read them.
    """
    blocks = tl.cdiv(heads, BLOCK_H)
    v = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    h_in = h < heads
    i = tl.arange(0, Q)
    t = token + i
    t_in = t < end
    _raw, delta, share = sizes(
        dt_ptr, trap_ptr, bias_ptr, batch, t, t_in, h, h_in, dt_sb, dt_st, dt_sh,
        trap_sb, trap_st, trap_sh, SOFTPLUS,
    )  # fmt: skip
    real = t_in
    following = t + 1
    if mask_ptr is not None:
        real = real & (tl.load(mask_ptr + batch * mask_sb + t * mask_st, mask=t_in, other=0) != 0)
        following = tl.load(next_ptr + batch * next_sb + t * next_st, mask=t_in, other=0)
    delta = tl.where(real[:, None] & h_in[None, :], delta, 0.0)
    _A, exponent = exponents(
        A_ptr, doc_ptr, delta, batch, t, t_in, h, h_in, A_sb, A_st, A_sh, doc_sb, doc_st
    )
    gamma = share * delta
    scale = gamma
    if trap_ptr is not None:
        # What the next token of the document adds once more of this one's input.
        follows = real & (following < end)
        if doc_ptr is not None:
            at_doc = doc_ptr + batch * doc_sb
            doc = tl.load(at_doc + t * doc_st, mask=follows, other=0)
            follows = follows & (doc == tl.load(at_doc + following * doc_st, mask=follows, other=0))
        _raw, later, later_share = sizes(
            dt_ptr, trap_ptr, bias_ptr, batch, following, follows, h, h_in, dt_sb, dt_st, dt_sh,
            trap_sb, trap_st, trap_sh, SOFTPLUS,
        )  # fmt: skip
        scale += tl.where(follows[:, None], (1.0 - later_share) * later, 0.0)
    coarse = tl.floor(exponent * GRID + 0.5) * (1.0 / GRID)
    first, second = tl.cumsum(coarse, axis=0), tl.cumsum(exponent - coarse, axis=0)
    at = (v.to(tl.int64) * heads + h)[None, :] * Q + i[:, None]
    inside = h_in[None, :] & (i < Q)[:, None]
    if WIDE:
        tl.store(scale_ptr + at, scale, mask=inside)
    else:
        first += second
        second = first - tl.log2(scale)
    to = token_ptr + at * 4
    tl.store(to, first, mask=inside)
    tl.store(to + 1, second, mask=inside)
    tl.store(to + 2, gamma, mask=inside)
    tl.store(to + 3, delta, mask=inside)

    if angle_ptr is not None:
        s = tl.arange(0, BLOCK_S)
        n = tl.arange(0, W)
        at_angle = batch * angle_sb + t[:, None] * angle_st + s[None, :]
        angle_in = t_in[:, None] & (s < angles)[None, :]
        half = 0.5 * tanh(tl.load(angle_ptr + at_angle, mask=angle_in, other=0.0).to(tl.float32))
        if block == 0:
            at_turns = turns_ptr + (batch * length + t)[:, None] * W
            tl.store(at_turns + s[None, :], half, mask=t_in[:, None] & (s < W)[None, :])
            if BLOCK_S < W:
                rest = t_in[:, None] & (n >= BLOCK_S)[None, :]
                tl.store(at_turns + n[None, :], tl.zeros((Q, W), tl.float32), mask=rest)
        before_last = t_in
        if before_ptr is not None:
            row = v // ((length + Q - 1) // Q)
            before_last = t < tl.load(last_ptr + row)
        for j in tl.static_range(BLOCK_H):
            of_head = tl.sum(tl.where((tl.arange(0, BLOCK_H) == j)[None, :], delta, 0.0), axis=1)
            to_sums = (v.to(tl.int64) * heads + block * BLOCK_H + j) * W
            columns = tl.where(block * BLOCK_H + j < heads, W, 0)
            in_sums = s < columns
            rest = (n >= BLOCK_S) & (n < columns)
            turns = of_head[:, None] * half
            total = tl.sum(turns, axis=0)
            tl.store(sums_ptr + to_sums + s, total - tl.floor(total), mask=in_sums)
            if BLOCK_S < W:
                tl.store(sums_ptr + to_sums + n, tl.zeros((W,), tl.float32), mask=rest)
            if before_ptr is not None:
                total = tl.sum(tl.where(before_last[:, None], turns, 0.0), axis=0)
                tl.store(before_ptr + to_sums + s, total - tl.floor(total), mask=in_sums)
                if BLOCK_S < W:
                    tl.store(before_ptr + to_sums + n, tl.zeros((W,), tl.float32), mask=rest)
    if block == 0:
        for g in range(0, groups):
            arrange(
                B_ptr, B_to_ptr, batch, token, end, g, B_sb, B_st, B_sr, B_sg, length, groups,
                states, angles, ranks, PAIRWISE, Q * RANKS, RANKS, W,
            )  # fmt: skip
            arrange(
                C_ptr, C_to_ptr, batch, token, end, g, C_sb, C_st, C_sr, C_sg, length, groups,
                states, angles, ranks, PAIRWISE, Q * RANKS, RANKS, W,
            )  # fmt: skip


@triton.jit
def mamba3_phase_kernel(
    sums_ptr, initial_ptr, entry_ptr, final_ptr, cu_ptr, first_ptr, rows, length, columns,
    VARLEN: tl.constexpr, Q: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Turns at which chunks start, entry (chunks, columns), and final ones (rows, columns).

    Running sums along the chunks of a row, from initial (rows, columns), kept in [0, 1].
    """
    blocks = tl.cdiv(columns, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_in = c < columns
    _batch, _start, _end, first, chunks = place_of_row(row, length, cu_ptr, first_ptr, VARLEN, Q)
    total = tl.zeros((BLOCK_C,), tl.float32)
    if initial_ptr is not None:
        total = tl.load(initial_ptr + row * columns + c, mask=c_in, other=0.0)
    for start in range(0, chunks, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        at = (first + v)[:, None] * columns + c[None, :]
        inside = (v < chunks)[:, None] & c_in[None, :]
        turns = tl.load(sums_ptr + at, mask=inside, other=0.0)
        if entry_ptr is not None:
            entry = total[None, :] + (tl.cumsum(turns, axis=0) - turns)
            tl.store(entry_ptr + at, entry - tl.floor(entry), mask=inside)
        total += tl.sum(turns, axis=0)
        total -= tl.floor(total)
    tl.store(final_ptr + row * columns + c, total, mask=c_in)


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
def rotation(
    turns_base, entry, delta, i, n, in_row, RAGGED: tl.constexpr, RANKS: tl.constexpr,
    FAST: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Cosine and sine (ROWS, W) of the angles of rows i; `turns_base` is the chunk's."""
    turns = load_tile(turns_base, W, i // RANKS, n, in_row, RAGGED, False, W)
    step = delta
    if RANKS > 1:
        step = tl.where(i % RANKS == 0, delta, 0.0)
    turns = tl.cumsum(turns * step[:, None], axis=0) + entry[None, :]
    angle = (turns - ((turns + ROUND) - ROUND)) * TWO_PI
    if FAST:
        return libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    else:
        return tl.cos(angle), tl.sin(angle)


@triton.jit
def load_rows(
    base, bias_ptr, i, n, in_row, RAGGED: tl.constexpr, RANKS: tl.constexpr, W: tl.constexpr
):
    """Both halves of B's or C's rows plus bias (a head's, (RANKS, 2 W)), in fp32."""
    first = load_tile(base, 2 * W, i, n, in_row, RAGGED, False, W).to(tl.float32)
    second = load_tile(base + W, 2 * W, i, n, in_row, RAGGED, False, W).to(tl.float32)
    if bias_ptr is not None:
        at = bias_ptr + (i % RANKS)[:, None] * (2 * W) + n[None, :]
        if RANKS == 1:
            at = bias_ptr + n[None, :]
        first += tl.load(at)
        second += tl.load(at + W)
    return first, second


@triton.jit
def rotated(first, second, cos, sin, TYPE: tl.constexpr, ROPE: tl.constexpr):
    """Rotate pairs of columns and round."""
    if ROPE:
        return (first * cos - second * sin).to(TYPE), (first * sin + second * cos).to(TYPE)
    else:
        return first.to(TYPE), second.to(TYPE)


@triton.jit
def load_factor(
    ptr, head, i, p, ranks, RANKS: tl.constexpr, CUT_P: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """mimo_x, mimo_z or mimo_o (H, R, P) of a head's rows (ROWS, BLOCK_P), 0 beyond the rank."""
    r = i % RANKS
    at = ptr + (head * ranks + r)[:, None] * HEAD_DIM + p[None, :]
    inside = (r < ranks)[:, None] & (p < HEAD_DIM)[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_inputs(
    base, stride, factor_ptr, head, i, p, in_row, ranks, RAGGED: tl.constexpr,
    RANKS: tl.constexpr, CUT_P: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Rows of x, times mimo_x where it is given."""
    x = load_tile(base, stride, i // RANKS, p, in_row, RAGGED, CUT_P, HEAD_DIM)
    if factor_ptr is not None:
        x = x.to(tl.float32) * load_factor(factor_ptr, head, i, p, ranks, RANKS, CUT_P, HEAD_DIM)
    return x


@triton.jit
def gates(
    z_base, z_st, mz_ptr, head, i, p, in_row, ranks, RAGGED: tl.constexpr, RANKS: tl.constexpr,
    CUT_P: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """z, z mimo_z of rows, and its sigmoid."""
    z = load_tile(z_base, z_st, i // RANKS, p, in_row, RAGGED, CUT_P, HEAD_DIM).to(tl.float32)
    u = z
    if mz_ptr is not None:
        u = z * load_factor(mz_ptr, head, i, p, ranks, RANKS, CUT_P, HEAD_DIM)
    return z, u, 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def load_gradients(
    base, dy_st, dy_sr, z_base, z_st, mz_ptr, mo_ptr, head, i, p, is_real, ranks,
    RAGGED: tl.constexpr, RANKS: tl.constexpr, PER_RANK: tl.constexpr, CUT_P: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of rows of y before gate and mimo_o. `is_real` is read where RAGGED says so."""
    if PER_RANK:
        at = base + (i // RANKS)[:, None] * dy_st + (i % RANKS)[:, None] * dy_sr + p[None, :]
        inside = (is_real & (i % RANKS < ranks))[:, None] & (p < HEAD_DIM)[None, :]
        dy = tl.load(at, mask=inside, other=0.0)
    else:
        dy = load_tile(base, dy_st, i // RANKS, p, is_real, RAGGED, CUT_P, HEAD_DIM)
        if z_base is not None:
            _z, u, sigmoid = gates(
                z_base, z_st, mz_ptr, head, i, p, is_real, ranks, RAGGED, RANKS, CUT_P, HEAD_DIM
            )
            dy = dy.to(tl.float32) * (u * sigmoid)
        if mo_ptr is not None:
            dy = dy.to(tl.float32) * load_factor(mo_ptr, head, i, p, ranks, RANKS, CUT_P, HEAD_DIM)
    return dy


@triton.jit
def entry_half(
    entry_ptr, totals_ptr, carry_ptr, at_state, p_in, at_total, total_step, at_carry, carry_step, k,
    BLOCK_P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Half of the state with which segment k is entered: that of the row, taken through the
    segments before.
    """
    S = tl.zeros((BLOCK_P, W), dtype=tl.float32)
    if entry_ptr is not None:
        S = tl.load(entry_ptr + at_state, mask=p_in[:, None], other=0.0).to(tl.float32)
    if totals_ptr is not None:
        for j in range(0, k):
            total = tl.load(totals_ptr + at_total + j * total_step, mask=p_in[:, None], other=0.0)
            S = S * tl.load(carry_ptr + at_carry + j * carry_step) + total
    return S


@triton.jit
def walk(
    x_ptr, mx_ptr, dy_ptr, z_ptr, mz_ptr, mo_ptr, k_ptr, bias_ptr, mask_ptr, token_ptr, scale_ptr,
    turns_ptr, phase_ptr, states_ptr, entry_ptr, exit_ptr, totals_ptr, carry_ptr, cu_ptr, first_ptr,
    row, segment, head, p_block,
    x_sb, x_st, x_sh, dy_sb, dy_st, dy_sr, dy_sh, z_sb, z_st, z_sh, mask_sb, mask_st,
    rows, length, heads, groups, ranks,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, PER_RANK: tl.constexpr, ROPE: tl.constexpr,
    REVERSE: tl.constexpr, TOTALS: tl.constexpr, SEGMENTS: tl.constexpr, VARLEN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, Q: tl.constexpr,
    RANKS: tl.constexpr, BLOCK_P: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of one segment; see `mamba3_states_kernel`."""
    dot_type: tl.constexpr = tl.float32 if WIDE else k_ptr.dtype.element_ty
    ROWS: tl.constexpr = Q * RANKS
    batch, start, end, first, chunks = place_of_row(row, length, cu_ptr, first_ptr, VARLEN, Q)
    # Segments are numbered in the order in which they are walked.
    index = segment
    if REVERSE:
        index = SEGMENTS - 1 - segment
    per_segment = tl.cdiv(chunks, SEGMENTS)
    low = tl.minimum(index * per_segment, chunks)
    high = tl.minimum(low + per_segment, chunks)

    i = tl.arange(0, ROWS)
    p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, W)
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    MASKED: tl.constexpr = RAGGED or mask_ptr is not None
    size = HEAD_DIM * 2 * W
    tile = p[:, None] * (2 * W) + n[None, :]
    p_in = p < HEAD_DIM
    at_carry = (row * SEGMENTS) * heads + head
    S1 = tl.zeros((BLOCK_P, W), dtype=tl.float32)
    S2 = tl.zeros((BLOCK_P, W), dtype=tl.float32)
    carry = 1.0
    if not TOTALS:
        at_state, at_total = (row * heads + head) * size + tile, at_carry * size + tile
        S1 = entry_half(
            entry_ptr, totals_ptr, carry_ptr, at_state, p_in, at_total, heads * size,
            at_carry, heads, segment, BLOCK_P, W,
        )  # fmt: skip
        S2 = entry_half(
            entry_ptr, totals_ptr, carry_ptr, at_state + W, p_in, at_total + W, heads * size,
            at_carry, heads, segment, BLOCK_P, W,
        )  # fmt: skip
    group = head // (heads // groups)
    k_base = k_ptr + (batch * groups + group) * length * (RANKS * 2 * W)
    head_bias = bias_ptr
    if bias_ptr is not None:
        head_bias = bias_ptr + head * (RANKS * 2 * W)
    for step in tl.range(0, high - low, num_stages=STAGES):
        c = low + step
        if REVERSE:
            c = high - 1 - step
        v = first + c
        t = start + (v - first) * Q
        in_row = t + i // RANKS < end
        if not TOTALS:
            to = states_ptr + (v * heads + head) * size
            store_tile(to, 2 * W, p, n, p_in, S1, CUT_P, False, W)
            store_tile(to + W, 2 * W, p, n, p_in, S2, CUT_P, False, W)
        at = token_ptr + (v * heads + head) * (4 * Q)
        a, b, _gamma, delta = load_token(at, Q, RANKS)
        a_end = tl.load(at + 4 * Q - 4)
        if WIDE:
            b_end = tl.load(at + 4 * Q - 3)
            whole = tl.exp2(a_end + b_end)
            if REVERSE:
                weight = tl.exp2(a + b)
            else:
                scale = tl.load(scale_ptr + (v * heads + head) * Q + i // RANKS)
                weight = scale * tl.exp2((a_end - a) + (b_end - b))
        else:
            whole = tl.exp2(a_end)
            weight = tl.exp2(a) if REVERSE else tl.exp2(a_end - b)
        if REVERSE:
            is_real = in_row
            if mask_ptr is not None:
                at_mask = mask_ptr + batch * mask_sb + (t + i // RANKS) * mask_st
                is_real = in_row & (tl.load(at_mask, mask=in_row, other=0) != 0)
            z_base = z_ptr
            if z_ptr is not None:
                z_base = z_ptr + batch * z_sb + head * z_sh + t * z_st
            u = load_gradients(
                dy_ptr + batch * dy_sb + head * dy_sh + t * dy_st, dy_st, dy_sr, z_base, z_st,
                mz_ptr, mo_ptr, head, i, p, is_real, ranks, MASKED, RANKS, PER_RANK, CUT_P,
                HEAD_DIM,
            )  # fmt: skip
        else:
            u = load_inputs(
                x_ptr + batch * x_sb + head * x_sh + t * x_st, x_st, mx_ptr, head, i, p, in_row,
                ranks, RAGGED, RANKS, CUT_P, HEAD_DIM,
            )  # fmt: skip
        u = tl.trans((u.to(tl.float32) * weight[:, None]).to(dot_type))
        k1, k2 = load_rows(k_base + t * (RANKS * 2 * W), head_bias, i, n, in_row, RAGGED, RANKS, W)
        cos, sin = 1.0, 0.0
        if ROPE:
            entry = tl.load(phase_ptr + (v * heads + head) * W + n)
            cos, sin = rotation(turns_ptr + (batch * length + t) * W, entry, delta, i, n, in_row,
                                RAGGED, RANKS, FAST, W)  # fmt: skip
        k1, k2 = rotated(k1, k2, cos, sin, dot_type, ROPE)
        S1 = S1 * whole + tl.dot(u, k1, input_precision=PRECISION)
        S2 = S2 * whole + tl.dot(u, k2, input_precision=PRECISION)
        carry *= whole
    if TOTALS:
        to = totals_ptr + (at_carry + segment * heads) * size + tile
        tl.store(to, S1, mask=p_in[:, None])
        tl.store(to + W, S2, mask=p_in[:, None])
        tl.store(carry_ptr + at_carry + segment * heads, carry)
    elif exit_ptr is not None:
        last = (p < tl.where(segment == SEGMENTS - 1, HEAD_DIM, 0))[:, None]
        to = exit_ptr + (row * heads + head) * size + tile
        tl.store(to, S1, mask=last)
        tl.store(to + W, S2, mask=last)


@triton.jit
def mamba3_states_kernel(
    x_ptr, mx_ptr, B_ptr, B_bias_ptr, dy_ptr, C_ptr, C_bias_ptr, z_ptr, mz_ptr, mo_ptr, mask_ptr,
    token_ptr, scale_ptr, turns_ptr, phase_ptr,
    states_ptr, dstates_ptr, initial_ptr, dfinal_ptr, dinitial_ptr,
    totals_ptr, carry_ptr, dtotals_ptr, dcarry_ptr, cu_ptr, first_ptr,
    x_sb, x_st, x_sh, dy_sb, dy_st, dy_sr, dy_sh, z_sb, z_st, z_sh, mask_sb, mask_st,
    rows, length, heads: tl.constexpr, groups, ranks, walked,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, PER_RANK: tl.constexpr, ROPE: tl.constexpr,
    TOTALS: tl.constexpr, SEGMENTS: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, Q: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_P: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """States between chunks, forwards, and their gradients, backwards (where dy is given).

    One program for a row, segment, head, block of channels and direction. TOTALS: every segment
    from a state of 0, giving the state after it, totals (rows, SEGMENTS, H, P, 2 W), and its decay,
    carry (rows, SEGMENTS, H). Otherwise from the state that enters it, storing states (chunks, H,
    P, 2 W) before each chunk (in walking order), and dinitial. `walked` segments are walked.
    """
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    p_blocks = tl.cdiv(HEAD_DIM, BLOCK_P)
    p_block = pid % p_blocks
    pid = pid // p_blocks
    segment = pid % walked
    pid = pid // walked
    row = (pid % rows).to(tl.int64)
    if pid < rows:
        walk(
            x_ptr, mx_ptr, None, None, None, None, B_ptr, B_bias_ptr, None, token_ptr, scale_ptr,
            turns_ptr, phase_ptr, states_ptr, initial_ptr, None, totals_ptr, carry_ptr,
            cu_ptr, first_ptr, row, segment, head, p_block,
            x_sb, x_st, x_sh, 0, 0, 0, 0, 0, 0, 0, 0, 0, rows, length, heads, groups, ranks,
            HEAD_DIM, RAGGED, PER_RANK, ROPE, False, TOTALS, SEGMENTS, VARLEN, WIDE, PRECISION,
            FAST, Q, RANKS, BLOCK_P, W, STAGES,
        )  # fmt: skip
    elif dy_ptr is not None:
        walk(
            None, None, dy_ptr, z_ptr, mz_ptr, mo_ptr, C_ptr, C_bias_ptr, mask_ptr, token_ptr,
            scale_ptr, turns_ptr, phase_ptr, dstates_ptr, dfinal_ptr, dinitial_ptr, dtotals_ptr,
            dcarry_ptr, cu_ptr, first_ptr, row, segment, head, p_block,
            0, 0, 0, dy_sb, dy_st, dy_sr, dy_sh, z_sb, z_st, z_sh, mask_sb, mask_st,
            rows, length, heads, groups, ranks,
            HEAD_DIM, RAGGED, PER_RANK, ROPE, True, TOTALS, SEGMENTS, VARLEN, WIDE, PRECISION,
            FAST, Q, RANKS, BLOCK_P, W, STAGES,
        )  # fmt: skip


@triton.jit
def mamba3_fwd_kernel(
    x_ptr, mx_ptr, B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, D_ptr, z_ptr, mz_ptr, mo_ptr, mask_ptr,
    token_ptr, scale_ptr, turns_ptr, phase_ptr, initial_ptr, totals_ptr, carry_ptr,
    y_ptr, final_ptr, cu_ptr, first_ptr,
    x_sb, x_st, x_sh, z_sb, z_st, z_sh, mask_sb, mask_st,
    rows, length, heads: tl.constexpr, groups, ranks,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, PER_RANK: tl.constexpr, ROPE: tl.constexpr,
    SEGMENTS: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, Q: tl.constexpr, RANKS: tl.constexpr, BLOCK_P: tl.constexpr,
    W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y (B, T, H, P), or (B, T, R, H, P) if PER_RANK, and the final state (rows, H, P, 2 W).

    One program for a row, segment, head and block of its channels, with the state in registers.
    """
    dot_type: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    ROWS: tl.constexpr = Q * RANKS
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    p_blocks = tl.cdiv(HEAD_DIM, BLOCK_P)
    p_block = pid % p_blocks
    pid = pid // p_blocks
    segment = pid % SEGMENTS
    row = (pid // SEGMENTS).to(tl.int64)
    batch, start, end, first, chunks = place_of_row(row, length, cu_ptr, first_ptr, VARLEN, Q)
    per_segment = tl.cdiv(chunks, SEGMENTS)
    low = tl.minimum(segment * per_segment, chunks)
    high = tl.minimum(low + per_segment, chunks)

    i = tl.arange(0, ROWS)
    of_token = i // RANKS
    p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, W)
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    size = HEAD_DIM * 2 * W
    tile = p[:, None] * (2 * W) + n[None, :]
    p_in = p < HEAD_DIM
    at_carry = (row * SEGMENTS) * heads + head
    at_state, at_total = (row * heads + head) * size + tile, at_carry * size + tile
    S1 = entry_half(
        initial_ptr, totals_ptr, carry_ptr, at_state, p_in, at_total, heads * size, at_carry, heads,
        segment, BLOCK_P, W,
    )  # fmt: skip
    S2 = entry_half(
        initial_ptr, totals_ptr, carry_ptr, at_state + W, p_in, at_total + W, heads * size,
        at_carry, heads, segment, BLOCK_P, W,
    )  # fmt: skip
    D = 0.0
    if D_ptr is not None:
        D = tl.load(D_ptr + head).to(tl.float32)

    group = head // (heads // groups)
    x_base = x_ptr + batch * x_sb + head * x_sh
    of_group = (batch * groups + group) * length * (RANKS * 2 * W)
    B_base, C_base = B_ptr + of_group, C_ptr + of_group
    B_bias, C_bias = B_bias_ptr, C_bias_ptr
    if B_bias_ptr is not None:
        B_bias = B_bias_ptr + head * (RANKS * 2 * W)
    if C_bias_ptr is not None:
        C_bias = C_bias_ptr + head * (RANKS * 2 * W)
    ends = token_ptr + (head + 1) * (4 * Q) - 4
    chunk_step = heads * (4 * Q)
    a_end = tl.load(ends + (first + low) * chunk_step, mask=low < high, other=0.0)
    for c in tl.range(low, high, num_stages=STAGES):
        v = first + c
        t = start + (v - first) * Q
        in_row = t + of_token < end
        at = token_ptr + (v * heads + head) * (4 * Q)
        a, b, gamma, delta = load_token(at, Q, RANKS)
        cos, sin = 1.0, 0.0
        if ROPE:
            entry = tl.load(phase_ptr + (v * heads + head) * W + n)
            cos, sin = rotation(turns_ptr + (batch * length + t) * W, entry, delta, i, n, in_row,
                                RAGGED, RANKS, FAST, W)  # fmt: skip
        at_rows = t * (RANKS * 2 * W)
        k1, k2 = load_rows(B_base + at_rows, B_bias, i, n, in_row, RAGGED, RANKS, W)
        k1, k2 = rotated(k1, k2, cos, sin, dot_type, ROPE)
        q1, q2 = load_rows(C_base + at_rows, C_bias, i, n, in_row, RAGGED, RANKS, W)
        q1, q2 = rotated(q1, q2, cos, sin, dot_type, ROPE)
        x = load_inputs(x_base + t * x_st, x_st, mx_ptr, head, i, p, in_row, ranks, RAGGED, RANKS,
                        CUT_P, HEAD_DIM)  # fmt: skip

        # Token s reaches t > s with exp2(a_t - a_s) s_s, and itself with gamma; row (t, r) is
        # reached by D besides.
        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
        later = of_token[:, None] > of_token[None, :]
        if WIDE:
            scale = tl.load(scale_ptr + (v * heads + head) * Q + of_token)
            exponent = (a[:, None] - a[None, :]) + (b[:, None] - b[None, :])
            factor = tl.exp2(tl.where(later, exponent, float("-inf"))) * scale[None, :]
            from_entry = tl.exp2(a + b)
            b_end = tl.load(at + 4 * Q - 3)
            to_exit = tl.exp2((a_end - a) + (b_end - b)) * scale
            whole = tl.exp2(a_end + b_end)
        else:
            factor = tl.exp2(tl.where(later, a[:, None] - b[None, :], float("-inf")))
            from_entry = tl.exp2(a)
            to_exit = tl.exp2(a_end - b)
            whole = tl.exp2(a_end)
        same = of_token[:, None] == of_token[None, :]
        scores *= tl.where(same, gamma[:, None], factor)
        if D_ptr is not None:
            scores += tl.where(i[:, None] == i[None, :], D, 0.0)
        y = tl.dot(q1, tl.trans(S1.to(dot_type)), input_precision=PRECISION)
        y = tl.dot(q2, tl.trans(S2.to(dot_type)), y, input_precision=PRECISION)
        y *= from_entry[:, None]
        y = tl.dot(scores.to(dot_type), x.to(dot_type), y, input_precision=PRECISION)

        leaving = tl.trans((x.to(tl.float32) * to_exit[:, None]).to(dot_type))
        S1 = S1 * whole + tl.dot(leaving, k1, input_precision=PRECISION)
        S2 = S2 * whole + tl.dot(leaving, k2, input_precision=PRECISION)

        # Asked for a step ahead: nothing waits for these few bytes.
        a_end = tl.load(ends + tl.minimum(v + 1, first + high - 1) * chunk_step)
        if mask_ptr is not None:
            at_mask = mask_ptr + batch * mask_sb + (t + of_token) * mask_st
            is_real = tl.load(at_mask, mask=in_row, other=0) != 0
            y = tl.where(is_real[:, None], y, 0.0)
        if z_ptr is not None:
            at_z = z_ptr + batch * z_sb + head * z_sh + t * z_st
            _z, u, sigmoid = gates(at_z, z_st, mz_ptr, head, i, p, in_row, ranks, RAGGED, RANKS,
                                   CUT_P, HEAD_DIM)  # fmt: skip
            y *= u * sigmoid
        if PER_RANK:
            at_y = y_ptr + ((batch * length + t) * ranks * heads + head) * HEAD_DIM
            rank = i % RANKS
            at_row = (of_token * ranks + rank) * (heads * HEAD_DIM)
            inside = (in_row & (rank < ranks))[:, None] & p_in[None, :]
            value = y.to(y_ptr.dtype.element_ty)
            tl.store(at_y + at_row[:, None] + p[None, :], value, mask=inside)
        else:
            at_y = y_ptr + ((batch * length + t) * heads + head) * HEAD_DIM
            if mo_ptr is not None:
                y *= load_factor(mo_ptr, head, i, p, ranks, RANKS, CUT_P, HEAD_DIM)
            if RANKS > 1:
                y = tl.sum(tl.reshape(y, (Q, RANKS, BLOCK_P)), axis=1)
            j = tl.arange(0, Q)
            store_tile(at_y, heads * HEAD_DIM, j, p, t + j < end, y, RAGGED, CUT_P, HEAD_DIM)
    if segment == SEGMENTS - 1:
        to = final_ptr + (row * heads + head) * size + tile
        tl.store(to, S1, mask=p_in[:, None])
        tl.store(to + W, S2, mask=p_in[:, None])
