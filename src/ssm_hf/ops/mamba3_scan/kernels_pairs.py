"""Triton kernel of Mamba-3's scan with one rank: what pairs of rows of a chunk and head give."""

import triton
import triton.language as tl

from ssm_hf.ops.mamba3_scan.kernels_tiles import (
    exp2,
    gates,
    load_factor,
    load_gradients,
    load_inputs,
    load_rest,
    load_rotated,
    load_token,
    products,
    rotation,
    to_rows,
)
from ssm_hf.ops.ssd.kernels import load_tile, place_of_chunk, store_tile


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
def mamba3_pairs_kernel(
    x_ptr, mx_ptr, B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, D_ptr, z_ptr, mz_ptr, mo_ptr, mask_ptr,
    dy_ptr, token_ptr, scale_ptr, angle_ptr, states_ptr, dstates_ptr,
    dx_ptr, dmx_ptr, dD_ptr, dz_ptr, dmz_ptr, dmo_ptr, grad_ptr, pairs_ptr, turn_ptr,
    cu_ptr, first_ptr, row_ptr,
    x_sb, x_st, x_sh, z_sb, z_st, z_sh, mask_sb, mask_st, dy_sb, dy_st, dy_sr, dy_sh,
    rows, length, heads: tl.constexpr, groups, ranks, plane,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, PER_RANK: tl.constexpr, ROPE: tl.constexpr,
    VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr, BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Gradients of x, gate, D and what decays, from the state that enters a chunk and the gradient
    of the one that leaves it. One program for a chunk and a head.

    Of pairs of rows s <= t it leaves the gradient of k_s q_t, pairs (chunks, H, ROWS, ROWS), which
    those of B and C are made of. grad (6, chunks, H, Q) is what `mamba3_prepare_bwd_kernel` reads;
    turn (chunks, H, W) what all angles from the chunk on get through the state that enters. Of
    each chunk and head: dD, and dmx, dmz, dmo (R, P).
    """
    dot_type: tl.constexpr = tl.float32 if WIDE else B_ptr.dtype.element_ty
    ROWS: tl.constexpr = Q * RANKS
    PITCH: tl.constexpr = 2 * W + V
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    MASKED: tl.constexpr = RAGGED or mask_ptr is not None
    # The gradients of gate and mimo_o need y before them.
    NEEDS_Y: tl.constexpr = z_ptr is not None or mo_ptr is not None
    head = tl.program_id(0) % heads
    v = tl.program_id(0) // heads
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    here = v.to(tl.int64) * heads + head
    i = tl.arange(0, ROWS)
    of_token = i // RANKS
    j = tl.arange(0, Q)
    n = tl.arange(0, W)
    in_row = token + of_token < end
    in_tokens = token + j < end
    if PREFETCH:
        prefetch_tokens(x_ptr, batch, head, token, end, x_sb, x_st, x_sh, True, HEAD_DIM, Q)
        prefetch_tokens(z_ptr, batch, head, token, end, z_sb, z_st, z_sh, True, HEAD_DIM, Q)
        prefetch_tokens(dy_ptr, batch, head, token, end, dy_sb, dy_st, dy_sh, True, HEAD_DIM, Q)
        prefetch_state(dstates_ptr, here, token < end, 0, PITCH, HEAD_DIM, PITCH, BLOCK_P, P_BLOCKS)
        prefetch_state(states_ptr, here, token < end, 0, PITCH, HEAD_DIM, PITCH, BLOCK_P, P_BLOCKS)
    is_real = in_tokens
    if mask_ptr is not None:
        at_mask = mask_ptr + batch * mask_sb + (token + j) * mask_st
        is_real = in_tokens & (tl.load(at_mask, mask=in_tokens, other=0) != 0)

    at = token_ptr + here * (4 * Q)
    a, b, gamma, _delta = load_token(at, Q, RANKS)
    cos, sin = 1.0, 0.0
    if ROPE:
        cos, sin = rotation(angle_ptr + here * (Q * W), i, RANKS, FAST, W)
    B_bias, C_bias = B_bias_ptr, C_bias_ptr
    if B_bias_ptr is not None:
        B_bias = B_bias_ptr + head * (RANKS * PITCH)
    if C_bias_ptr is not None:
        C_bias = C_bias_ptr + head * (RANKS * PITCH)
    group = head // (heads // groups)
    at_rows = ((batch * groups + group) * length + token) * (RANKS * PITCH)
    ka, kb = load_rotated(B_ptr + at_rows, B_bias, cos, sin, i, in_row, dot_type, RAGGED, FAST,
                          RANKS, ROPE, W, PITCH)  # fmt: skip
    qa, qb = load_rotated(C_ptr + at_rows, C_bias, cos, sin, i, in_row, dot_type, RAGGED, FAST,
                          RANKS, ROPE, W, PITCH)  # fmt: skip
    kc, qc = None, None
    if V > 0:
        kc = load_rest(B_ptr + at_rows, B_bias, i, in_row, dot_type, RAGGED, FAST, RANKS, W, V,
                       PITCH)  # fmt: skip
        qc = load_rest(C_ptr + at_rows, C_bias, i, in_row, dot_type, RAGGED, FAST, RANKS, W, V,
                       PITCH)  # fmt: skip

    # Tiles of pairs of rows are [s, t], s <= t.
    at_x = x_ptr + batch * x_sb + head * x_sh + token * x_st
    at_dy = dy_ptr + batch * dy_sb + head * dy_sh + token * dy_st
    z_base = z_ptr
    if z_ptr is not None:
        z_base = z_ptr + batch * z_sb + head * z_sh + token * z_st
    xdy = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    for p_block in tl.static_range(P_BLOCKS):
        p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
        x = load_inputs(at_x, x_st, mx_ptr, head, j, p, in_tokens, ranks, RAGGED, RANKS, CUT_P,
                        HEAD_DIM).to(dot_type)  # fmt: skip
        dy = load_gradients(
            at_dy, dy_st, dy_sr, z_base, z_st, mz_ptr, mo_ptr, head, j, p, is_real, ranks, MASKED,
            RANKS, PER_RANK, CUT_P, HEAD_DIM, FAST,
        ).to(dot_type)  # fmt: skip
        xdy = tl.dot(x, tl.trans(dy), xdy, input_precision=PRECISION)
    kq = products(ka, kb, kc, qa, qb, qc, dot_type, PRECISION)

    # s reaches t > s with M s_s, its own token with gamma
    a_end = tl.load(at + 4 * Q - 4)
    later = of_token[:, None] < of_token[None, :]
    same = of_token[:, None] == of_token[None, :]
    if WIDE:
        b_end = tl.load(at + 4 * Q - 3)
        scale = tl.load(scale_ptr + here * Q + of_token)
        exponent = (a[None, :] - a[:, None]) + (b[None, :] - b[:, None])
        to_exit = exp2((a_end - a) + (b_end - b), FAST)
        from_entry = exp2(a + b, FAST)
        whole = exp2(a_end + b_end, FAST)
    else:
        scale = exp2(a - b, FAST)
        exponent = a[None, :] - a[:, None]
        to_exit = exp2(a_end - a, FAST)
        from_entry = exp2(a, FAST)
        whole = exp2(a_end, FAST)
    M = exp2(tl.where(later, exponent, float("-inf")), FAST)
    both = xdy * kq
    on_self = tl.sum(tl.where(same, both, 0.0), axis=1)
    both *= M
    dscale = tl.sum(both, axis=1)
    if WIDE:
        # The same numbers with both signs: over a chunk, what they have in common cancels.
        both *= scale[:, None]
        da = tl.sum(both, axis=0) - tl.sum(both, axis=1)
    else:
        da = tl.sum(both * scale[:, None], axis=0) - scale * dscale
    M = tl.where(same, gamma[:, None], M * scale[:, None])
    store_tile(pairs_ptr + here * (ROWS * ROWS), ROWS, i, i, in_row, xdy * M, False, False, ROWS)
    scores = kq * M
    diagonal = i[:, None] == i[None, :]
    if D_ptr is not None:
        scores += tl.where(diagonal, tl.load(D_ptr + head).to(tl.float32), 0.0)
        tl.store(dD_ptr + here, tl.sum(tl.sum(tl.where(diagonal, xdy, 0.0), axis=1), axis=0))
    scores = scores.to(dot_type)

    at_S = states_ptr + here * (HEAD_DIM * PITCH)
    at_dS = dstates_ptr + here * (HEAD_DIM * PITCH)
    left = tl.zeros((ROWS,), dtype=tl.float32)
    entered = tl.zeros((ROWS,), dtype=tl.float32)
    kept = 0.0
    turn = tl.zeros((W,), dtype=tl.float32)
    dSc, Sc = None, None
    for p_block in tl.static_range(P_BLOCKS):
        p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
        if P_BLOCKS > 1:
            x = load_inputs(at_x, x_st, mx_ptr, head, j, p, in_tokens, ranks, RAGGED, RANKS, CUT_P,
                            HEAD_DIM).to(dot_type)  # fmt: skip
            dy = load_gradients(
                at_dy, dy_st, dy_sr, z_base, z_st, mz_ptr, mo_ptr, head, j, p, is_real, ranks,
                MASKED, RANKS, PER_RANK, CUT_P, HEAD_DIM, FAST,
            ).to(dot_type)  # fmt: skip
        # Empty chunks (VARLEN) have no states; RAGGED covers them.
        p_in = p < tl.where(token < end, HEAD_DIM, 0)
        dSa = load_state(at_dS, p, p_in, dot_type, RAGGED or CUT_P, W, PITCH)
        dSb = load_state(at_dS + W, p, p_in, dot_type, RAGGED or CUT_P, W, PITCH)
        Sa = load_state(at_S, p, p_in, dot_type, RAGGED or CUT_P, W, PITCH)
        Sb = load_state(at_S + W, p, p_in, dot_type, RAGGED or CUT_P, W, PITCH)
        alike = Sa.to(tl.float32) * dSa.to(tl.float32) + Sb.to(tl.float32) * dSb.to(tl.float32)
        kept += tl.sum(tl.sum(alike, axis=1), axis=0)
        if ROPE:
            turn += tl.sum(turning(Sa, Sb, dSa.to(tl.float32), dSb.to(tl.float32)), axis=0)
        if V > 0:
            dSc = load_state(at_dS + 2 * W, p, p_in, dot_type, RAGGED or CUT_P, V, PITCH)
            Sc = load_state(at_S + 2 * W, p, p_in, dot_type, RAGGED or CUT_P, V, PITCH)
            kept += tl.sum(tl.sum(Sc.to(tl.float32) * dSc.to(tl.float32), axis=1), axis=0)
        dx = products(ka, kb, kc, dSa, dSb, dSc, dot_type, PRECISION) * to_exit[:, None]
        left += tl.sum(x.to(tl.float32) * dx, axis=1)
        dx *= scale[:, None]
        dx = tl.dot(scores, dy, dx, input_precision=PRECISION)
        if mx_ptr is not None:
            raw = load_tile(at_x, x_st, j, p, in_tokens, RAGGED, CUT_P, HEAD_DIM).to(tl.float32)
            to = dmx_ptr + here * ranks * HEAD_DIM
            store_ranks(to, HEAD_DIM, dx * to_rows(raw, RANKS), p, p < HEAD_DIM, ranks, Q, RANKS,
                        BLOCK_P)  # fmt: skip
            dx *= load_factor(mx_ptr, head, p, ranks, Q, RANKS, HEAD_DIM)
        if RANKS > 1:
            dx = tl.sum(tl.reshape(dx, (Q, RANKS, BLOCK_P)), axis=1)
        to_row = ((batch * length + token) * heads + head) * HEAD_DIM
        store_tile(dx_ptr + to_row, heads * HEAD_DIM, j, p, in_tokens, dx, RAGGED, CUT_P, HEAD_DIM)

        y = products(qa, qb, qc, Sa, Sb, Sc, dot_type, PRECISION) * from_entry[:, None]
        if NEEDS_Y:
            # The gradient of y again, in the layout of products: Triton would form it a third time.
            dout = load_tile(at_dy, dy_st, j, p, is_real, MASKED, CUT_P, HEAD_DIM).to(tl.float32)
            dout = to_rows(dout, RANKS)
            dy_again = dout
            if mo_ptr is not None:
                dy_again *= load_factor(mo_ptr, head, p, ranks, Q, RANKS, HEAD_DIM)
            if z_ptr is not None:
                z, u, share = gates(z_base, z_st, mz_ptr, head, j, p, in_tokens, ranks, RAGGED,
                                    RANKS, CUT_P, HEAD_DIM, FAST)  # fmt: skip
                dz_factor = dy_again * (share * (1.0 + u * (1.0 - share)))
                dy_again *= u * share
            entered += tl.sum(y * dy_again, axis=1)
            y = tl.dot(tl.trans(scores), x, y, input_precision=PRECISION)
            dmo = dout * y
            if z_ptr is not None:
                dmo *= u * share
                du = dz_factor * y
                if mz_ptr is not None:
                    to = dmz_ptr + here * ranks * HEAD_DIM
                    store_ranks(to, HEAD_DIM, du * z, p, p < HEAD_DIM, ranks, Q, RANKS, BLOCK_P)
                    du *= load_factor(mz_ptr, head, p, ranks, Q, RANKS, HEAD_DIM)
                if RANKS > 1:
                    du = tl.sum(tl.reshape(du, (Q, RANKS, BLOCK_P)), axis=1)
                store_tile(dz_ptr + to_row, heads * HEAD_DIM, j, p, in_tokens, du, RAGGED, CUT_P,
                           HEAD_DIM)  # fmt: skip
            if mo_ptr is not None:
                to = dmo_ptr + here * ranks * HEAD_DIM
                store_ranks(to, HEAD_DIM, dmo, p, p < HEAD_DIM, ranks, Q, RANKS, BLOCK_P)
        else:
            entered += tl.sum(y * dy.to(tl.float32), axis=1)
    da += entered + tl.where(i == ROWS - 1, whole * kept, 0.0)
    at_grad = grad_ptr + here * Q + j
    tl.store(at_grad, of_tokens(da, Q, RANKS))
    tl.store(at_grad + plane, of_tokens(left * scale, Q, RANKS))
    tl.store(at_grad + 2 * plane, of_tokens(dscale + left, Q, RANKS))
    tl.store(at_grad + 3 * plane, of_tokens(on_self, Q, RANKS))
    if ROPE:
        tl.store(turn_ptr + here * W + n, whole * turn)
