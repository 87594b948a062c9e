"""Triton kernels of Mamba-3's scan: states of chunks, forward pass.

With b_t = (1 - lambda_t) Δ_t and s_t = lambda_t Δ_t + b of the next token, Mamba-3 is Mamba-2's
scan of inputs s_t x_t, but that a token reaches itself with gamma_t = lambda_t Δ_t in place of s_t.
What b, padding and the bounds of documents come to is worked out once, by `mamba3_prepare_kernel`;
the other kernels see numbers of tokens.

A chunk has Q tokens and ROWS = Q * RANKS rows (t, r), rank by rank inside a token; RANKS is the
MIMO rank rounded up to a power of two, rows beyond the rank are zero. The columns of queries, keys
and states lie in slots, PITCH of them in three tiles: a and b, of W slots each, hold the two halves
of the pairs that turn, c, of V slots or none, the columns that do not. They are turned in
registers. Angles are counted in turns, from the start of the row: documents do not reset them,
since only differences within a document matter.

Chunks of all rows are numbered through by v. Rows are batch rows, or with `cu_seqlens` (VARLEN)
documents: row r then has tokens cu[r]..cu[r + 1] of one long row, and chunks first[r]..first[r+1].
"""

import inspect

import triton
import triton.language as tl

from ssm_hf.ops.mamba3_scan.kernels_tiles import (
    exp2,
    fresh,
    fresh_zero,
    gates,
    load_factor,
    load_gradients,
    load_inputs,
    load_rest,
    load_rotated,
    load_token,
    products,
    rotation,
    store_state,
)
from ssm_hf.ops.ssd.kernels import place_of_row, store_tile

# What is hoisted out of a loop is kept, in too few registers: kernels ask that it is not, which
# Triton can do from 3.5 on.
CAN_KEEP_IN_LOOPS = "disable_licm" in inspect.signature(tl.range.__init__).parameters


