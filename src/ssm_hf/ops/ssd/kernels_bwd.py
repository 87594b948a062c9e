"""Triton kernels of Mamba-2's scan: gradients of one chunk, all chunks at once."""

import triton
import triton.language as tl

from ssm_hf.ops.ssd.kernels import (
    gated,
    load_decay,
    load_tile,
    place_of_chunk,
    save_buffer,
    store_tile,
)


@triton.jit
def store_part(
    part_ptr, scale_ptr, at, stride, i, n, in_row, value, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Store one program's share of dB or dC, in fp32, or with scales in fp16.

    A token's scale is its largest number: 11 bits of each stay, where bf16 would keep 8 and fp16
    alone could under- or overflow. `at` and `stride` count elements; there is a scale for STATES.
    """
    if scale_ptr is not None:
        largest = tl.max(tl.abs(value), axis=1)
        # Numbers whose inverse would overflow are not scaled; NaN and infinity stay what they are.
        scale = tl.where(largest > 1e-37, largest, 1.0)
        value *= (1.0 / scale)[:, None]
        tl.store(scale_ptr + at // STATES + i * (stride // STATES), scale, mask=in_row)
    store_tile(part_ptr + at, stride, i, n, in_row, value, ROWS, COLUMNS, STATES)


@triton.jit
def from_tokens(
    x_ptr, C_base, B, D_ptr, z_ptr, ungated_ptr, dy_ptr, decay_ptr, dstates_ptr,
    dx_ptr, dz_ptr, dB_ptr, dC_ptr, dB_scale_ptr, dC_scale_ptr, grad_ptr, dD_ptr,
    batch, token, end, in_row, is_real, v, group, block, head_0,
    x_sb, x_st, x_sh, C_st, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sh, dx_sb, dx_st, dz_sb, dz_st,
    length, heads, groups, plane, part,
    STATES: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr,
    HEADS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """What goes from token to token, and dx; see `ssd_bwd_kernel`.

    Tiles of pairs of tokens are [s, t], s <= t: then their products need no transposed copies. x
    and dy are operands of products alone, so that they go from shared memory to the tensor cores
    and never through registers; x_s . dy_s, for one, is on a product's diagonal.
    """
    dot_type: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    CUT_N: tl.constexpr = STATES != BLOCK_N
    i = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    size = HEAD_DIM * STATES
    y_st = heads * HEAD_DIM
    C = load_tile(C_base, C_st, i, n, in_row, RAGGED, CUT_N, STATES).to(dot_type)
    BC = tl.dot(B, tl.trans(C), input_precision=PRECISION)
    # A token's effect on itself has no decay and no part in that of the decay.
    diagonal = i[:, None] == i[None, :]
    BC_self = tl.sum(tl.where(diagonal, BC, 0.0), axis=1)
    W_sum = tl.zeros((Q, Q), dtype=tl.float32)
    for step in tl.range(0, HEADS, num_stages=STAGES):
        head = head_0 + step * STRIDE
        at = decay_ptr + (v * heads + head) * (4 * Q)
        a, b, delta = load_decay(at, Q)
        a_end = tl.load(at + 4 * Q - 4)
        if WIDE:
            exponent = (a[None, :] - a[:, None]) + (b[None, :] - b[:, None])
            to_exit = tl.exp2((a_end - a) + (tl.load(at + 4 * Q - 3) - b))
        else:
            exponent = a[None, :] - a[:, None]
            to_exit = tl.exp2(a_end - a)
        on_self = delta * BC_self
        if D_ptr is not None and not D_PER_CHANNEL:
            on_self += tl.load(D_ptr + head).to(tl.float32)
        at_x = x_ptr + batch * x_sb + head * x_sh + token * x_st
        at_dy = dy_ptr + batch * dy_sb + head * dy_sh + token * dy_st
        at_dS = dstates_ptr + (v * heads + head) * size
        W = tl.zeros((Q, Q), dtype=tl.float32)
        for p_block in tl.static_range(P_BLOCKS):
            p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
            x = load_tile(at_x, x_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM)
            dy = load_tile(at_dy, dy_st, i, p, is_real, MASKED, CUT_P, HEAD_DIM)
            if z_ptr is not None:
                at_z = z_ptr + batch * z_sb + head * z_sh + token * z_st
                z = load_tile(at_z, z_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM)
                dy = gated(dy.to(tl.float32), z.to(tl.float32))
            # Empty chunks (VARLEN) have no states; RAGGED covers them.
            rows = p < tl.where(token < end, HEAD_DIM, 0)
            dS = load_tile(at_dS, STATES, p, n, rows, RAGGED or CUT_P, CUT_N, STATES)
            dx = tl.dot(B, tl.trans(dS.to(dot_type)), input_precision=PRECISION)
            dx *= (to_exit * delta)[:, None]
            if LEAN:
                save_buffer(x_ptr, x_st, i, p, x, length)
                save_buffer(dy_ptr, dy_st, i, p, dy, length)
            W = tl.dot(x.to(dot_type), tl.trans(dy.to(dot_type)), W, input_precision=PRECISION)

        # dx_s = sum of scores[s, t] dy_t + what comes from the state that leaves
        M = tl.exp2(tl.where(i[:, None] < i[None, :], exponent, float("-inf")))
        scores = BC * M
        pairs = W * scores
        xdy = tl.sum(tl.where(diagonal, W, 0.0), axis=1)
        dscale = tl.sum(pairs, axis=1)
        if WIDE:
            # The same numbers with both signs: over a chunk, what they have in common cancels.
            pairs *= delta[:, None]
            da = tl.sum(pairs, axis=0) - tl.sum(pairs, axis=1)
        else:
            da = tl.sum(pairs * delta[:, None], axis=0) - delta * dscale
        W_sum += W * tl.where(diagonal, 1.0, M) * delta[:, None]
        scores = tl.where(diagonal, on_self[:, None], scores * delta[:, None]).to(dot_type)
        for p_block in tl.static_range(P_BLOCKS):
            p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
            if P_BLOCKS > 1 or z_ptr is not None:
                dy = load_tile(at_dy, dy_st, i, p, is_real, MASKED, CUT_P, HEAD_DIM)
            if z_ptr is not None:
                z = load_tile(at_z, z_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM).to(tl.float32)
                at_y = ((batch * length + token) * heads + head) * HEAD_DIM
                y = load_tile(ungated_ptr + at_y, y_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM).to(
                    tl.float32
                )
                sigmoid = 1.0 / (1.0 + tl.exp(-z))
                dz = dy.to(tl.float32) * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
                at_dz = dz_ptr + batch * dz_sb + token * dz_st + head * HEAD_DIM
                store_tile(at_dz, dz_st, i, p, in_row, dz, RAGGED, CUT_P, HEAD_DIM)
                dy = gated(dy.to(tl.float32), z)
            if P_BLOCKS > 1:
                rows = p < tl.where(token < end, HEAD_DIM, 0)
                dS = load_tile(at_dS, STATES, p, n, rows, RAGGED or CUT_P, CUT_N, STATES)
                dx = tl.dot(B, tl.trans(dS.to(dot_type)), input_precision=PRECISION)
                dx *= (to_exit * delta)[:, None]
            dx = tl.dot(scores, dy.to(dot_type), dx, input_precision=PRECISION)
            if D_ptr is not None and D_PER_CHANNEL:
                x = load_tile(at_x, x_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM).to(tl.float32)
                D = tl.load(D_ptr + head * HEAD_DIM + p, mask=p < HEAD_DIM, other=0.0)
                dx += dy.to(tl.float32) * D.to(tl.float32)[None, :]
                at_D = dD_ptr + (v * heads + head) * HEAD_DIM + p
                tl.store(at_D, tl.sum(dy.to(tl.float32) * x, axis=0), mask=p < HEAD_DIM)
            at_dx = dx_ptr + batch * dx_sb + token * dx_st + head * HEAD_DIM
            store_tile(at_dx, dx_st, i, p, in_row, dx, RAGGED, CUT_P, HEAD_DIM)
        if D_ptr is not None and not D_PER_CHANNEL:
            tl.store(dD_ptr + (v * heads + head) * Q + i, xdy)
        at_grad = grad_ptr + (v * heads + head) * Q + i
        tl.store(at_grad, da)
        tl.store(at_grad + 3 * plane, dscale + xdy * BC_self)

    W = W_sum.to(dot_type)
    C = load_tile(C_base, C_st, i, n, in_row, RAGGED, CUT_N, STATES).to(dot_type)
    dB = tl.dot(W, C, input_precision=PRECISION)
    dC = tl.dot(tl.trans(W), B, input_precision=PRECISION)
    at_BC = block * part + ((batch * length + token) * groups + group) * STATES
    BC_st = groups * STATES
    store_part(dB_ptr, dB_scale_ptr, at_BC, BC_st, i, n, in_row, dB, RAGGED, CUT_N, STATES)
    store_part(dC_ptr, dC_scale_ptr, at_BC, BC_st, i, n, in_row, dC, RAGGED, CUT_N, STATES)


@triton.jit
def from_states(
    C, z_ptr, dy_ptr, decay_ptr, states_ptr, dstates_ptr, dC_ptr, dC_scale_ptr, grad_ptr,
    batch, token, end, in_row, is_real, v, group, block, head_0,
    z_sb, z_st, z_sh, dy_sb, dy_st, dy_sh, length, heads, groups, plane, part,
    STATES: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dC of the state that enters, and what decays of it; see `ssd_bwd_kernel`."""
    dot_type: tl.constexpr = tl.float32 if WIDE else dy_ptr.dtype.element_ty
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    CUT_N: tl.constexpr = STATES != BLOCK_N
    i = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    q = tl.arange(0, BLOCK_P)
    size = HEAD_DIM * STATES
    dC = tl.zeros((Q, BLOCK_N), dtype=tl.float32)
    for step in tl.range(0, HEADS, num_stages=STAGES):
        head = head_0 + step
        at = decay_ptr + (v * heads + head) * (4 * Q)
        a, b, _ = load_decay(at, Q)
        a_end = tl.load(at + 4 * Q - 4)
        if WIDE:
            from_entry = tl.exp2(a + b)
            whole = tl.exp2(a_end + tl.load(at + 4 * Q - 3))
        else:
            from_entry = tl.exp2(a)
            whole = tl.exp2(a_end)
        da = tl.zeros((Q,), dtype=tl.float32)
        kept = 0.0
        for p_block in tl.static_range(P_BLOCKS):
            p = p_block * BLOCK_P + q
            at_dy = dy_ptr + batch * dy_sb + head * dy_sh + token * dy_st
            dy = load_tile(at_dy, dy_st, i, p, is_real, MASKED, CUT_P, HEAD_DIM)
            if z_ptr is not None:
                at_z = z_ptr + batch * z_sb + head * z_sh + token * z_st
                z = load_tile(at_z, z_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM)
                dy = gated(dy.to(tl.float32), z.to(tl.float32))
            rows = p < tl.where(token < end, HEAD_DIM, 0)
            at_S = (v * heads + head) * size
            S = load_tile(states_ptr + at_S, STATES, p, n, rows, RAGGED or CUT_P, CUT_N, STATES)
            dS = load_tile(dstates_ptr + at_S, STATES, p, n, rows, RAGGED or CUT_P, CUT_N, STATES)
            dyS = (
                tl.dot(dy.to(dot_type), S.to(dot_type), input_precision=PRECISION)
                * from_entry[:, None]
            )
            dC += dyS
            da += tl.sum(C.to(tl.float32) * dyS, axis=1)
            kept += tl.sum(tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1), axis=0)
        da += tl.where(i == Q - 1, whole * kept, 0.0)
        tl.store(grad_ptr + plane + (v * heads + head) * Q + i, da)
    at_C = block * part + ((batch * length + token) * groups + group) * STATES
    C_st = groups * STATES
    store_part(dC_ptr, dC_scale_ptr, at_C, C_st, i, n, in_row, dC, RAGGED, CUT_N, STATES)


