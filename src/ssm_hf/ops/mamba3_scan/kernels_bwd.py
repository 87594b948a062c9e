"""Triton kernel of Mamba-3's scan with one rank: gradients of B, C and angles of a chunk.

What pairs of rows have to do with one another is found by `mamba3_pairs_kernel` before.
"""

import triton
import triton.language as tl

from ssm_hf.ops.mamba3_scan.kernels_pairs import (
    load_state,
    of_tokens,
    prefetch,
    prefetch_state,
    prefetch_tokens,
    store_ranks,
    turning,
)
from ssm_hf.ops.mamba3_scan.kernels_tiles import (
    exp2,
    load_gradients,
    load_inputs,
    load_rest,
    load_rotated,
    load_token,
    rotation,
)
from ssm_hf.ops.ssd.kernels import load_tile, place_of_chunk, store_tile

TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def turned_back(d1, d2, cos, sin, ROPE: tl.constexpr):
    """Gradients before the rotation."""
    if ROPE:
        return d1 * cos + d2 * sin, d2 * cos - d1 * sin
    else:
        return d1, d2


@triton.jit
def angle_gradients(
    dphi, dturns, turns_base, delta, i, n, in_row, ddelta_ptr, dphase_ptr, is_first,
    RAGGED: tl.constexpr, Q: tl.constexpr, RANKS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Pass the gradients (in radians) of the angles that tokens add on to Δ, turns and the entry.

    Only the first row of each token counts. Returns dturns with this head's share added.
    """
    if RANKS > 1:
        dphi = tl.where((i % RANKS == 0)[:, None], dphi, 0.0)
    turns = load_tile(turns_base, W, i // RANKS, n, in_row, RAGGED, False, W)
    tl.store(ddelta_ptr, of_tokens(tl.sum(turns * dphi, axis=1) * TWO_PI, Q, RANKS))
    if is_first:
        tl.store(dphase_ptr + n, tl.sum(tl.where((i == 0)[:, None], dphi, 0.0), axis=0))
    return dturns + delta[:, None] * dphi


@triton.jit
def store_turns(
    base, dturns, n, j, in_tokens, RAGGED: tl.constexpr, Q: tl.constexpr, RANKS: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Store a program's share of the gradient of turns (tokens, W)."""
    if RANKS > 1:
        dturns = tl.sum(tl.reshape(dturns, (Q, RANKS, W)), axis=1)
    store_tile(base, W, j, n, in_tokens, dturns, RAGGED, False, W)


@triton.jit
def weights_of_rows(
    token_ptr, scale_ptr, here, i, EXIT: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Of rows i: Δ, and the weight with which they leave (EXIT), or meet the state that enters."""
    at = token_ptr + here * (4 * Q)
    a, b, _gamma, delta = load_token(at, Q, RANKS)
    if EXIT:
        a_end = tl.load(at + 4 * Q - 4)
        if WIDE:
            scale = tl.load(scale_ptr + here * Q + i // RANKS)
            weight = scale * exp2((a_end - a) + (tl.load(at + 4 * Q - 3) - b), FAST)
        else:
            weight = exp2(a_end - b, FAST)
    else:
        weight = exp2(a + b, FAST) if WIDE else exp2(a, FAST)
    return delta, weight


@triton.jit
def load_outputs(
    x_ptr, mx_ptr, dy_ptr, z_ptr, mz_ptr, mo_ptr, batch, token, head, j, p, in_tokens, is_real,
    ranks, x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh,
    EXIT: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr, PER_RANK: tl.constexpr,
    RANKS: tl.constexpr, CUT_P: tl.constexpr, HEAD_DIM: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Rows of x (EXIT), or of the gradient of y."""
    if EXIT:
        at = x_ptr + batch * x_sb + head * x_sh + token * x_st
        u = load_inputs(at, x_st, mx_ptr, head, j, p, in_tokens, ranks, RAGGED, RANKS, CUT_P,
                        HEAD_DIM)  # fmt: skip
    else:
        at = dy_ptr + batch * dy_sb + head * dy_sh + token * dy_st
        z_base = z_ptr
        if z_ptr is not None:
            z_base = z_ptr + batch * z_sb + head * z_sh + token * z_st
        u = load_gradients(at, dy_st, dy_sr, z_base, z_st, mz_ptr, mo_ptr, head, j, p, is_real,
                           ranks, MASKED, RANKS, PER_RANK, CUT_P, HEAD_DIM, FAST)  # fmt: skip
    return u


@triton.jit
def of_pairs(
    x_ptr, mx_ptr, dy_ptr, z_ptr, mz_ptr, mo_ptr, own_base, own_bias_ptr, other_base,
    other_bias_ptr, token_ptr, scale_ptr, turns_base, angle_ptr, states_ptr, pairs_ptr, turn_ptr,
    extra_ptr, last_ptr, d_base, dbias_ptr, ddelta_ptr, dturns_base, dphase_ptr,
    batch, token, end, is_first, row, in_row, is_real, v, head_0,
    x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh,
    length, heads, ranks,
    EXIT: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr,
    PER_RANK: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, Q: tl.constexpr, RANKS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Tiles a and b of the gradient of B (EXIT), whose other is C, or of C, whose other is B."""
    dot_type: tl.constexpr = tl.float32 if WIDE else own_base.dtype.element_ty
    ROWS: tl.constexpr = Q * RANKS
    PITCH: tl.constexpr = 2 * W + V
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    i = tl.arange(0, ROWS)
    j = tl.arange(0, Q)
    in_tokens = token + j < end
    n = tl.arange(0, W)
    total_a = tl.zeros((ROWS, W), dtype=tl.float32)
    total_b = tl.zeros((ROWS, W), dtype=tl.float32)
    dturns = tl.zeros((ROWS, W), dtype=tl.float32)
    for step in tl.range(0, HEADS, num_stages=STAGES, disable_licm=True):
        head = head_0 + step
        here = v * heads + head
        if PREFETCH:
            more = step + 1 < HEADS
            if EXIT:
                prefetch_tokens(x_ptr, batch, head + 1, token, end, x_sb, x_st, x_sh, more,
                                HEAD_DIM, Q)  # fmt: skip
            else:
                prefetch_tokens(dy_ptr, batch, head + 1, token, end, dy_sb, dy_st, dy_sh, more,
                                HEAD_DIM, Q)  # fmt: skip
                prefetch_tokens(z_ptr, batch, head + 1, token, end, z_sb, z_st, z_sh, more,
                                HEAD_DIM, Q)  # fmt: skip
            prefetch_state(states_ptr, here + 1, more & (token < end), 0, 2 * W, HEAD_DIM, PITCH,
                           BLOCK_P, P_BLOCKS)  # fmt: skip
            prefetch(pairs_ptr + (here + 1) * (ROWS * ROWS) + i * ROWS, more & (i < ROWS))
        delta, weight = weights_of_rows(token_ptr, scale_ptr, here, i, EXIT, WIDE, FAST, Q,
                                        RANKS)  # fmt: skip
        cos, sin = 1.0, 0.0
        if ROPE:
            cos, sin = rotation(angle_ptr + here * (Q * W), i, RANKS, FAST, W)
        own_bias, other_bias = own_bias_ptr, other_bias_ptr
        if own_bias_ptr is not None:
            own_bias = own_bias_ptr + head * (RANKS * PITCH)
        if other_bias_ptr is not None:
            other_bias = other_bias_ptr + head * (RANKS * PITCH)
        d_a, d_b = tl.zeros((ROWS, W), dtype=tl.float32), tl.zeros((ROWS, W), dtype=tl.float32)
        for p_block in tl.static_range(P_BLOCKS):
            p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
            u = load_outputs(
                x_ptr, mx_ptr, dy_ptr, z_ptr, mz_ptr, mo_ptr, batch, token, head, j, p, in_tokens,
                is_real, ranks, x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh,
                EXIT, RAGGED, MASKED, PER_RANK, RANKS, CUT_P, HEAD_DIM, FAST,
            )  # fmt: skip
            u = u.to(dot_type)
            p_in = p < tl.where(token < end, HEAD_DIM, 0)
            at_S = states_ptr + here * (HEAD_DIM * PITCH)
            Sa = load_state(at_S, p, p_in, dot_type, RAGGED or CUT_P, W, PITCH)
            Sb = load_state(at_S + W, p, p_in, dot_type, RAGGED or CUT_P, W, PITCH)
            d_a = tl.dot(u, Sa, d_a, input_precision=PRECISION)
            d_b = tl.dot(u, Sb, d_b, input_precision=PRECISION)
        d_a *= weight[:, None]
        d_b *= weight[:, None]
        if ROPE:
            own_a, own_b = load_rotated(own_base, own_bias, cos, sin, i, in_row, dot_type, RAGGED,
                                        FAST, RANKS, ROPE, W, PITCH)  # fmt: skip
            # All later tokens together turn against the state that enters, and what a token
            # leaves does not turn with them.
            against = turning(own_a, own_b, d_a, d_b) if EXIT else tl.load(turn_ptr + here * W + n)
        other_a, other_b = load_rotated(other_base, other_bias, cos, sin, i, in_row, dot_type,
                                        RAGGED, FAST, RANKS, ROPE, W, PITCH)  # fmt: skip
        pairs = load_tile(pairs_ptr + here * (ROWS * ROWS), ROWS, i, i, in_row, False, False, ROWS)
        if not EXIT:
            pairs = tl.trans(pairs)
        d_a = tl.dot(pairs, other_a, d_a, input_precision=PRECISION)
        d_b = tl.dot(pairs, other_b, d_b, input_precision=PRECISION)
        if ROPE:
            # A sum over the tokens from one on, as what those before it leave of the whole: scans
            # from the end take Triton twice as long.
            of_row = turning(own_a, own_b, d_a, d_b)
            whole = tl.sum(of_row - against, axis=0) if EXIT else tl.sum(of_row, axis=0) - against
            dphi = (whole[None, :] + of_row) - tl.cumsum(of_row, axis=0)
            if extra_ptr is not None:
                extra = tl.load(extra_ptr + (row * heads + head) * W + n)[None, :]
                if last_ptr is not None:
                    in_last = token + i // RANKS >= tl.load(last_ptr + row)
                    extra = tl.where(in_last[:, None], extra, 0.0)
                dphi += extra
            dturns = angle_gradients(
                dphi, dturns, turns_base, delta, i, n, in_row, ddelta_ptr + here * Q + j,
                dphase_ptr + (row * heads + head) * W, is_first, RAGGED, Q, RANKS, W,
            )  # fmt: skip
        d_a, d_b = turned_back(d_a, d_b, cos, sin, ROPE)
        total_a += d_a
        total_b += d_b
        if dbias_ptr is not None:
            to = dbias_ptr + here * ranks * PITCH
            store_ranks(to, PITCH, d_a, n, n < W, ranks, Q, RANKS, W)
            store_ranks(to + W, PITCH, d_b, n, n < W, ranks, Q, RANKS, W)
    store_tile(d_base, PITCH, i, n, in_row, total_a, RAGGED, False, W)
    store_tile(d_base + W, PITCH, i, n, in_row, total_b, RAGGED, False, W)
    if ROPE:
        store_turns(dturns_base, dturns, n, j, in_tokens, RAGGED, Q, RANKS, W)


@triton.jit
def rest_of_head(
    x_ptr, mx_ptr, dy_ptr, z_ptr, mz_ptr, mo_ptr, other_base, other_bias_ptr, token_ptr, scale_ptr,
    states_ptr, dbias_ptr, pairs, batch, token, end, i, in_row, is_real, here, head,
    x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh, ranks,
    EXIT: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr,
    PER_RANK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr, BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """One head's tile c of the gradient of B (EXIT), whose other is C, or of C."""
    dot_type: tl.constexpr = tl.float32 if WIDE else other_base.dtype.element_ty
    ROWS: tl.constexpr = Q * RANKS
    PITCH: tl.constexpr = 2 * W + V
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    n = tl.arange(0, V)
    j = tl.arange(0, Q)
    in_tokens = token + j < end
    _delta, weight = weights_of_rows(token_ptr, scale_ptr, here, i, EXIT, WIDE, FAST, Q,
                                        RANKS)  # fmt: skip
    bias = other_bias_ptr
    if other_bias_ptr is not None:
        bias = other_bias_ptr + head * (RANKS * PITCH)
    d = tl.zeros((ROWS, V), dtype=tl.float32)
    for p_block in tl.static_range(P_BLOCKS):
        p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
        u = load_outputs(
            x_ptr, mx_ptr, dy_ptr, z_ptr, mz_ptr, mo_ptr, batch, token, head, j, p, in_tokens,
            is_real, ranks, x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh,
            EXIT, RAGGED, MASKED, PER_RANK, RANKS, CUT_P, HEAD_DIM, FAST,
        )  # fmt: skip
        p_in = p < tl.where(token < end, HEAD_DIM, 0)
        at_S = states_ptr + here * (HEAD_DIM * PITCH) + 2 * W
        S = load_state(at_S, p, p_in, dot_type, RAGGED or CUT_P, V, PITCH)
        d = tl.dot(u.to(dot_type), S, d, input_precision=PRECISION)
    d *= weight[:, None]
    other = load_rest(other_base, bias, i, in_row, dot_type, RAGGED, FAST, RANKS, W, V, PITCH)
    if EXIT:
        d = tl.dot(pairs, other, d, input_precision=PRECISION)
    else:
        d = tl.dot(tl.trans(pairs), other, d, input_precision=PRECISION)
    if dbias_ptr is not None:
        to = dbias_ptr + here * ranks * PITCH + 2 * W
        store_ranks(to, PITCH, d, n, n < V, ranks, Q, RANKS, V)
    return d


@triton.jit
def of_rest(
    x_ptr, mx_ptr, dy_ptr, z_ptr, mz_ptr, mo_ptr, B_base, B_bias_ptr, C_base, C_bias_ptr,
    token_ptr, scale_ptr, states_ptr, dstates_ptr, pairs_ptr, dB_base, dB_bias_ptr, dC_base,
    dC_bias_ptr, batch, token, end, in_row, is_real, v, head_0,
    x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh, heads, ranks,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr, PER_RANK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, Q: tl.constexpr,
    RANKS: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Tile c of the gradients of B and C."""
    ROWS: tl.constexpr = Q * RANKS
    PITCH: tl.constexpr = 2 * W + V
    i = tl.arange(0, ROWS)
    n = tl.arange(0, V)
    dB = tl.zeros((ROWS, V), dtype=tl.float32)
    dC = tl.zeros((ROWS, V), dtype=tl.float32)
    for step in tl.range(0, HEADS, num_stages=STAGES, disable_licm=True):
        head = head_0 + step
        here = v * heads + head
        if PREFETCH:
            more = (step + 1 < HEADS) & (token < end)
            prefetch_state(dstates_ptr, here + 1, more, 2 * W, PITCH, HEAD_DIM, PITCH, BLOCK_P,
                           P_BLOCKS)  # fmt: skip
            prefetch_state(states_ptr, here + 1, more, 2 * W, PITCH, HEAD_DIM, PITCH, BLOCK_P,
                           P_BLOCKS)  # fmt: skip
        pairs = load_tile(pairs_ptr + here * (ROWS * ROWS), ROWS, i, i, in_row, False, False, ROWS)
        dB += rest_of_head(
            x_ptr, mx_ptr, None, None, None, None, C_base, C_bias_ptr, token_ptr, scale_ptr,
            dstates_ptr, dB_bias_ptr, pairs, batch, token, end, i, in_row, is_real, here, head,
            x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh, ranks,
            True, HEAD_DIM, RAGGED, MASKED, PER_RANK, WIDE, PRECISION, FAST, Q, RANKS, BLOCK_P,
            P_BLOCKS, W, V,
        )  # fmt: skip
        dC += rest_of_head(
            None, None, dy_ptr, z_ptr, mz_ptr, mo_ptr, B_base, B_bias_ptr, token_ptr, scale_ptr,
            states_ptr, dC_bias_ptr, pairs, batch, token, end, i, in_row, is_real, here, head,
            x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh, ranks,
            False, HEAD_DIM, RAGGED, MASKED, PER_RANK, WIDE, PRECISION, FAST, Q, RANKS, BLOCK_P,
            P_BLOCKS, W, V,
        )  # fmt: skip
    store_tile(dB_base + 2 * W, PITCH, i, n, in_row, dB, RAGGED, False, V)
    store_tile(dC_base + 2 * W, PITCH, i, n, in_row, dC, RAGGED, False, V)


@triton.jit
def mamba3_bwd_kernel(
    x_ptr, mx_ptr, B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, z_ptr, mz_ptr, mo_ptr, mask_ptr,
    dy_ptr, token_ptr, scale_ptr, turns_ptr, angle_ptr, states_ptr, dstates_ptr, pairs_ptr,
    turn_ptr, extra_ptr, last_ptr, dB_ptr, dB_bias_ptr, dC_ptr, dC_bias_ptr, grad_ptr, dturns_ptr,
    dphase_ptr, cu_ptr, first_ptr, row_ptr,
    x_sb, x_st, x_sh, z_sb, z_st, z_sh, mask_sb, mask_st, dy_sb, dy_st, dy_sr, dy_sh,
    rows, length, heads: tl.constexpr, groups, ranks, plane, part, turns_part, phase_part,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, PER_RANK: tl.constexpr, ROPE: tl.constexpr,
    VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr, HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Gradients of B, C and the angles of a chunk.

    Two programs for a chunk, a group and HEADS of its heads form the columns of dB and dC that
    turn, a third those that do not. Sums over heads are made in registers and written in parts,
    (HEAD_BLOCKS, B, G, T, RANKS, PITCH), that are added up later; so is the gradient of turns, (2 *
    G * HEAD_BLOCKS, B, T, W). grad (6, chunks, H, Q) has two planes for the gradient of Δ through
    the angles. Of each chunk and head: dB_bias, dC_bias (R, PITCH). dphase (2, rows, H, W) are the
    gradients of the angles rows start from. extra (rows, H, W) is added to the gradients of angles
    from the token last (rows,) on.
    """
    MASKED: tl.constexpr = RAGGED or mask_ptr is not None
    ROWS: tl.constexpr = Q * RANKS
    PITCH: tl.constexpr = 2 * W + V
    ROLES: tl.constexpr = 3 if V > 0 else 2
    pid = tl.program_id(0) // ROLES
    role = tl.program_id(0) % ROLES
    block = pid % HEAD_BLOCKS
    group = (pid // HEAD_BLOCKS) % groups
    v = pid // (HEAD_BLOCKS * groups)
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    row = batch
    is_first = token == 0
    if VARLEN:
        row = tl.minimum(tl.load(row_ptr + v), rows - 1).to(tl.int64)
        is_first = token == tl.load(cu_ptr + row)
    v = v.to(tl.int64)
    i = tl.arange(0, ROWS)
    in_row = token + i // RANKS < end
    j = tl.arange(0, Q)
    is_real = token + j < end
    if mask_ptr is not None:
        at_mask = mask_ptr + batch * mask_sb + (token + j) * mask_st
        is_real = is_real & (tl.load(at_mask, mask=is_real, other=0) != 0)
    head_0 = group * (HEADS * HEAD_BLOCKS) + block * HEADS
    at_rows = ((batch * groups + group) * length + token) * (RANKS * PITCH)
    at_turns = (batch * length + token) * W
    turns_base = turns_ptr
    dturns_base = dturns_ptr
    if ROPE:
        turns_base = turns_ptr + at_turns
        share = (role * groups + group) * HEAD_BLOCKS + block
        dturns_base = dturns_ptr + share * turns_part + at_turns
        dphase_ptr += role * phase_part
    B_base, C_base = B_ptr + at_rows, C_ptr + at_rows
    dB_base, dC_base = dB_ptr + block * part + at_rows, dC_ptr + block * part + at_rows
    if role == 0:
        of_pairs(
            x_ptr, mx_ptr, None, None, None, None, B_base, B_bias_ptr, C_base, C_bias_ptr,
            token_ptr, scale_ptr, turns_base, angle_ptr, dstates_ptr, pairs_ptr, turn_ptr,
            None, None, dB_base, dB_bias_ptr, grad_ptr + 4 * plane, dturns_base, dphase_ptr,
            batch, token, end, is_first, row, in_row, is_real, v, head_0,
            x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh, length, heads, ranks,
            True, HEAD_DIM, RAGGED, MASKED, PER_RANK, ROPE, WIDE, PRECISION, FAST, Q, RANKS, HEADS,
            BLOCK_P, P_BLOCKS, W, V, STAGES, PREFETCH,
        )  # fmt: skip
    elif role == 1:
        of_pairs(
            None, None, dy_ptr, z_ptr, mz_ptr, mo_ptr, C_base, C_bias_ptr, B_base, B_bias_ptr,
            token_ptr, scale_ptr, turns_base, angle_ptr, states_ptr, pairs_ptr, turn_ptr,
            extra_ptr, last_ptr, dC_base, dC_bias_ptr, grad_ptr + 5 * plane, dturns_base,
            dphase_ptr, batch, token, end, is_first, row, in_row, is_real, v, head_0,
            x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh, length, heads, ranks,
            False, HEAD_DIM, RAGGED, MASKED, PER_RANK, ROPE, WIDE, PRECISION, FAST, Q, RANKS,
            HEADS, BLOCK_P, P_BLOCKS, W, V, STAGES, PREFETCH,
        )  # fmt: skip
    elif V > 0:
        of_rest(
            x_ptr, mx_ptr, dy_ptr, z_ptr, mz_ptr, mo_ptr, B_base, B_bias_ptr, C_base, C_bias_ptr,
            token_ptr, scale_ptr, states_ptr, dstates_ptr, pairs_ptr, dB_base, dB_bias_ptr,
            dC_base, dC_bias_ptr, batch, token, end, in_row, is_real, v, head_0,
            x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh, heads, ranks,
            HEAD_DIM, RAGGED, MASKED, PER_RANK, WIDE, PRECISION, FAST, Q, RANKS, HEADS, BLOCK_P,
            P_BLOCKS, W, V, STAGES, PREFETCH,
        )  # fmt: skip
