"""Triton kernels of Mamba-3's scan: gradients of one chunk, all chunks at once."""

import triton
import triton.language as tl

from ssm_hf.ops.mamba3_scan.kernels import (
    gates,
    load_factor,
    load_gradients,
    load_inputs,
    load_rows,
    load_token,
    rotated,
    rotation,
)
from ssm_hf.ops.ssd.kernels import load_tile, place_of_chunk, store_tile

TWO_PI = tl.constexpr(6.283185307179586)


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
def turning(k1, k2, d1, d2):
    """Gradients of the angles of k1 and k2 whose gradients are d1 and d2."""
    return k1.to(tl.float32) * d2 - k2.to(tl.float32) * d1


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
def from_keys(
    x_ptr, mx_ptr, B_base, B_bias_ptr, C_base, C_bias_ptr, D_ptr, z_ptr, mz_ptr, mo_ptr, dy_ptr,
    token_ptr, scale_ptr, turns_base, phase_ptr, dstates_ptr,
    dx_ptr, dmx_ptr, dB_base, dB_bias_ptr, dD_ptr, grad_ptr, dturns_base, dphase_ptr,
    batch, token, end, is_first, row, in_row, is_real, v, head_0,
    x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh,
    length, heads, ranks, plane,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr, PER_RANK: tl.constexpr,
    ROPE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr,
    P_BLOCKS: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of x, B and what decays on the way out; see `mamba3_bwd_kernel`.

    Tiles of pairs of rows are [s, t], s <= t.
    """
    dot_type: tl.constexpr = tl.float32 if WIDE else B_base.dtype.element_ty
    ROWS: tl.constexpr = Q * RANKS
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    i = tl.arange(0, ROWS)
    of_token = i // RANKS
    j = tl.arange(0, Q)
    n = tl.arange(0, W)
    size = HEAD_DIM * 2 * W
    dB1 = tl.zeros((ROWS, W), dtype=tl.float32)
    dB2 = tl.zeros((ROWS, W), dtype=tl.float32)
    dturns = tl.zeros((ROWS, W), dtype=tl.float32)
    for step in tl.range(0, HEADS, num_stages=STAGES):
        head = head_0 + step
        here = v * heads + head
        at = token_ptr + here * (4 * Q)
        a, b, gamma, delta = load_token(at, Q, RANKS)
        a_end = tl.load(at + 4 * Q - 4)
        if WIDE:
            scale = tl.load(scale_ptr + here * Q + of_token)
            exponent = (a[None, :] - a[:, None]) + (b[None, :] - b[:, None])
            to_exit = tl.exp2((a_end - a) + (tl.load(at + 4 * Q - 3) - b))
        else:
            scale = tl.exp2(a - b)
            exponent = a[None, :] - a[:, None]
            to_exit = tl.exp2(a_end - a)
        cos, sin = 1.0, 0.0
        if ROPE:
            entry = tl.load(phase_ptr + here * W + n)
            cos, sin = rotation(turns_base, entry, delta, i, n, in_row, RAGGED, RANKS, FAST, W)
        B_bias, C_bias = B_bias_ptr, C_bias_ptr
        if B_bias_ptr is not None:
            B_bias = B_bias_ptr + head * (RANKS * 2 * W)
        if C_bias_ptr is not None:
            C_bias = C_bias_ptr + head * (RANKS * 2 * W)
        k1, k2 = load_rows(B_base, B_bias, i, n, in_row, RAGGED, RANKS, W)
        k1, k2 = rotated(k1, k2, cos, sin, dot_type, ROPE)
        q1, q2 = load_rows(C_base, C_bias, i, n, in_row, RAGGED, RANKS, W)
        q1, q2 = rotated(q1, q2, cos, sin, dot_type, ROPE)
        kq = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
        kq = tl.dot(k2, tl.trans(q2), kq, input_precision=PRECISION)

        at_x = x_ptr + batch * x_sb + head * x_sh + token * x_st
        at_dy = dy_ptr + batch * dy_sb + head * dy_sh + token * dy_st
        z_base = z_ptr
        if z_ptr is not None:
            z_base = z_ptr + batch * z_sb + head * z_sh + token * z_st
        at_dS = dstates_ptr + here * size
        xdy = tl.zeros((ROWS, ROWS), dtype=tl.float32)
        d1 = tl.zeros((ROWS, W), dtype=tl.float32)
        d2 = tl.zeros((ROWS, W), dtype=tl.float32)
        left = tl.zeros((ROWS,), dtype=tl.float32)
        for p_block in tl.static_range(P_BLOCKS):
            p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
            x = load_inputs(at_x, x_st, mx_ptr, head, i, p, in_row, ranks, RAGGED, RANKS, CUT_P,
                            HEAD_DIM)  # fmt: skip
            dy = load_gradients(at_dy, dy_st, dy_sr, z_base, z_st, mz_ptr, mo_ptr, head, i, p,
                                is_real, ranks, MASKED, RANKS, PER_RANK, CUT_P, HEAD_DIM)  # fmt: skip
            # Empty chunks (VARLEN) have no states; RAGGED covers them.
            rows = p < tl.where(token < end, HEAD_DIM, 0)
            dS1 = load_tile(at_dS, 2 * W, p, n, rows, RAGGED or CUT_P, False, W).to(dot_type)
            dS2 = load_tile(at_dS + W, 2 * W, p, n, rows, RAGGED or CUT_P, False, W).to(dot_type)
            xdy = tl.dot(x.to(dot_type), tl.trans(dy.to(dot_type)), xdy, input_precision=PRECISION)
            d1 = tl.dot(x.to(dot_type), dS1, d1, input_precision=PRECISION)
            d2 = tl.dot(x.to(dot_type), dS2, d2, input_precision=PRECISION)
            dx = tl.dot(k1, tl.trans(dS1), input_precision=PRECISION)
            dx = tl.dot(k2, tl.trans(dS2), dx, input_precision=PRECISION)
            dx *= to_exit[:, None]
            left += tl.sum(x.to(tl.float32) * dx, axis=1)
        out = (scale * to_exit)[:, None]
        d1 *= out
        d2 *= out
        leaving = tl.zeros((W,), dtype=tl.float32)
        if ROPE:
            leaving = tl.sum(turning(k1, k2, d1, d2), axis=0)

        # s reaches t > s with M s_s, its own token with gamma
        later = of_token[:, None] < of_token[None, :]
        same = of_token[:, None] == of_token[None, :]
        M = tl.exp2(tl.where(later, exponent, float("-inf")))
        pairs = xdy * kq
        on_self = tl.sum(tl.where(same, pairs, 0.0), axis=1)
        pairs *= M
        dscale = tl.sum(pairs, axis=1)
        if WIDE:
            # The same numbers with both signs: over a chunk, what they have in common cancels.
            pairs *= scale[:, None]
            da = tl.sum(pairs, axis=0) - tl.sum(pairs, axis=1)
        else:
            da = tl.sum(pairs * scale[:, None], axis=0) - scale * dscale
        M = tl.where(same, gamma[:, None], M * scale[:, None])
        scores = kq * M
        diagonal = i[:, None] == i[None, :]
        if D_ptr is not None:
            scores += tl.where(diagonal, tl.load(D_ptr + head).to(tl.float32), 0.0)
            tl.store(dD_ptr + here, tl.sum(tl.sum(tl.where(diagonal, xdy, 0.0), axis=1), axis=0))
        scores = scores.to(dot_type)
        W_pairs = (xdy * M).to(dot_type)

        for p_block in tl.static_range(P_BLOCKS):
            p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
            if P_BLOCKS > 1:
                dy = load_gradients(
                    at_dy, dy_st, dy_sr, z_base, z_st, mz_ptr, mo_ptr, head, i, p, is_real, ranks,
                    MASKED, RANKS, PER_RANK, CUT_P, HEAD_DIM,
                )  # fmt: skip
                rows = p < tl.where(token < end, HEAD_DIM, 0)
                dS1 = load_tile(at_dS, 2 * W, p, n, rows, RAGGED or CUT_P, False, W)
                dS2 = load_tile(at_dS + W, 2 * W, p, n, rows, RAGGED or CUT_P, False, W)
                dx = tl.dot(k1, tl.trans(dS1.to(dot_type)), input_precision=PRECISION)
                dx = tl.dot(k2, tl.trans(dS2.to(dot_type)), dx, input_precision=PRECISION)
                dx *= to_exit[:, None]
            dx *= scale[:, None]
            dx = tl.dot(scores, dy.to(dot_type), dx, input_precision=PRECISION)
            if mx_ptr is not None:
                x = load_tile(at_x, x_st, of_token, p, in_row, RAGGED, CUT_P, HEAD_DIM)
                to = dmx_ptr + here * ranks * HEAD_DIM
                store_ranks(to, HEAD_DIM, dx * x.to(tl.float32), p, p < HEAD_DIM, ranks, Q, RANKS,
                            BLOCK_P)  # fmt: skip
                dx *= load_factor(mx_ptr, head, i, p, ranks, RANKS, CUT_P, HEAD_DIM)
            if RANKS > 1:
                dx = tl.sum(tl.reshape(dx, (Q, RANKS, BLOCK_P)), axis=1)
            to = dx_ptr + ((batch * length + token) * heads + head) * HEAD_DIM
            in_tokens = token + j < end
            store_tile(to, heads * HEAD_DIM, j, p, in_tokens, dx, RAGGED, CUT_P, HEAD_DIM)

        d1 = tl.dot(W_pairs, q1, d1, input_precision=PRECISION)
        d2 = tl.dot(W_pairs, q2, d2, input_precision=PRECISION)
        if ROPE:
            # A token turns itself and all that follow it, but not what leaves with the state.
            dphi = tl.cumsum(turning(k1, k2, d1, d2), axis=0, reverse=True) - leaving[None, :]
            dturns = angle_gradients(
                dphi, dturns, turns_base, delta, i, n, in_row, grad_ptr + 5 * plane + here * Q + j,
                dphase_ptr + (row * heads + head) * W, is_first, RAGGED, Q, RANKS, W,
            )  # fmt: skip
        d1, d2 = turned_back(d1, d2, cos, sin, ROPE)
        dB1 += d1
        dB2 += d2
        if dB_bias_ptr is not None:
            to = dB_bias_ptr + here * ranks * (2 * W)
            store_ranks(to, 2 * W, d1, n, n < W, ranks, Q, RANKS, W)
            store_ranks(to + W, 2 * W, d2, n, n < W, ranks, Q, RANKS, W)
        at_grad = grad_ptr + here * Q + j
        tl.store(at_grad, of_tokens(da, Q, RANKS))
        tl.store(at_grad + 2 * plane, of_tokens(left * scale, Q, RANKS))
        tl.store(at_grad + 3 * plane, of_tokens(dscale + left, Q, RANKS))
        tl.store(at_grad + 4 * plane, of_tokens(on_self, Q, RANKS))
    store_tile(dB_base, 2 * W, i, n, in_row, dB1, RAGGED, False, W)
    store_tile(dB_base + W, 2 * W, i, n, in_row, dB2, RAGGED, False, W)
    if ROPE:
        store_turns(dturns_base, dturns, n, j, token + j < end, RAGGED, Q, RANKS, W)


@triton.jit
def from_queries(
    x_ptr, mx_ptr, B_base, B_bias_ptr, C_base, C_bias_ptr, D_ptr, z_ptr, mz_ptr, mo_ptr, dy_ptr,
    token_ptr, turns_base, phase_ptr, scale_ptr, states_ptr, dstates_ptr, extra_ptr, last_ptr,
    dz_ptr, dmz_ptr, dmo_ptr, dC_base, dC_bias_ptr, grad_ptr, dturns_base, dphase_ptr,
    batch, token, end, is_first, row, in_row, is_real, v, head_0,
    x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh,
    length, heads, ranks, plane,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr, PER_RANK: tl.constexpr,
    ROPE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr,
    P_BLOCKS: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of C, gate and mimo_o, and what decays of the state; see `mamba3_bwd_kernel`.

    Tiles of pairs of rows are [t, s], s <= t.
    """
    dot_type: tl.constexpr = tl.float32 if WIDE else C_base.dtype.element_ty
    ROWS: tl.constexpr = Q * RANKS
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    # The gradients of gate and mimo_o need y before them.
    NEEDS_Y: tl.constexpr = z_ptr is not None or mo_ptr is not None
    i = tl.arange(0, ROWS)
    of_token = i // RANKS
    j = tl.arange(0, Q)
    n = tl.arange(0, W)
    size = HEAD_DIM * 2 * W
    dC1 = tl.zeros((ROWS, W), dtype=tl.float32)
    dC2 = tl.zeros((ROWS, W), dtype=tl.float32)
    dturns = tl.zeros((ROWS, W), dtype=tl.float32)
    for step in tl.range(0, HEADS, num_stages=STAGES):
        head = head_0 + step
        here = v * heads + head
        at = token_ptr + here * (4 * Q)
        a, b, gamma, delta = load_token(at, Q, RANKS)
        a_end = tl.load(at + 4 * Q - 4)
        later = of_token[:, None] > of_token[None, :]
        if WIDE:
            scale = tl.load(scale_ptr + here * Q + of_token)
            exponent = (a[:, None] - a[None, :]) + (b[:, None] - b[None, :])
            factor = tl.exp2(tl.where(later, exponent, float("-inf"))) * scale[None, :]
            from_entry = tl.exp2(a + b)
            whole = tl.exp2(a_end + tl.load(at + 4 * Q - 3))
        else:
            factor = tl.exp2(tl.where(later, a[:, None] - b[None, :], float("-inf")))
            from_entry = tl.exp2(a)
            whole = tl.exp2(a_end)
        same = of_token[:, None] == of_token[None, :]
        factor = tl.where(same, gamma[:, None], factor)
        cos, sin = 1.0, 0.0
        if ROPE:
            entry = tl.load(phase_ptr + here * W + n)
            cos, sin = rotation(turns_base, entry, delta, i, n, in_row, RAGGED, RANKS, FAST, W)
        B_bias, C_bias = B_bias_ptr, C_bias_ptr
        if B_bias_ptr is not None:
            B_bias = B_bias_ptr + head * (RANKS * 2 * W)
        if C_bias_ptr is not None:
            C_bias = C_bias_ptr + head * (RANKS * 2 * W)
        k1, k2 = load_rows(B_base, B_bias, i, n, in_row, RAGGED, RANKS, W)
        k1, k2 = rotated(k1, k2, cos, sin, dot_type, ROPE)
        q1, q2 = load_rows(C_base, C_bias, i, n, in_row, RAGGED, RANKS, W)
        q1, q2 = rotated(q1, q2, cos, sin, dot_type, ROPE)

        at_x = x_ptr + batch * x_sb + head * x_sh + token * x_st
        at_dy = dy_ptr + batch * dy_sb + head * dy_sh + token * dy_st
        z_base = z_ptr
        if z_ptr is not None:
            z_base = z_ptr + batch * z_sb + head * z_sh + token * z_st
        if NEEDS_Y:
            scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION) * factor
            if D_ptr is not None:
                D = tl.load(D_ptr + head).to(tl.float32)
                scores += tl.where(i[:, None] == i[None, :], D, 0.0)
            scores = scores.to(dot_type)
        dyx = tl.zeros((ROWS, ROWS), dtype=tl.float32)
        d1 = tl.zeros((ROWS, W), dtype=tl.float32)
        d2 = tl.zeros((ROWS, W), dtype=tl.float32)
        kept = 0.0
        turn = tl.zeros((W,), dtype=tl.float32)
        for p_block in tl.static_range(P_BLOCKS):
            p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
            x = load_inputs(at_x, x_st, mx_ptr, head, i, p, in_row, ranks, RAGGED, RANKS, CUT_P,
                            HEAD_DIM).to(dot_type)  # fmt: skip
            rows = p < tl.where(token < end, HEAD_DIM, 0)
            at_S = here * size
            S1 = load_tile(states_ptr + at_S, 2 * W, p, n, rows, RAGGED or CUT_P, False, W)
            S2 = load_tile(states_ptr + at_S + W, 2 * W, p, n, rows, RAGGED or CUT_P, False, W)
            dS1 = load_tile(dstates_ptr + at_S, 2 * W, p, n, rows, RAGGED or CUT_P, False, W)
            dS2 = load_tile(dstates_ptr + at_S + W, 2 * W, p, n, rows, RAGGED or CUT_P, False, W)
            dS1, dS2 = dS1.to(tl.float32), dS2.to(tl.float32)
            products = S1.to(tl.float32) * dS1 + S2.to(tl.float32) * dS2
            kept += tl.sum(tl.sum(products, axis=1), axis=0)
            if ROPE:
                turn += tl.sum(turning(S1, S2, dS1, dS2), axis=0)
            S1, S2 = S1.to(dot_type), S2.to(dot_type)
            if NEEDS_Y:
                y = tl.dot(q1, tl.trans(S1), input_precision=PRECISION)
                y = tl.dot(q2, tl.trans(S2), y, input_precision=PRECISION)
                y *= from_entry[:, None]
                y = tl.dot(scores, x, y, input_precision=PRECISION)
                dy = load_tile(at_dy, dy_st, of_token, p, is_real, MASKED, CUT_P, HEAD_DIM).to(
                    tl.float32
                )
                dmo = dy * y
                if mo_ptr is not None:
                    dy *= load_factor(mo_ptr, head, i, p, ranks, RANKS, CUT_P, HEAD_DIM)
                if z_ptr is not None:
                    z, u, sigmoid = gates(z_base, z_st, mz_ptr, head, i, p, in_row, ranks, RAGGED,
                                          RANKS, CUT_P, HEAD_DIM)  # fmt: skip
                    dmo *= u * sigmoid
                    du = dy * y * (sigmoid * (1.0 + u * (1.0 - sigmoid)))
                    dy *= u * sigmoid
                    if mz_ptr is not None:
                        to = dmz_ptr + here * ranks * HEAD_DIM
                        store_ranks(to, HEAD_DIM, du * z, p, p < HEAD_DIM, ranks, Q, RANKS, BLOCK_P)
                        du *= load_factor(mz_ptr, head, i, p, ranks, RANKS, CUT_P, HEAD_DIM)
                    if RANKS > 1:
                        du = tl.sum(tl.reshape(du, (Q, RANKS, BLOCK_P)), axis=1)
                    to = dz_ptr + ((batch * length + token) * heads + head) * HEAD_DIM
                    in_tokens = token + j < end
                    store_tile(to, heads * HEAD_DIM, j, p, in_tokens, du, RAGGED, CUT_P, HEAD_DIM)
                if mo_ptr is not None:
                    to = dmo_ptr + here * ranks * HEAD_DIM
                    store_ranks(to, HEAD_DIM, dmo, p, p < HEAD_DIM, ranks, Q, RANKS, BLOCK_P)
            else:
                dy = load_gradients(
                    at_dy, dy_st, dy_sr, None, 0, None, None, head, i, p, is_real, ranks, MASKED,
                    RANKS, PER_RANK, CUT_P, HEAD_DIM,
                )  # fmt: skip
            dy = dy.to(dot_type)
            dyx = tl.dot(dy, tl.trans(x), dyx, input_precision=PRECISION)
            d1 = tl.dot(dy, S1, d1, input_precision=PRECISION)
            d2 = tl.dot(dy, S2, d2, input_precision=PRECISION)
        d1 *= from_entry[:, None]
        d2 *= from_entry[:, None]
        da = tl.sum(q1.to(tl.float32) * d1 + q2.to(tl.float32) * d2, axis=1)
        da += tl.where(i == ROWS - 1, whole * kept, 0.0)
        pairs = (dyx * factor).to(dot_type)
        d1 = tl.dot(pairs, k1, d1, input_precision=PRECISION)
        d2 = tl.dot(pairs, k2, d2, input_precision=PRECISION)
        if ROPE:
            # All later tokens together turn against the state that enters.
            dphi = tl.cumsum(turning(q1, q2, d1, d2), axis=0, reverse=True) - whole * turn[None, :]
            if extra_ptr is not None:
                extra = tl.load(extra_ptr + (row * heads + head) * W + n)[None, :]
                if last_ptr is not None:
                    extra = tl.where(
                        (token + of_token >= tl.load(last_ptr + row))[:, None], extra, 0.0
                    )
                dphi += extra
            dturns = angle_gradients(
                dphi, dturns, turns_base, delta, i, n, in_row, grad_ptr + 6 * plane + here * Q + j,
                dphase_ptr + (row * heads + head) * W, is_first, RAGGED, Q, RANKS, W,
            )  # fmt: skip
        d1, d2 = turned_back(d1, d2, cos, sin, ROPE)
        dC1 += d1
        dC2 += d2
        if dC_bias_ptr is not None:
            to = dC_bias_ptr + here * ranks * (2 * W)
            store_ranks(to, 2 * W, d1, n, n < W, ranks, Q, RANKS, W)
            store_ranks(to + W, 2 * W, d2, n, n < W, ranks, Q, RANKS, W)
        tl.store(grad_ptr + plane + here * Q + j, of_tokens(da, Q, RANKS))
    store_tile(dC_base, 2 * W, i, n, in_row, dC1, RAGGED, False, W)
    store_tile(dC_base + W, 2 * W, i, n, in_row, dC2, RAGGED, False, W)
    if ROPE:
        store_turns(dturns_base, dturns, n, j, token + j < end, RAGGED, Q, RANKS, W)