@triton.jit
def from_exit(
    x_ptr, B, decay_ptr, dstates_ptr, dB_ptr, dB_scale_ptr, grad_ptr,
    batch, token, end, in_row, v, group, block, head_0,
    x_sb, x_st, x_sh, length, heads, groups, plane, part,
    STATES: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr,
    P_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dB of what tokens leave in the state that leaves, and what of it decays; see
    `ssd_bwd_kernel`.
    """
    dot_type: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    CUT_N: tl.constexpr = STATES != BLOCK_N
    i = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    size = HEAD_DIM * STATES
    dB = tl.zeros((Q, BLOCK_N), dtype=tl.float32)
    for step in tl.range(0, HEADS, num_stages=STAGES):
        head = head_0 + step
        at = decay_ptr + (v * heads + head) * (4 * Q)
        a, b, delta = load_decay(at, Q)
        a_end = tl.load(at + 4 * Q - 4)
        to_exit = a_end - a
        if WIDE:
            to_exit += tl.load(at + 4 * Q - 3) - b
        to_exit = tl.exp2(to_exit)
        left = tl.zeros((Q,), dtype=tl.float32)
        for p_block in tl.static_range(P_BLOCKS):
            p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
            at_x = x_ptr + batch * x_sb + head * x_sh + token * x_st
            x = load_tile(at_x, x_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM)
            rows = p < tl.where(token < end, HEAD_DIM, 0)
            at_dS = dstates_ptr + (v * heads + head) * size
            dS = load_tile(at_dS, STATES, p, n, rows, RAGGED or CUT_P, CUT_N, STATES)
            xdS = tl.dot(x.to(dot_type), dS.to(dot_type), input_precision=PRECISION)
            xdS *= to_exit[:, None]
            left += tl.sum(B.to(tl.float32) * xdS, axis=1)
            dB += xdS * delta[:, None]
        tl.store(grad_ptr + 2 * plane + (v * heads + head) * Q + i, left)
    at_B = block * part + ((batch * length + token) * groups + group) * STATES
    B_st = groups * STATES
    store_part(dB_ptr, dB_scale_ptr, at_B, B_st, i, n, in_row, dB, RAGGED, CUT_N, STATES)


@triton.jit
def ssd_bwd_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, z_ptr, ungated_ptr, mask_ptr, dy_ptr, decay_ptr,
    states_ptr, dstates_ptr, dx_ptr, dz_ptr, dB_ptr, dC_ptr, dB_scale_ptr, dC_scale_ptr,
    grad_ptr, dD_ptr, cu_ptr, first_ptr, row_ptr,
    x_sb, x_st: tl.constexpr, x_sh, B_sb, B_st: tl.constexpr, B_sg, C_sb, C_st: tl.constexpr, C_sg,
    z_sb, z_st: tl.constexpr, z_sh, mask_sb, mask_st,
    dy_sb, dy_st: tl.constexpr, dy_sh, dx_sb, dx_st: tl.constexpr, dz_sb, dz_st: tl.constexpr,
    rows, length, heads: tl.constexpr, groups, plane, part,
    STATES: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk, from the state that enters it and the gradient of the one that leaves.

    SPLIT + 2 programs for a chunk, a group and HEADS of its heads: one program for all would need
    more registers than there are. Side by side, since they share x, dy and dS: SPLIT of them take
    every SPLITth head for dx, so that all walk through the heads at about the same speed and find
    in the L2 cache what the others have loaded. dB and dC are summed over heads in registers and
    written in parts, (HEAD_BLOCKS (SPLIT + 1), B, T, G, N), that are added up later; see
    `store_part` for their scales, (HEAD_BLOCKS (SPLIT + 1), B, T, G). grad (4,
    chunks, H, Q) is what `ssd_decay_bwd_kernel` reads; dD is (chunks, H, P) for D per channel, else
    (chunks, H, Q).
    """
    dot_type: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    CUT_N: tl.constexpr = STATES != BLOCK_N
    MASKED: tl.constexpr = RAGGED or mask_ptr is not None
    pid = tl.program_id(0) // (SPLIT + 2)
    role = tl.program_id(0) % (SPLIT + 2)
    block = pid % HEAD_BLOCKS
    group = (pid // HEAD_BLOCKS) % groups
    v = pid // (HEAD_BLOCKS * groups)
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    v = v.to(tl.int64)
    i = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    in_row = token + i < end
    is_real = in_row
    if mask_ptr is not None:
        at_mask = mask_ptr + batch * mask_sb + (token + i) * mask_st
        is_real = in_row & (tl.load(at_mask, mask=in_row, other=0) != 0)
    at_C = C_ptr + batch * C_sb + group * C_sg + token * C_st
    head_0 = group * (HEADS * HEAD_BLOCKS) + block * HEADS
    part_0 = block * (SPLIT + 1)
    at_B = B_ptr + batch * B_sb + group * B_sg + token * B_st
    if role < SPLIT:
        B = load_tile(at_B, B_st, i, n, in_row, RAGGED, CUT_N, STATES).to(dot_type)
        from_tokens(
            x_ptr, at_C, B, D_ptr, z_ptr, ungated_ptr, dy_ptr, decay_ptr, dstates_ptr,
            dx_ptr, dz_ptr, dB_ptr, dC_ptr, dB_scale_ptr, dC_scale_ptr, grad_ptr, dD_ptr,
            batch, token, end, in_row, is_real, v, group, part_0 + role, head_0 + role,
            x_sb, x_st, x_sh, C_st, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sh,
            dx_sb, dx_st, dz_sb, dz_st,
            length, heads, groups, plane, part, STATES, HEAD_DIM, RAGGED, MASKED,
            D_PER_CHANNEL, WIDE, PRECISION, Q, HEADS // SPLIT, SPLIT, BLOCK_P, P_BLOCKS, BLOCK_N,
            STAGES, LEAN,
        )  # fmt: skip
    elif role == SPLIT:
        B = load_tile(at_B, B_st, i, n, in_row, RAGGED, CUT_N, STATES).to(dot_type)
        from_exit(
            x_ptr, B, decay_ptr, dstates_ptr, dB_ptr, dB_scale_ptr, grad_ptr,
            batch, token, end, in_row, v, group, part_0 + SPLIT, head_0, x_sb, x_st, x_sh,
            length, heads, groups, plane, part, STATES, HEAD_DIM, RAGGED, WIDE, PRECISION, Q, HEADS,
            BLOCK_P, P_BLOCKS, BLOCK_N, STAGES,
        )  # fmt: skip
    else:
        C = load_tile(at_C, C_st, i, n, in_row, RAGGED, CUT_N, STATES).to(dot_type)
        from_states(
            C, z_ptr, dy_ptr, decay_ptr, states_ptr, dstates_ptr, dC_ptr, dC_scale_ptr, grad_ptr,
            batch, token, end, in_row, is_real, v, group, part_0 + SPLIT, head_0,
            z_sb, z_st, z_sh, dy_sb, dy_st, dy_sh, length, heads, groups, plane, part,
            STATES, HEAD_DIM, RAGGED, MASKED, WIDE, PRECISION, Q, HEADS, BLOCK_P, P_BLOCKS,
            BLOCK_N, STAGES,
        )  # fmt: skip
