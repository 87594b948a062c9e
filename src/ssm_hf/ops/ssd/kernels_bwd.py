"""Triton kernels of Mamba-2's scan: gradients of one chunk, all chunks at once."""

import triton
import triton.language as tl

from ssm_hf.ops.ssd.kernels import gated, load_tile, place_of_chunk, store_tile


@triton.jit
def ssd_bwd_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, z_ptr, ungated_ptr, mask_ptr, dy_ptr, decay_ptr,
    states_ptr, dstates_ptr, dx_ptr, dz_ptr, dB_ptr, dC_ptr, grad_ptr, dD_ptr,
    cu_ptr, first_ptr, row_ptr,
    x_sb, x_st, x_sh, B_sb, B_st, B_sg, C_sb, C_st, C_sg, z_sb, z_st, z_sh, mask_sb, mask_st,
    dy_sb, dy_st, dy_sh, rows, length, heads, groups, plane, part,
    STATES: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk, from the state that enters it and the gradient of the one that leaves.

    One program for a chunk, a group and HEADS of its heads. dB and dC are summed over these heads
    in registers; with HEAD_BLOCKS > 1 each block writes a part (HEAD_BLOCKS, B, T, G, N) of its
    own. grad (3, chunks, H, Q) is what `ssd_decay_bwd_kernel` reads; dD is (chunks, H, P) for D per
    channel, else (chunks, H, Q). Tiles of pairs of tokens are [s, t], s <= t.
    """
    dot_type: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    pid = tl.program_id(0)
    block = pid % HEAD_BLOCKS
    group = (pid // HEAD_BLOCKS) % groups
    v = pid // (HEAD_BLOCKS * groups)
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    v = v.to(tl.int64)
    i = tl.arange(0, Q)
    t = token + i
    n = tl.arange(0, BLOCK_N)
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    CUT_N: tl.constexpr = STATES != BLOCK_N
    in_row = t < end
    at_B = B_ptr + batch * B_sb + group * B_sg + token * B_st
    B = load_tile(at_B, B_st, i, n, in_row, RAGGED, CUT_N, STATES).to(dot_type)
    at_C = C_ptr + batch * C_sb + group * C_sg + token * C_st
    C = load_tile(at_C, C_st, i, n, in_row, RAGGED, CUT_N, STATES).to(dot_type)
    is_real = in_row
    if mask_ptr is not None:
        at_mask = mask_ptr + batch * mask_sb + t * mask_st
        is_real = in_row & (tl.load(at_mask, mask=in_row, other=0) != 0)
    BC = tl.dot(B, tl.trans(C), input_precision=PRECISION)
    CUT_STATE: tl.constexpr = RAGGED or CUT_P
    MASKED: tl.constexpr = RAGGED or mask_ptr is not None
    causal = i[:, None] <= i[None, :]
    diagonal = i[:, None] == i[None, :]

    W_sum = tl.zeros((Q, Q), dtype=tl.float32)
    dB = tl.zeros((Q, BLOCK_N), dtype=tl.float32)
    dC = tl.zeros((Q, BLOCK_N), dtype=tl.float32)
    size = HEAD_DIM * STATES
    y_st = heads * HEAD_DIM
    head_0 = group * (HEADS * HEAD_BLOCKS) + block * HEADS
    for step in tl.range(0, HEADS, num_stages=STAGES):
        head = head_0 + step
        at = decay_ptr + (v * heads + head) * Q
        hi, lo = tl.load(at + i), tl.load(at + plane + i)
        delta = tl.load(at + 2 * plane + i)
        hi_end, lo_end = tl.load(at + Q - 1), tl.load(at + plane + Q - 1)
        exponent = (hi[None, :] - hi[:, None]) + (lo[None, :] - lo[:, None])
        M = tl.exp2(tl.where(causal, exponent, float("-inf")))
        from_entry = tl.exp2(hi + lo)
        to_exit = tl.exp2((hi_end - hi) + (lo_end - lo))
        # dx_s = sum of scores[s, t] dy_t + what comes from the state that leaves
        scores = BC * M * delta[:, None]
        if D_ptr is not None and not D_PER_CHANNEL:
            scores += tl.where(diagonal, tl.load(D_ptr + head).to(tl.float32), 0.0)
        scores = scores.to(dot_type)
        da = tl.zeros((Q,), dtype=tl.float32)
        left = tl.zeros((Q,), dtype=tl.float32)
        dscale = tl.zeros((Q,), dtype=tl.float32)
        dD = tl.zeros((Q,), dtype=tl.float32)
        kept = 0.0
        for p_block in tl.static_range(P_BLOCKS):
            p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
            at_x = x_ptr + batch * x_sb + head * x_sh + token * x_st
            x = load_tile(at_x, x_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM)
            at_dy = dy_ptr + batch * dy_sb + head * dy_sh + token * dy_st
            dy = load_tile(at_dy, dy_st, i, p, is_real, MASKED, CUT_P, HEAD_DIM)
            at = (v * heads + head) * size
            # Empty chunks (VARLEN) have no states; RAGGED covers them.
            in_tile = p < tl.where(token < end, HEAD_DIM, 0)
            S = load_tile(states_ptr + at, STATES, p, n, in_tile, CUT_STATE, CUT_N, STATES)
            dS = load_tile(dstates_ptr + at, STATES, p, n, in_tile, CUT_STATE, CUT_N, STATES)
            at_y = ((batch * length + token) * heads + head) * HEAD_DIM
            if z_ptr is not None:
                at_z = z_ptr + batch * z_sb + head * z_sh + token * z_st
                z = load_tile(at_z, z_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM).to(tl.float32)
                y = load_tile(ungated_ptr + at_y, y_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM).to(
                    tl.float32
                )
                sigmoid = 1.0 / (1.0 + tl.exp(-z))
                dz = dy.to(tl.float32) * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
                store_tile(dz_ptr + at_y, y_st, i, p, in_row, dz, RAGGED, CUT_P, HEAD_DIM)
                dy = gated(dy.to(tl.float32), z)
            xd, dyd, S, dS = x.to(dot_type), dy.to(dot_type), S.to(dot_type), dS.to(dot_type)

            # Between tokens of the chunk
            W = tl.dot(xd, tl.trans(dyd), input_precision=PRECISION)
            if D_ptr is not None and not D_PER_CHANNEL:
                dD += tl.sum(tl.where(diagonal, W, 0.0), axis=1)
            W *= M
            pairs = W * BC
            dscale += tl.sum(pairs, axis=1)
            # A token's effect on itself has no decay; with it, much would cancel in da.
            pairs = tl.where(diagonal, 0.0, pairs * delta[:, None])
            da += tl.sum(pairs, axis=0) - tl.sum(pairs, axis=1)
            W_sum += W * delta[:, None]
            dx = tl.dot(scores, dyd, input_precision=PRECISION)
            # From the state that enters
            dyS = tl.dot(dyd, S, input_precision=PRECISION) * from_entry[:, None]
            dC += dyS
            da += tl.sum(C.to(tl.float32) * dyS, axis=1)
            # To the state that leaves
            BdS = tl.dot(B, tl.trans(dS), input_precision=PRECISION) * to_exit[:, None]
            dx += BdS * delta[:, None]
            x_wide = x.to(tl.float32)
            left += tl.sum(x_wide * BdS, axis=1)
            leaving = (x_wide * (delta * to_exit)[:, None]).to(dot_type)
            dB = tl.dot(leaving, dS, dB, input_precision=PRECISION)
            # <S, dS>: as a product, so that both are nothing but operands of products.
            product = tl.dot(S, tl.trans(dS), input_precision=PRECISION)
            on_diagonal = tl.arange(0, BLOCK_P)[:, None] == tl.arange(0, BLOCK_P)[None, :]
            kept += tl.sum(tl.sum(tl.where(on_diagonal, product, 0.0), axis=1), axis=0)

            if D_ptr is not None and D_PER_CHANNEL:
                D = tl.load(D_ptr + head * HEAD_DIM + p, mask=p < HEAD_DIM, other=0.0)
                dy_wide = dy.to(tl.float32)
                dx += dy_wide * D.to(tl.float32)[None, :]
                at_D = dD_ptr + (v * heads + head) * HEAD_DIM + p
                tl.store(at_D, tl.sum(dy_wide * x_wide, axis=0), mask=p < HEAD_DIM)
            store_tile(dx_ptr + at_y, y_st, i, p, in_row, dx, RAGGED, CUT_P, HEAD_DIM)
        da += tl.where(i == Q - 1, tl.exp2(hi_end + lo_end) * kept, 0.0)
        at_grad = grad_ptr + (v * heads + head) * Q + i
        tl.store(at_grad, da)
        tl.store(at_grad + plane, left * delta)
        tl.store(at_grad + 2 * plane, dscale + left)
        if D_ptr is not None and not D_PER_CHANNEL:
            tl.store(dD_ptr + (v * heads + head) * Q + i, dD)

    W = W_sum.to(dot_type)
    dB = tl.dot(W, C, dB, input_precision=PRECISION)
    dC = tl.dot(tl.trans(W), B, dC, input_precision=PRECISION)
    at_BC = block * part + ((batch * length + token) * groups + group) * STATES
    BC_st = groups * STATES
    store_tile(dB_ptr + at_BC, BC_st, i, n, in_row, dB, RAGGED, CUT_N, STATES)
    store_tile(dC_ptr + at_BC, BC_st, i, n, in_row, dC, RAGGED, CUT_N, STATES)
