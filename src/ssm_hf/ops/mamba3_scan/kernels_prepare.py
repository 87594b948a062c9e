"""Triton kernels of Mamba-3's scan: what the others read of tokens, inputs and angles.

See kernels.py for the notation.
"""

import triton
import triton.language as tl

from ssm_hf.ops.ssd.kernels import place_of_chunk, place_of_row, softplus

LOG2E = tl.constexpr(1.4426950408889634)
# 2^-256 is 0 in fp32: a stronger decay, or the start of a document, is an exponent of -256.
LOWEST = tl.constexpr(-256.0)
# Running sums of exponents are kept as multiples of 1/512, which add and subtract exactly in fp32
# (64 tokens of at most 256), and a remainder below 1/8.
GRID = tl.constexpr(512.0)


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
def column_of_slot(slot, states, pairs, half, PAIRWISE: tl.constexpr, W: tl.constexpr):
    """Column of the caller's B and C that lies in a slot of tiles a, b, c; `states` for none."""
    j = slot // W
    i = slot % W
    rest = slot - 2 * W
    if PAIRWISE:
        paired = 2 * i + j
        single = rest + 2 * pairs
    else:
        paired = i + j * half
        single = tl.where(rest < half - pairs, rest + pairs, rest + 2 * pairs)
    return tl.where(j < 2, tl.where(i < pairs, paired, states), single)