@triton.jit
def entry_tile(
    entry_ptr, totals_ptr, carry_ptr, at_state, p_in, at_total, total_step, at_carry, carry_step, k,
    BLOCK_P: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of the state with which segment k is entered: that of the row, taken through the
    segments before.
    """
    S = tl.zeros((BLOCK_P, WIDTH), dtype=tl.float32)
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
    angle_ptr, states_ptr, entry_ptr, exit_ptr, totals_ptr, carry_ptr, cu_ptr, first_ptr,
    row, segment, head, p_block,
    x_sb, x_st, x_sh, dy_sb, dy_st, dy_sr, dy_sh, z_sb, z_st, z_sh, mask_sb, mask_st,
    rows, length, heads, groups, ranks,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, PER_RANK: tl.constexpr, ROPE: tl.constexpr,
    REVERSE: tl.constexpr, TOTALS: tl.constexpr, SEGMENTS: tl.constexpr, VARLEN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, Q: tl.constexpr,
    RANKS: tl.constexpr, BLOCK_P: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of one segment; see `mamba3_states_kernel`."""
    dot_type: tl.constexpr = tl.float32 if WIDE else k_ptr.dtype.element_ty
    ROWS: tl.constexpr = Q * RANKS
    PITCH: tl.constexpr = 2 * W + V
    batch, start, end, first, chunks = place_of_row(row, length, cu_ptr, first_ptr, VARLEN, Q)
    # Segments are numbered in the order in which they are walked.
    index = segment
    if REVERSE:
        index = SEGMENTS - 1 - segment
    per_segment = tl.cdiv(chunks, SEGMENTS)
    low = tl.minimum(index * per_segment, chunks)
    high = tl.minimum(low + per_segment, chunks)

    i = tl.arange(0, ROWS)
    j = tl.arange(0, Q)
    p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, W)
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    MASKED: tl.constexpr = RAGGED or mask_ptr is not None
    size = HEAD_DIM * PITCH
    tile = p[:, None] * PITCH + n[None, :]
    p_in = p < HEAD_DIM
    at_carry = (row * SEGMENTS) * heads + head
    Sa = tl.zeros((BLOCK_P, W), dtype=tl.float32)
    Sb = tl.zeros((BLOCK_P, W), dtype=tl.float32)
    Sc = None
    if V > 0:
        Sc = tl.zeros((BLOCK_P, V), dtype=tl.float32)
    carry = 1.0
    if not TOTALS:
        at_state = (row * heads + head) * size + tile
        at_total = at_carry * size + tile
        Sa = entry_tile(entry_ptr, totals_ptr, carry_ptr, at_state, p_in, at_total, heads * size,
                        at_carry, heads, segment, BLOCK_P, W)  # fmt: skip
        Sb = entry_tile(entry_ptr, totals_ptr, carry_ptr, at_state + W, p_in, at_total + W,
                        heads * size, at_carry, heads, segment, BLOCK_P, W)  # fmt: skip
        if V > 0:
            rest = (p[:, None] * PITCH + 2 * W) + tl.arange(0, V)[None, :]
            Sc = entry_tile(entry_ptr, totals_ptr, carry_ptr, (row * heads + head) * size + rest,
                            p_in, at_carry * size + rest, heads * size, at_carry, heads, segment,
                            BLOCK_P, V)  # fmt: skip
    group = head // (heads // groups)
    k_base = k_ptr + (batch * groups + group) * length * (RANKS * PITCH)
    head_bias = bias_ptr
    if bias_ptr is not None:
        head_bias = bias_ptr + head * (RANKS * PITCH)
    for step in tl.range(0, high - low, num_stages=STAGES, disable_licm=True):
        c = low + step
        if REVERSE:
            c = high - 1 - step
        v = first + c
        t = start + (v - first) * Q
        in_row = t + i // RANKS < end
        in_tokens = t + j < end
        if not TOTALS:
            to = states_ptr + (v * heads + head) * size
            store_state(to, p, p_in, Sa, Sb, Sc, CUT_P, W, V)
        at = token_ptr + (v * heads + head) * (4 * Q)
        a, b, _gamma, _delta = load_token(at, Q, RANKS)
        a_end = tl.load(at + 4 * Q - 4)
        if WIDE:
            b_end = tl.load(at + 4 * Q - 3)
            whole = exp2(a_end + b_end, FAST)
            if REVERSE:
                weight = exp2(a + b, FAST)
            else:
                scale = tl.load(scale_ptr + (v * heads + head) * Q + i // RANKS)
                weight = scale * exp2((a_end - a) + (b_end - b), FAST)
        else:
            whole = exp2(a_end, FAST)
            weight = exp2(a, FAST) if REVERSE else exp2(a_end - b, FAST)
        if REVERSE:
            is_real = in_tokens
            if mask_ptr is not None:
                at_mask = mask_ptr + batch * mask_sb + (t + j) * mask_st
                is_real = in_tokens & (tl.load(at_mask, mask=in_tokens, other=0) != 0)
            z_base = z_ptr
            if z_ptr is not None:
                z_base = z_ptr + batch * z_sb + head * z_sh + t * z_st
            u = load_gradients(
                dy_ptr + batch * dy_sb + head * dy_sh + t * dy_st, dy_st, dy_sr, z_base, z_st,
                mz_ptr, mo_ptr, head, j, p, is_real, ranks, MASKED, RANKS, PER_RANK, CUT_P,
                HEAD_DIM, FAST,
            )  # fmt: skip
        else:
            u = load_inputs(
                x_ptr + batch * x_sb + head * x_sh + t * x_st, x_st, mx_ptr, head, j, p, in_tokens,
                ranks, RAGGED, RANKS, CUT_P, HEAD_DIM,
            )  # fmt: skip
        u = tl.trans((u.to(tl.float32) * weight[:, None]).to(dot_type))
        cos, sin = 1.0, 0.0
        if ROPE:
            cos, sin = rotation(angle_ptr + (v * heads + head) * (Q * W), i, RANKS, FAST, W)
        k_at = k_base + t * (RANKS * PITCH)
        ka, kb = load_rotated(k_at, head_bias, cos, sin, i, in_row, dot_type, RAGGED, FAST, RANKS,
                              ROPE, W, PITCH)  # fmt: skip
        Sa = Sa * whole + tl.dot(u, ka, input_precision=PRECISION)
        Sb = Sb * whole + tl.dot(u, kb, input_precision=PRECISION)
        if V > 0:
            kc = load_rest(k_at, head_bias, i, in_row, dot_type, RAGGED, FAST, RANKS, W, V, PITCH)
            Sc = Sc * whole + tl.dot(u, kc, input_precision=PRECISION)
        carry *= whole
    if TOTALS:
        to = totals_ptr + (at_carry + segment * heads) * size
        store_state(to, p, p_in, Sa, Sb, Sc, CUT_P, W, V)
        tl.store(carry_ptr + at_carry + segment * heads, carry)
    elif exit_ptr is not None:
        last = p < tl.where(segment == SEGMENTS - 1, HEAD_DIM, 0)
        store_state(exit_ptr + (row * heads + head) * size, p, last, Sa, Sb, Sc, True, W, V)


@triton.jit
def mamba3_states_kernel(
    x_ptr, mx_ptr, B_ptr, B_bias_ptr, dy_ptr, C_ptr, C_bias_ptr, z_ptr, mz_ptr, mo_ptr, mask_ptr,
    token_ptr, scale_ptr, angle_ptr,
    states_ptr, dstates_ptr, initial_ptr, dfinal_ptr, dinitial_ptr,
    totals_ptr, carry_ptr, dtotals_ptr, dcarry_ptr, cu_ptr, first_ptr,
    x_sb, x_st, x_sh, dy_sb, dy_st, dy_sr, dy_sh, z_sb, z_st, z_sh, mask_sb, mask_st,
    rows, length, heads: tl.constexpr, groups, ranks, walked,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, PER_RANK: tl.constexpr, ROPE: tl.constexpr,
    TOTALS: tl.constexpr, SEGMENTS: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, Q: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_P: tl.constexpr, W: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """States between chunks, forwards, and their gradients, backwards (where dy is given).

    One program for a row, segment, head, block of channels and direction. TOTALS: every segment
    from a state of 0, giving the state after it, totals (rows, SEGMENTS, H, P, PITCH), and its
    decay, carry (rows, SEGMENTS, H). Otherwise from the state that enters it, storing states
    (chunks, H, P, PITCH) before each chunk (in walking order), and dinitial. `walked` segments are
    walked.
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
            angle_ptr, states_ptr, initial_ptr, None, totals_ptr, carry_ptr,
            cu_ptr, first_ptr, row, segment, head, p_block,
            x_sb, x_st, x_sh, 0, 0, 0, 0, 0, 0, 0, 0, 0, rows, length, heads, groups, ranks,
            HEAD_DIM, RAGGED, PER_RANK, ROPE, False, TOTALS, SEGMENTS, VARLEN, WIDE, PRECISION,
            FAST, Q, RANKS, BLOCK_P, W, V, STAGES,
        )  # fmt: skip
    elif dy_ptr is not None:
        walk(
            None, None, dy_ptr, z_ptr, mz_ptr, mo_ptr, C_ptr, C_bias_ptr, mask_ptr, token_ptr,
            scale_ptr, angle_ptr, dstates_ptr, dfinal_ptr, dinitial_ptr, dtotals_ptr,
            dcarry_ptr, cu_ptr, first_ptr, row, segment, head, p_block,
            0, 0, 0, dy_sb, dy_st, dy_sr, dy_sh, z_sb, z_st, z_sh, mask_sb, mask_st,
            rows, length, heads, groups, ranks,
            HEAD_DIM, RAGGED, PER_RANK, ROPE, True, TOTALS, SEGMENTS, VARLEN, WIDE, PRECISION,
            FAST, Q, RANKS, BLOCK_P, W, V, STAGES,
        )  # fmt: skip


@triton.jit
def mamba3_fwd_kernel(
    x_ptr, mx_ptr, B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, D_ptr, z_ptr, mz_ptr, mo_ptr, mask_ptr,
    token_ptr, scale_ptr, angle_ptr, initial_ptr, totals_ptr, carry_ptr,
    y_ptr, final_ptr, cu_ptr, first_ptr,
    x_sb, x_st, x_sh, z_sb, z_st, z_sh, mask_sb, mask_st,
    rows, length, heads: tl.constexpr, groups, ranks,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, PER_RANK: tl.constexpr, ROPE: tl.constexpr,
    SEGMENTS: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, Q: tl.constexpr, RANKS: tl.constexpr, BLOCK_P: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y (B, T, H, P), or (B, T, R, H, P) if PER_RANK, and the final state (rows, H, P, PITCH).

    One program for a row, segment, head and block of its channels, with the state in registers.
    """
    dot_type: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    ROWS: tl.constexpr = Q * RANKS
    PITCH: tl.constexpr = 2 * W + V
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

    p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, W)
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    size = HEAD_DIM * PITCH
    tile = p[:, None] * PITCH + n[None, :]
    p_in = p < HEAD_DIM
    at_carry = (row * SEGMENTS) * heads + head
    at_state = (row * heads + head) * size + tile
    at_total = at_carry * size + tile
    Sa = entry_tile(initial_ptr, totals_ptr, carry_ptr, at_state, p_in, at_total, heads * size,
                    at_carry, heads, segment, BLOCK_P, W)  # fmt: skip
    Sb = entry_tile(initial_ptr, totals_ptr, carry_ptr, at_state + W, p_in, at_total + W,
                    heads * size, at_carry, heads, segment, BLOCK_P, W)  # fmt: skip
    Sc = None
    if V > 0:
        tile_c = (p[:, None] * PITCH + 2 * W) + tl.arange(0, V)[None, :]
        Sc = entry_tile(initial_ptr, totals_ptr, carry_ptr, (row * heads + head) * size + tile_c,
                        p_in, at_carry * size + tile_c, heads * size, at_carry, heads, segment,
                        BLOCK_P, V)  # fmt: skip
    D = 0.0
    if D_ptr is not None:
        D = tl.load(D_ptr + head).to(tl.float32)

    group = head // (heads // groups)
    x_base = x_ptr + batch * x_sb + head * x_sh
    of_group = (batch * groups + group) * length * (RANKS * PITCH)
    B_base, C_base = B_ptr + of_group, C_ptr + of_group
    B_bias, C_bias = B_bias_ptr, C_bias_ptr
    if B_bias_ptr is not None:
        B_bias = B_bias_ptr + head * (RANKS * PITCH)
    if C_bias_ptr is not None:
        C_bias = C_bias_ptr + head * (RANKS * PITCH)
    ends = token_ptr + (head + 1) * (4 * Q) - 4
    chunk_step = heads * (4 * Q)
    a_end = tl.load(ends + (first + low) * chunk_step, mask=low < high, other=0.0)
    for number in tl.range(low, high, num_stages=STAGES, disable_licm=True):
        c = fresh(number, FAST)
        zero = fresh_zero(number, FAST)
        i = tl.arange(0, ROWS) + zero
        of_token = i // RANKS
        j = tl.arange(0, Q) + zero
        p = p_block * BLOCK_P + tl.arange(0, BLOCK_P) + zero
        v = first + c
        t = start + (v - first) * Q
        in_row = t + of_token < end
        in_tokens = t + j < end
        at = token_ptr + (v * heads + head) * (4 * Q)
        a, b, gamma, _delta = load_token(at, Q, RANKS)
        cos, sin = 1.0, 0.0
        if ROPE:
            cos, sin = rotation(angle_ptr + (v * heads + head) * (Q * W), i, RANKS, FAST, W)
        at_rows = t * (RANKS * PITCH)
        ka, kb = load_rotated(B_base + at_rows, B_bias, cos, sin, i, in_row, dot_type, RAGGED,
                              FAST, RANKS, ROPE, W, PITCH)  # fmt: skip
        qa, qb = load_rotated(C_base + at_rows, C_bias, cos, sin, i, in_row, dot_type, RAGGED,
                              FAST, RANKS, ROPE, W, PITCH)  # fmt: skip
        kc, qc = None, None
        if V > 0:
            kc = load_rest(B_base + at_rows, B_bias, i, in_row, dot_type, RAGGED, FAST, RANKS, W, V,
                           PITCH)  # fmt: skip
            qc = load_rest(C_base + at_rows, C_bias, i, in_row, dot_type, RAGGED, FAST, RANKS, W, V,
                           PITCH)  # fmt: skip
        x = load_inputs(x_base + t * x_st, x_st, mx_ptr, head, j, p, in_tokens, ranks, RAGGED,
                        RANKS, CUT_P, HEAD_DIM)  # fmt: skip

        # Token s reaches t > s with exp2(a_t - a_s) s_s, and itself with gamma; row (t, r) is
        # reached by D besides.
        scores = products(qa, qb, qc, ka, kb, kc, dot_type, PRECISION)
        later = of_token[:, None] > of_token[None, :]
        if WIDE:
            scale = tl.load(scale_ptr + (v * heads + head) * Q + of_token)
            exponent = (a[:, None] - a[None, :]) + (b[:, None] - b[None, :])
            factor = exp2(tl.where(later, exponent, float("-inf")), FAST) * scale[None, :]
            from_entry = exp2(a + b, FAST)
            b_end = tl.load(at + 4 * Q - 3)
            to_exit = exp2((a_end - a) + (b_end - b), FAST) * scale
            whole = exp2(a_end + b_end, FAST)
        else:
            factor = exp2(tl.where(later, a[:, None] - b[None, :], float("-inf")), FAST)
            from_entry = exp2(a, FAST)
            to_exit = exp2(a_end - b, FAST)
            whole = exp2(a_end, FAST)
        same = of_token[:, None] == of_token[None, :]
        scores *= tl.where(same, gamma[:, None], factor)
        if D_ptr is not None:
            scores += tl.where(i[:, None] == i[None, :], D, 0.0)
        y = products(qa, qb, qc, Sa, Sb, Sc, dot_type, PRECISION)
        y *= from_entry[:, None]
        y = tl.dot(scores.to(dot_type), x.to(dot_type), y, input_precision=PRECISION)

        leaving = tl.trans((x.to(tl.float32) * to_exit[:, None]).to(dot_type))
        Sa = Sa * whole + tl.dot(leaving, ka, input_precision=PRECISION)
        Sb = Sb * whole + tl.dot(leaving, kb, input_precision=PRECISION)
        if V > 0:
            Sc = Sc * whole + tl.dot(leaving, kc, input_precision=PRECISION)

        # Asked for a step ahead: nothing waits for these few bytes.
        a_end = tl.load(ends + tl.minimum(v + 1, first + high - 1) * chunk_step)
        if mask_ptr is not None:
            at_mask = mask_ptr + batch * mask_sb + (t + of_token) * mask_st
            is_real = tl.load(at_mask, mask=in_row, other=0) != 0
            y = tl.where(is_real[:, None], y, 0.0)
        if z_ptr is not None:
            at_z = z_ptr + batch * z_sb + head * z_sh + t * z_st
            _z, u, sigmoid = gates(at_z, z_st, mz_ptr, head, j, p, in_tokens, ranks, RAGGED,
                                   RANKS, CUT_P, HEAD_DIM, FAST)  # fmt: skip
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
                y *= load_factor(mo_ptr, head, p, ranks, Q, RANKS, HEAD_DIM)
            if RANKS > 1:
                y = tl.sum(tl.reshape(y, (Q, RANKS, BLOCK_P)), axis=1)
            store_tile(at_y, heads * HEAD_DIM, j, p, in_tokens, y, RAGGED, CUT_P, HEAD_DIM)
    if segment == SEGMENTS - 1:
        store_state(final_ptr + (row * heads + head) * size, p, p_in, Sa, Sb, Sc, CUT_P, W, V)