@triton.jit
def mamba3_bwd_kernel(
    x_ptr, mx_ptr, B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, D_ptr, z_ptr, mz_ptr, mo_ptr, mask_ptr,
    dy_ptr, token_ptr, scale_ptr, turns_ptr, phase_ptr, states_ptr, dstates_ptr, extra_ptr,
    last_ptr, dx_ptr, dmx_ptr, dB_ptr, dB_bias_ptr, dC_ptr, dC_bias_ptr, dD_ptr, dz_ptr, dmz_ptr,
    dmo_ptr, grad_ptr, dturns_ptr, dphase_ptr, cu_ptr, first_ptr, row_ptr,
    x_sb, x_st, x_sh, z_sb, z_st, z_sh, mask_sb, mask_st, dy_sb, dy_st, dy_sr, dy_sh,
    rows, length, heads: tl.constexpr, groups, ranks, plane, part, turns_part, phase_part,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, PER_RANK: tl.constexpr, ROPE: tl.constexpr,
    VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr, HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk, from the state that enters it and the gradient of the one that leaves.

    Two programs for a chunk, a group and HEADS of its heads, side by side: one forms the gradients
    of keys, the other those of queries. dB and dC are summed over heads in registers and written
    in parts, (HEAD_BLOCKS, B, G, T, RANKS, 2 W), that are added up later; so is the gradient of
    turns, (2 * G * HEAD_BLOCKS, B, T, W). grad (7, chunks, H, Q) is what
    `mamba3_prepare_bwd_kernel` reads. Of each chunk and head: dB_bias, dC_bias (R, 2 W), dD, and
    dmx, dmz, dmo (R, P). dphase (2, rows, H, W) are the gradients of the angles rows start from.
    extra (rows, H, W) is added to the gradients of angles from the token last (rows,) on.
    """
    MASKED: tl.constexpr = RAGGED or mask_ptr is not None
    ROWS: tl.constexpr = Q * RANKS
    pid = tl.program_id(0) // 2
    role = tl.program_id(0) % 2
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
    is_real = in_row
    if mask_ptr is not None:
        at_mask = mask_ptr + batch * mask_sb + (token + i // RANKS) * mask_st
        is_real = in_row & (tl.load(at_mask, mask=in_row, other=0) != 0)
    head_0 = group * (HEADS * HEAD_BLOCKS) + block * HEADS
    at_rows = ((batch * groups + group) * length + token) * (RANKS * 2 * W)
    at_turns = (batch * length + token) * W
    turns_base = turns_ptr
    dturns_base = dturns_ptr
    if ROPE:
        turns_base = turns_ptr + at_turns
        share = (role * groups + group) * HEAD_BLOCKS + block
        dturns_base = dturns_ptr + share * turns_part + at_turns
        dphase_ptr += role * phase_part
    if role == 0:
        from_keys(
            x_ptr, mx_ptr, B_ptr + at_rows, B_bias_ptr, C_ptr + at_rows, C_bias_ptr, D_ptr, z_ptr,
            mz_ptr, mo_ptr, dy_ptr, token_ptr, scale_ptr, turns_base, phase_ptr, dstates_ptr,
            dx_ptr, dmx_ptr, dB_ptr + block * part + at_rows, dB_bias_ptr, dD_ptr, grad_ptr,
            dturns_base, dphase_ptr, batch, token, end, is_first, row, in_row, is_real, v, head_0,
            x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh,
            length, heads, ranks, plane, HEAD_DIM, RAGGED, MASKED, PER_RANK, ROPE, WIDE, PRECISION,
            FAST, Q, RANKS, HEADS, BLOCK_P, P_BLOCKS, W, STAGES,
        )  # fmt: skip
    else:
        from_queries(
            x_ptr, mx_ptr, B_ptr + at_rows, B_bias_ptr, C_ptr + at_rows, C_bias_ptr, D_ptr, z_ptr,
            mz_ptr, mo_ptr, dy_ptr, token_ptr, turns_base, phase_ptr, scale_ptr, states_ptr,
            dstates_ptr, extra_ptr, last_ptr, dz_ptr, dmz_ptr, dmo_ptr,
            dC_ptr + block * part + at_rows, dC_bias_ptr, grad_ptr, dturns_base, dphase_ptr,
            batch, token, end, is_first, row, in_row, is_real, v, head_0,
            x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sr, dy_sh,
            length, heads, ranks, plane, HEAD_DIM, RAGGED, MASKED, PER_RANK, ROPE, WIDE, PRECISION,
            FAST, Q, RANKS, HEADS, BLOCK_P, P_BLOCKS, W, STAGES,
        )  # fmt: skip