@triton.jit
def arrange(
    from_base, from_sq, from_sr, to_base, row, in_row, states, pairs, half, ranks,
    PAIRWISE: tl.constexpr, RANKS: tl.constexpr, W: tl.constexpr, PITCH: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Rows (token or head, rank) of B, C or their biases -> rows of PITCH columns in slots' order.

    Rows that are not `in_row` are left alone; ranks and slots that hold nothing become zero.
    """
    r = row % RANKS
    at_row = (from_base + (row // RANKS) * from_sq + r * from_sr)[:, None]
    to_row = to_base + row[:, None] * PITCH
    is_rank = (in_row & (r < ranks))[:, None]
    if PAIRWISE:
        # Columns are read side by side and parted in registers.
        n = tl.arange(0, 2 * W)[None, :]
        value = tl.load(at_row + n, mask=is_rank & (n < 2 * pairs), other=0.0)
        value = value.to(to_base.dtype.element_ty)
        even, odd = tl.split(tl.reshape(value, (value.shape[0], W, 2)))
        i = tl.arange(0, W)[None, :]
        tl.store(to_row + i, even, mask=in_row[:, None])
        tl.store(to_row + W + i, odd, mask=in_row[:, None])
    for first in tl.static_range(2 * W if PAIRWISE else 0, PITCH, STEP):
        slot = first + tl.arange(0, STEP)
        column = column_of_slot(slot, states, pairs, half, PAIRWISE, W)
        inside = is_rank & (column < states)[None, :]
        value = tl.load(at_row + column[None, :], mask=inside, other=0.0)
        value = value.to(to_base.dtype.element_ty)
        tl.store(to_row + slot[None, :], value, mask=in_row[:, None])


@triton.jit
def load_turns(angle_ptr, batch, t, t_in, angle_sb, angle_st, angles, W: tl.constexpr):
    """tanh(angles) / 2 of tokens t, (Q, W): turns a unit of Δ."""
    s = tl.arange(0, W)
    at = batch * angle_sb + t[:, None] * angle_st + s[None, :]
    raw = tl.load(angle_ptr + at, mask=t_in[:, None] & (s < angles)[None, :], other=0.0)
    return 0.5 * tanh(raw.to(tl.float32))


@triton.jit
def sum_turns(to, delta, half_turns, h_in, PRECISION: tl.constexpr, Q: tl.constexpr):
    """Turns of a chunk (BLOCK_H, W) for steps delta (Q, BLOCK_H), whole turns left out."""
    if Q < 16:
        total = tl.sum(delta[:, :, None] * half_turns[:, None, :], axis=0)
    else:
        total = tl.dot(tl.trans(delta), half_turns, input_precision=PRECISION)
    tl.store(to, total - tl.floor(total), mask=h_in[:, None])


@triton.jit
def prepare_chunk(
    dt_ptr, A_ptr, trap_ptr, bias_ptr, angle_ptr, mask_ptr, next_ptr, doc_ptr, last_ptr,
    cu_ptr, first_ptr, row_ptr, token_ptr, scale_ptr, sums_ptr, before_ptr, v, block,
    dt_sb, dt_st, dt_sh, A_sb, A_st, A_sh, trap_sb, trap_st, trap_sh, angle_sb, angle_st,
    mask_sb, mask_st, next_sb, next_st, doc_sb, doc_st, rows, length, heads, angles,
    SOFTPLUS: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, W: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A chunk and a block of heads; see `mamba3_prepare_kernel`."""
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
    # Joined, a token's numbers leave a thread in one store.
    four = tl.join(tl.join(first, gamma), tl.join(second, delta))
    to = (token_ptr + at * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    tl.store(to, tl.reshape(four, (Q, BLOCK_H, 4)), mask=inside[:, :, None])

    if angle_ptr is not None:
        half_turns = load_turns(angle_ptr, batch, t, t_in, angle_sb, angle_st, angles, W)
        to = (v.to(tl.int64) * heads + h)[:, None] * W + tl.arange(0, W)[None, :]
        sum_turns(sums_ptr + to, delta, half_turns, h_in, PRECISION, Q)
        if before_ptr is not None:
            row = v // ((length + Q - 1) // Q)
            before_last = tl.where((t < tl.load(last_ptr + row))[:, None], delta, 0.0)
            sum_turns(before_ptr + to, before_last, half_turns, h_in, PRECISION, Q)


@triton.jit
def arrange_chunk(
    B_ptr, C_ptr, angle_ptr, cu_ptr, first_ptr, row_ptr, turns_ptr, B_to_ptr, C_to_ptr, v,
    B_sb, B_st, B_sr, B_sg, C_sb, C_st, C_sr, C_sg, angle_sb, angle_st,
    rows, length, groups, states, angles, pairs, half, ranks,
    VARLEN: tl.constexpr, PAIRWISE: tl.constexpr, Q: tl.constexpr, RANKS: tl.constexpr,
    W: tl.constexpr, PITCH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """B, C and turns of a chunk; see `mamba3_prepare_kernel`."""
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    if angle_ptr is not None:
        t = token + tl.arange(0, Q)
        turns = load_turns(angle_ptr, batch, t, t < end, angle_sb, angle_st, angles, W)
        to = turns_ptr + (batch * length + t)[:, None] * W + tl.arange(0, W)[None, :]
        tl.store(to, turns, mask=(t < end)[:, None])
    row = tl.arange(0, Q * RANKS)
    in_row = token + row // RANKS < end
    for g in range(0, groups):
        at_B = B_ptr + batch * B_sb + token * B_st + g * B_sg
        at_C = C_ptr + batch * C_sb + token * C_st + g * C_sg
        rows_to = ((batch * groups + g) * length + token) * (RANKS * PITCH)
        arrange(at_B, B_st, B_sr, B_to_ptr + rows_to, row, in_row, states, pairs, half, ranks,
                PAIRWISE, RANKS, W, PITCH, STEP)  # fmt: skip
        arrange(at_C, C_st, C_sr, C_to_ptr + rows_to, row, in_row, states, pairs, half, ranks,
                PAIRWISE, RANKS, W, PITCH, STEP)  # fmt: skip


@triton.jit
def mamba3_prepare_kernel(
    dt_ptr, A_ptr, trap_ptr, bias_ptr, B_ptr, C_ptr, angle_ptr, mask_ptr, next_ptr, doc_ptr,
    last_ptr, cu_ptr, first_ptr, row_ptr,
    B_bias_ptr, C_bias_ptr, token_ptr, scale_ptr, turns_ptr, sums_ptr, before_ptr, B_to_ptr,
    C_to_ptr, B_bias_to_ptr, C_bias_to_ptr,
    dt_sb, dt_st, dt_sh, A_sb, A_st, A_sh, trap_sb, trap_st, trap_sh,
    B_sb, B_st, B_sr, B_sg, C_sb, C_st, C_sr, C_sg, angle_sb, angle_st,
    mask_sb, mask_st, next_sb, next_st, doc_sb, doc_st,
    rows, length, chunks, heads, groups, states, angles, pairs, half, ranks,
    SOFTPLUS: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PAIRWISE: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, RANKS: tl.constexpr, W: tl.constexpr,
    PITCH: tl.constexpr, STEP: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Numbers of tokens and the sums of their turns over a chunk.

    token (chunks, H, Q, 4): running sum a of exponents inside the chunk, a - log2(s), gamma and Δ;
    with WIDE a in two parts, gamma and Δ, and s in scale (chunks, H, Q). sums (chunks, H, W): turns
    of a chunk; before: of its tokens before last (rows,), where the row's last document starts.
    The first programs, one for a chunk, write tanh(angles) / 2, turns (B, T, W), and B and C as the
    other kernels read them, (B, G, T, RANKS, PITCH): they take longest. Then one for a chunk and a
    block of heads does the above. The last, one for a block of heads, write the biases, (H, RANKS,
    PITCH).
    """
    blocks = tl.cdiv(heads, BLOCK_H)
    pid = tl.program_id(0)
    if pid < chunks:
        arrange_chunk(
            B_ptr, C_ptr, angle_ptr, cu_ptr, first_ptr, row_ptr, turns_ptr, B_to_ptr, C_to_ptr, pid,
            B_sb, B_st, B_sr, B_sg, C_sb, C_st, C_sr, C_sg, angle_sb, angle_st, rows, length,
            groups, states, angles, pairs, half, ranks, VARLEN, PAIRWISE, Q, RANKS, W, PITCH, STEP,
        )  # fmt: skip
    elif pid < chunks * (blocks + 1):
        pid -= chunks
        prepare_chunk(
            dt_ptr, A_ptr, trap_ptr, bias_ptr, angle_ptr, mask_ptr, next_ptr, doc_ptr, last_ptr,
            cu_ptr, first_ptr, row_ptr, token_ptr, scale_ptr, sums_ptr, before_ptr,
            pid // blocks, pid % blocks,
            dt_sb, dt_st, dt_sh, A_sb, A_st, A_sh, trap_sb, trap_st, trap_sh, angle_sb, angle_st,
            mask_sb, mask_st, next_sb, next_st, doc_sb, doc_st, rows, length, heads, angles,
            SOFTPLUS, VARLEN, WIDE, PRECISION, Q, W, BLOCK_H,
        )  # fmt: skip
    else:
        head = (pid - chunks * (blocks + 1)) * BLOCK_H
        row = head * RANKS + tl.arange(0, BLOCK_H * RANKS)
        in_row = row < heads * RANKS
        if B_bias_ptr is not None:
            arrange(B_bias_ptr, ranks * states, states, B_bias_to_ptr, row, in_row, states, pairs,
                    half, ranks, PAIRWISE, RANKS, W, PITCH, STEP)  # fmt: skip
        if C_bias_ptr is not None:
            arrange(C_bias_ptr, ranks * states, states, C_bias_to_ptr, row, in_row, states, pairs,
                    half, ranks, PAIRWISE, RANKS, W, PITCH, STEP)  # fmt: skip


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
def load_step(at_turns, at_delta, t, last, h, heads, W: tl.constexpr):
    """Turns a unit of Δ (W,) and Δ (BLOCK_H,) of token t of a chunk, 0 from `last` on."""
    wanted = t < last
    n = tl.arange(0, W)
    turns = tl.load(at_turns + t * W, mask=n < tl.where(wanted, W, 0), other=0.0)
    return turns, tl.load(at_delta + 4 * t, mask=h < tl.where(wanted, heads, 0), other=0.0)


@triton.jit
def store_angle(to, total, h_in):
    """A token's angles (BLOCK_H, W), of their sums since the start of the row."""
    angle = total - tl.floor(total + 0.5)
    if to.dtype.element_ty == tl.int16:
        angle = tl.floor(angle * 65536.0 + 0.5).to(tl.int32).to(tl.int16)
    tl.store(to, angle, mask=h_in[:, None])


@triton.jit
def mamba3_angles_kernel(
    token_ptr, turns_ptr, phase_ptr, angle_ptr, cu_ptr, first_ptr, row_ptr, rows, length, heads,
    VARLEN: tl.constexpr, Q: tl.constexpr, W: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Angles (chunks, H, Q, W) of all tokens, in turns from -1/2 to 1/2, or in int16 as multiples
    of 2^-16 turn: far below what turned numbers are rounded to.
    """
    blocks = tl.cdiv(heads, BLOCK_H)
    v = tl.program_id(0) // blocks
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    h = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_in = h < heads
    n = tl.arange(0, W)
    here = v.to(tl.int64) * heads + h
    total = tl.load(phase_ptr + here[:, None] * W + n[None, :], mask=h_in[:, None], other=0.0)
    at_turns = turns_ptr + (batch * length + token) * W + n
    at_delta = token_ptr + here * (4 * Q) + 3
    to = angle_ptr + here[:, None] * (Q * W) + n[None, :]
    last = tl.minimum(end - token, Q)
    # Four tokens at a time are asked for, before the stores that loads would wait for.
    turns_0, delta_0 = load_step(at_turns, at_delta, 0, last, h, heads, W)
    turns_1, delta_1 = load_step(at_turns, at_delta, 1, last, h, heads, W)
    turns_2, delta_2 = load_step(at_turns, at_delta, 2, last, h, heads, W)
    turns_3, delta_3 = load_step(at_turns, at_delta, 3, last, h, heads, W)
    for t in range(0, Q, 4):
        angle_0 = total + delta_0[:, None] * turns_0[None, :]
        angle_1 = angle_0 + delta_1[:, None] * turns_1[None, :]
        angle_2 = angle_1 + delta_2[:, None] * turns_2[None, :]
        total = angle_2 + delta_3[:, None] * turns_3[None, :]
        turns_0, delta_0 = load_step(at_turns, at_delta, t + 4, last, h, heads, W)
        turns_1, delta_1 = load_step(at_turns, at_delta, t + 5, last, h, heads, W)
        turns_2, delta_2 = load_step(at_turns, at_delta, t + 6, last, h, heads, W)
        turns_3, delta_3 = load_step(at_turns, at_delta, t + 7, last, h, heads, W)
        store_angle(to + t * W, angle_0, h_in)
        store_angle(to + (t + 1) * W, angle_1, h_in)
        store_angle(to + (t + 2) * W, angle_2, h_in)
        store_angle(to + (t + 3) * W, total, h_in)
