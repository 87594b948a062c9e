"""Triton kernels of Mamba-3's scan: gradients of one chunk and head."""

import triton
import triton.language as tl

from ssm_hf.ops.mamba3_scan.kernels_backward import (
    at_group,
    at_head,
    load_state,
    load_x_and_dy,
    masks_of_chunk,
    of_tokens,
    operands,
    place_of_program,
    rest_of,
    store_ranks,
    turned_back,
    turning,
)
from ssm_hf.ops.mamba3_scan.kernels_tiles import (
    exp2,
    gates,
    laid_out_alike,
    load_factor,
    load_gradients,
    load_inputs,
    load_token,
    products,
    rotation,
    to_rows,
)
from ssm_hf.ops.ssd.kernels import load_tile, store_tile


@triton.jit
def through_pairs(
    d_a, d_b, own_a, own_b, other_a, other_b, pairs, cos, sin, to, to_angles, i, in_row, in_tokens,
    MORE: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr,
    RANKS: tl.constexpr, W: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """Add to tiles a and b of the gradient of keys (of queries) what pairs of rows give; store it,
    as before the rotation, and the gradients (Q, W) of the angles that turn them, with MORE added
    to what is there.
    """
    n = tl.arange(0, W)
    d_a = tl.dot(pairs, other_a, d_a, input_precision=PRECISION)
    d_b = tl.dot(pairs, other_b, d_b, input_precision=PRECISION)
    if ROPE:
        of_angle = turning(own_a, own_b, d_a, d_b)
        if RANKS > 1:
            of_angle = tl.sum(tl.reshape(of_angle, (Q, RANKS, W)), axis=1)
        if MORE:
            of_angle += load_tile(to_angles, W, tl.arange(0, Q), n, in_tokens, False, False, W)
        store_tile(to_angles, W, tl.arange(0, Q), n, in_tokens, of_angle, False, False, W)
    d_a, d_b = turned_back(d_a, d_b, cos, sin, ROPE)
    store_tile(to, PITCH, i, n, in_row, d_a, False, False, W)
    store_tile(to + W, PITCH, i, n, in_row, d_b, False, False, W)


@triton.jit
def mamba3_keys_kernel(
    x_ptr, mx_ptr, B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, z_ptr, mz_ptr, mo_ptr, mask_ptr, dy_ptr,
    token_ptr, scale_ptr, angle_ptr, dstates_ptr, pairs_ptr, dx_ptr, dmx_ptr, grad_ptr, dk_ptr,
    dangle_ptr, later_ptr, cu_ptr, first_ptr, row_ptr,
    x_sb, x_st, x_sh, z_sb, z_st, z_sh, mask_sb, mask_st, dy_sb, dy_st, dy_sr, dy_sh,
    rows, length, heads: tl.constexpr, groups, ranks, plane,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, PER_RANK: tl.constexpr, ROPE: tl.constexpr,
    VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr, BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Gradients of x, mimo_x and keys of one chunk and head, from the gradient of the state that
    leaves it and from its pairs of rows; see `mamba3_pairs_kernel`, which comes before.

    dk (chunks, H, ROWS, PITCH) is the gradient before the rotation; dangle (chunks, H, Q, W) that
    of the angles which turn keys, later (chunks, H, W) what the angles of all later tokens get
    together: they turn against the state that leaves the chunk. The kernel of queries adds to both.
    """
    dot_type: tl.constexpr = tl.float32 if WIDE else B_ptr.dtype.element_ty
    ROWS: tl.constexpr = Q * RANKS
    PITCH: tl.constexpr = 2 * W + V
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    MASKED: tl.constexpr = RAGGED or mask_ptr is not None
    head, batch, token, end, here = place_of_program(
        tl.program_id(0), rows, length, heads, cu_ptr, first_ptr, row_ptr, VARLEN, Q
    )
    i = tl.arange(0, ROWS)
    of_token = i // RANKS
    j = tl.arange(0, Q)
    n = tl.arange(0, W)
    in_row, in_tokens, is_real = masks_of_chunk(
        batch, token, end, of_token, j, mask_ptr, mask_sb, mask_st
    )
    at = token_ptr + here * (4 * Q)
    a, b, _gamma, _delta = load_token(at, Q, RANKS)
    at_x = at_head(x_ptr, batch, head, token, x_sb, x_sh, x_st)
    at_dy = at_head(dy_ptr, batch, head, token, dy_sb, dy_sh, dy_st)
    at_z = at_head(z_ptr, batch, head, token, z_sb, z_sh, z_st)
    # All that is read stands before all that waits: a program's loads overlap no other work.
    if P_BLOCKS == 1:
        p = tl.arange(0, BLOCK_P)
        x, dy = load_x_and_dy(
            at_x, x_st, mx_ptr, at_dy, dy_st, dy_sr, at_z, z_st, mz_ptr, mo_ptr, head, j, p,
            in_tokens, is_real, ranks, dot_type, RAGGED, MASKED, PER_RANK, RANKS, CUT_P, HEAD_DIM,
            FAST,
        )  # fmt: skip
    at_rows = at_group(batch, head, token, length, heads, groups, RANKS, PITCH)
    cos, sin, ka, kb, qa, qb = operands(
        B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, angle_ptr, at_rows, here, head, i, in_row, dot_type,
        RAGGED, ROPE, FAST, Q, RANKS, W, V,
    )  # fmt: skip
    kc = rest_of(B_ptr, B_bias_ptr, at_rows, head, i, in_row, dot_type, RAGGED, FAST, RANKS, W, V)
    qc = rest_of(C_ptr, C_bias_ptr, at_rows, head, i, in_row, dot_type, RAGGED, FAST, RANKS, W, V)
    at_dS = dstates_ptr + here * (HEAD_DIM * PITCH)
    at_pairs = pairs_ptr + here * (2 * ROWS * ROWS)
    at_grad = grad_ptr + here * Q + j
    at_angles = dangle_ptr
    if ROPE:
        at_angles = dangle_ptr + here * (Q * W)
    to_row = ((batch * length + token) * heads + head) * HEAD_DIM
    a_end = tl.load(at + 4 * Q - 4)
    if WIDE:
        b_end = tl.load(at + 4 * Q - 3)
        scale = tl.load(scale_ptr + here * Q + of_token)
        to_exit = exp2((a_end - a) + (b_end - b), FAST)
    else:
        scale = exp2(a - b, FAST)
        to_exit = exp2(a_end - a, FAST)
    scores = load_tile(at_pairs, ROWS, i, i, in_row, False, False, ROWS)
    # What tokens leave in the state, and with it the gradients of x and of keys.
    left = tl.zeros((ROWS,), dtype=tl.float32)
    d_a, d_b = tl.zeros((ROWS, W), dtype=tl.float32), tl.zeros((ROWS, W), dtype=tl.float32)
    d_c, dSc = None, None
    if V > 0:
        d_c = tl.zeros((ROWS, V), dtype=tl.float32)
    for p_block in tl.static_range(P_BLOCKS):
        p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
        if P_BLOCKS > 1:
            x, dy = load_x_and_dy(
                at_x, x_st, mx_ptr, at_dy, dy_st, dy_sr, at_z, z_st, mz_ptr, mo_ptr, head, j, p,
                in_tokens, is_real, ranks, dot_type, RAGGED, MASKED, PER_RANK, RANKS, CUT_P,
                HEAD_DIM, FAST,
            )  # fmt: skip
        # Empty chunks (VARLEN) have no states; RAGGED covers them.
        p_in = p < tl.where(token < end, HEAD_DIM, 0)
        dSa = load_state(at_dS, p, p_in, dot_type, RAGGED or CUT_P, W, PITCH)
        dSb = load_state(at_dS + W, p, p_in, dot_type, RAGGED or CUT_P, W, PITCH)
        if V > 0:
            dSc = load_state(at_dS + 2 * W, p, p_in, dot_type, RAGGED or CUT_P, V, PITCH)
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
        store_tile(dx_ptr + to_row, heads * HEAD_DIM, j, p, in_tokens, dx, RAGGED, CUT_P, HEAD_DIM)
        d_a = tl.dot(x, dSa, d_a, input_precision=PRECISION)
        d_b = tl.dot(x, dSb, d_b, input_precision=PRECISION)
        if V > 0 and P_BLOCKS > 1:
            d_c = tl.dot(x, dSc, d_c, input_precision=PRECISION)
    weight = (to_exit * scale)[:, None]
    to = dk_ptr + here * (ROWS * PITCH)
    d_a *= weight
    d_b *= weight
    if ROPE:
        # What a token leaves in the state does not turn with it.
        tl.store(later_ptr + here * W + n, -tl.sum(turning(ka, kb, d_a, d_b), axis=0))
    pairs = load_tile(at_pairs + ROWS * ROWS, ROWS, i, i, in_row, False, False, ROWS)
    through_pairs(d_a, d_b, ka, kb, qa, qb, pairs, cos, sin, to, at_angles, i, in_row, in_tokens,
                  False, ROPE, PRECISION, Q, RANKS, W, PITCH)  # fmt: skip
    if V > 0:
        if P_BLOCKS == 1:
            d_c = tl.dot(x, dSc, d_c, input_precision=PRECISION)
        d_c = tl.dot(pairs, qc, d_c * weight, input_precision=PRECISION)
        store_tile(to + 2 * W, PITCH, i, tl.arange(0, V), in_row, d_c, False, False, V)
    tl.store(at_grad + plane, of_tokens(left * scale, Q, RANKS))
    tl.store(at_grad + 2 * plane, tl.load(at_grad + 2 * plane) + of_tokens(left, Q, RANKS))


@triton.jit
def mamba3_queries_kernel(
    x_ptr, mx_ptr, B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, z_ptr, mz_ptr, mo_ptr, mask_ptr, dy_ptr,
    token_ptr, angle_ptr, states_ptr, dstates_ptr, dz_ptr, dmz_ptr, dmo_ptr, grad_ptr,
    pairs_ptr, dq_ptr, dangle_ptr, later_ptr, cu_ptr, first_ptr, row_ptr,
    x_sb, x_st, x_sh, z_sb, z_st, z_sh, mask_sb, mask_st, dy_sb, dy_st, dy_sr, dy_sh,
    rows, length, heads: tl.constexpr, groups, ranks, plane,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, PER_RANK: tl.constexpr, ROPE: tl.constexpr,
    VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr, BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Gradients of the gate, mimo_z, mimo_o and queries of one chunk and head, from the state that
    enters it; see `mamba3_pairs_kernel` and `mamba3_keys_kernel`, which come before.
    """
    # The gradients of gate and mimo_o need y before them.
    NEEDS_Y: tl.constexpr = z_ptr is not None or mo_ptr is not None
    dot_type: tl.constexpr = tl.float32 if WIDE else B_ptr.dtype.element_ty
    ROWS: tl.constexpr = Q * RANKS
    PITCH: tl.constexpr = 2 * W + V
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    MASKED: tl.constexpr = RAGGED or mask_ptr is not None
    head, batch, token, end, here = place_of_program(
        tl.program_id(0), rows, length, heads, cu_ptr, first_ptr, row_ptr, VARLEN, Q
    )
    at_pairs = pairs_ptr + here * (2 * ROWS * ROWS)
    i = tl.arange(0, ROWS)
    of_token = i // RANKS
    j = tl.arange(0, Q)
    n = tl.arange(0, W)
    in_row, in_tokens, is_real = masks_of_chunk(
        batch, token, end, of_token, j, mask_ptr, mask_sb, mask_st
    )
    at = token_ptr + here * (4 * Q)
    a, b, _gamma, _delta = load_token(at, Q, RANKS)
    at_x = at_head(x_ptr, batch, head, token, x_sb, x_sh, x_st)
    at_dy = at_head(dy_ptr, batch, head, token, dy_sb, dy_sh, dy_st)
    at_z = at_head(z_ptr, batch, head, token, z_sb, z_sh, z_st)
    # All that is read stands before all that waits: a program's loads overlap no other work.
    if P_BLOCKS == 1:
        p = tl.arange(0, BLOCK_P)
        x = load_inputs(at_x, x_st, mx_ptr, head, j, p, in_tokens, ranks, RAGGED, RANKS, CUT_P,
                        HEAD_DIM).to(dot_type)  # fmt: skip
    at_rows = at_group(batch, head, token, length, heads, groups, RANKS, PITCH)
    cos, sin, ka, kb, qa, qb = operands(
        B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, angle_ptr, at_rows, here, head, i, in_row, dot_type,
        RAGGED, ROPE, FAST, Q, RANKS, W, V,
    )  # fmt: skip
    kc = rest_of(B_ptr, B_bias_ptr, at_rows, head, i, in_row, dot_type, RAGGED, FAST, RANKS, W, V)
    qc = rest_of(C_ptr, C_bias_ptr, at_rows, head, i, in_row, dot_type, RAGGED, FAST, RANKS, W, V)
    at_S, at_dS = states_ptr + here * (HEAD_DIM * PITCH), dstates_ptr + here * (HEAD_DIM * PITCH)
    at_grad = grad_ptr + here * Q + j
    at_angles = dangle_ptr
    if ROPE:
        at_angles = dangle_ptr + here * (Q * W)
    to_row = ((batch * length + token) * heads + head) * HEAD_DIM
    a_end = tl.load(at + 4 * Q - 4)
    if WIDE:
        from_entry = exp2(a + b, FAST)
        whole = exp2(a_end + tl.load(at + 4 * Q - 3), FAST)
    else:
        from_entry = exp2(a, FAST)
        whole = exp2(a_end, FAST)
    scores = load_tile(at_pairs, ROWS, i, i, in_row, False, False, ROWS)
    # What they take from it, and with it the gradients of the gate and of queries.
    entered = tl.zeros((ROWS,), dtype=tl.float32)
    kept = tl.zeros((BLOCK_P,), dtype=tl.float32)
    turn = tl.zeros((W,), dtype=tl.float32)
    d_a, d_b = tl.zeros((ROWS, W), dtype=tl.float32), tl.zeros((ROWS, W), dtype=tl.float32)
    d_c, dSc, Sc = None, None, None
    if V > 0:
        d_c = tl.zeros((ROWS, V), dtype=tl.float32)
    for p_block in tl.static_range(P_BLOCKS):
        p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
        p_in = p < tl.where(token < end, HEAD_DIM, 0)
        Sa = load_state(at_S, p, p_in, dot_type, RAGGED or CUT_P, W, PITCH)
        Sb = load_state(at_S + W, p, p_in, dot_type, RAGGED or CUT_P, W, PITCH)
        if V > 0:
            Sc = load_state(at_S + 2 * W, p, p_in, dot_type, RAGGED or CUT_P, V, PITCH)
        if P_BLOCKS > 1:
            x = load_inputs(at_x, x_st, mx_ptr, head, j, p, in_tokens, ranks, RAGGED, RANKS, CUT_P,
                            HEAD_DIM).to(dot_type)  # fmt: skip
        y = products(qa, qb, qc, Sa, Sb, Sc, dot_type, PRECISION) * from_entry[:, None]
        dSa = load_state(at_dS, p, p_in, dot_type, RAGGED or CUT_P, W, PITCH).to(tl.float32)
        dSb = load_state(at_dS + W, p, p_in, dot_type, RAGGED or CUT_P, W, PITCH).to(tl.float32)
        kept += tl.sum(Sa.to(tl.float32) * dSa + Sb.to(tl.float32) * dSb, axis=1)
        if ROPE:
            turn += tl.sum(turning(Sa, Sb, dSa, dSb), axis=0)
        if V > 0:
            dSc = load_state(at_dS + 2 * W, p, p_in, dot_type, RAGGED or CUT_P, V, PITCH)
            kept += tl.sum(Sc.to(tl.float32) * dSc.to(tl.float32), axis=1)
        if NEEDS_Y:
            dout = load_tile(at_dy, dy_st, j, p, is_real, MASKED, CUT_P, HEAD_DIM).to(tl.float32)
            dout = to_rows(dout, RANKS)
            dy = dout
            if mo_ptr is not None:
                dy *= load_factor(mo_ptr, head, p, ranks, Q, RANKS, HEAD_DIM)
            if z_ptr is not None:
                z, u, share = gates(at_z, z_st, mz_ptr, head, j, p, in_tokens, ranks, RAGGED,
                                    RANKS, CUT_P, HEAD_DIM, FAST)  # fmt: skip
                dz_factor = dy * (share * (1.0 + u * (1.0 - share)))
                dy *= u * share
            if RANKS == 1:
                dy, y = laid_out_alike(dy, y, FAST)
            entered += tl.sum(y * dy, axis=1)
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
            dy = load_gradients(
                at_dy, dy_st, dy_sr, at_z, z_st, mz_ptr, mo_ptr, head, j, p, is_real, ranks,
                MASKED, RANKS, PER_RANK, CUT_P, HEAD_DIM, FAST,
            )  # fmt: skip
            entered += tl.sum(y * dy.to(tl.float32), axis=1)
        dy = dy.to(dot_type)
        d_a = tl.dot(dy, Sa, d_a, input_precision=PRECISION)
        d_b = tl.dot(dy, Sb, d_b, input_precision=PRECISION)
        if V > 0 and P_BLOCKS > 1:
            d_c = tl.dot(dy, Sc, d_c, input_precision=PRECISION)
    weight = from_entry[:, None]
    pairs = load_tile(at_pairs + ROWS * ROWS, ROWS, i, i, in_row, False, False, ROWS)
    pairs = tl.trans(pairs)
    to = dq_ptr + here * (ROWS * PITCH)
    if ROPE:
        # Formed once more: kept until here, they would leave too few registers.
        cos, sin = rotation(angle_ptr + here * (Q * W), i, RANKS, FAST, W)
    through_pairs(d_a * weight, d_b * weight, qa, qb, ka, kb, pairs, cos, sin, to, at_angles, i,
                  in_row, in_tokens, True, ROPE, PRECISION, Q, RANKS, W, PITCH)  # fmt: skip
    if V > 0:
        if P_BLOCKS == 1:
            d_c = tl.dot(dy, Sc, d_c, input_precision=PRECISION)
        d_c = tl.dot(pairs, kc, d_c * weight, input_precision=PRECISION)
        store_tile(to + 2 * W, PITCH, i, tl.arange(0, V), in_row, d_c, False, False, V)
    da = entered + tl.where(i == ROWS - 1, whole * tl.sum(kept, axis=0), 0.0)
    tl.store(at_grad, tl.load(at_grad) + of_tokens(da, Q, RANKS))
    if ROPE:
        at_later = later_ptr + here * W + n
        tl.store(at_later, tl.load(at_later) - whole * turn)
