"""Triton kernel of Mamba-3's scan: pairs of rows of one chunk and head, backwards."""

import triton
import triton.language as tl

from ssm_hf.ops.mamba3_scan.kernels_backward import (
    at_group,
    at_head,
    fetch,
    load_x_and_dy,
    masks_of_chunk,
    of_tokens,
    operands,
    place_of_program,
    rest_of,
)
from ssm_hf.ops.mamba3_scan.kernels_tiles import exp2, load_token, products
from ssm_hf.ops.ssd.kernels import store_tile


@triton.jit
def mamba3_pairs_kernel(
    x_ptr, mx_ptr, B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, D_ptr, z_ptr, mz_ptr, mo_ptr, mask_ptr,
    dy_ptr, token_ptr, scale_ptr, angle_ptr, dD_ptr, grad_ptr, pairs_ptr, cu_ptr, first_ptr,
    row_ptr, x_sb, x_st, x_sh, z_sb, z_st, z_sh, mask_sb, mask_st, dy_sb, dy_st, dy_sr, dy_sh,
    rows, length, heads: tl.constexpr, groups, ranks, plane,
    HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr, PER_RANK: tl.constexpr, ROPE: tl.constexpr,
    VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    Q: tl.constexpr, RANKS: tl.constexpr, BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr, AHEAD: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Pairs of rows s <= t of one chunk and head, and the gradient of D.

    pairs (chunks, H, 2, ROWS, ROWS) keeps their weight and the gradient of k_s q_t, for the kernels
    of keys and of queries: with them in one program registers would allow two at a time on a
    multiprocessor, apart three. grad (5, chunks, H, Q) is what `mamba3_prepare_bwd_kernel` reads.
    AHEAD: the program whose inputs are asked for; see `fetch`. FLAT sums a diagonal in one go: of a
    sum of sums Triton 3.6 makes no code for Blackwell.
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
    in_row, in_tokens, is_real = masks_of_chunk(
        batch, token, end, of_token, j, mask_ptr, mask_sb, mask_st
    )
    at = token_ptr + here * (4 * Q)
    a, b, gamma, _delta = load_token(at, Q, RANKS)
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
    _cos, _sin, ka, kb, qa, qb = operands(
        B_ptr, B_bias_ptr, C_ptr, C_bias_ptr, angle_ptr, at_rows, here, head, i, in_row, dot_type,
        RAGGED, ROPE, FAST, Q, RANKS, W, V,
    )  # fmt: skip
    kc = rest_of(B_ptr, B_bias_ptr, at_rows, head, i, in_row, dot_type, RAGGED, FAST, RANKS, W, V)
    qc = rest_of(C_ptr, C_bias_ptr, at_rows, head, i, in_row, dot_type, RAGGED, FAST, RANKS, W, V)
    at_pairs = pairs_ptr + here * (2 * ROWS * ROWS)
    at_grad = grad_ptr + here * Q + j
    xdy = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    for p_block in tl.static_range(P_BLOCKS):
        p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
        if P_BLOCKS > 1:
            x, dy = load_x_and_dy(
                at_x, x_st, mx_ptr, at_dy, dy_st, dy_sr, at_z, z_st, mz_ptr, mo_ptr, head, j, p,
                in_tokens, is_real, ranks, dot_type, RAGGED, MASKED, PER_RANK, RANKS, CUT_P,
                HEAD_DIM, FAST,
            )  # fmt: skip
        xdy = tl.dot(x, tl.trans(dy), xdy, input_precision=PRECISION)
    kq = products(ka, kb, kc, qa, qb, qc, dot_type, PRECISION)

    if AHEAD > 0:
        # Here, half a program's time before they are read: L2 keeps nothing for much longer.
        fetch(
            x_ptr, z_ptr, dy_ptr, angle_ptr, token_ptr, tl.program_id(0) + AHEAD,
            x_sb, x_st, x_sh, z_sb, z_st, z_sh, dy_sb, dy_st, dy_sh, rows, length, heads,
            cu_ptr, first_ptr, row_ptr, VARLEN, HEAD_DIM, Q, W,
        )  # fmt: skip

    # Tiles of pairs of rows are [s, t], s <= t: s reaches t > s with M s_s, itself with gamma.
    later = of_token[:, None] < of_token[None, :]
    same = of_token[:, None] == of_token[None, :]
    if WIDE:
        scale = tl.load(scale_ptr + here * Q + of_token)
        exponent = (a[None, :] - a[:, None]) + (b[None, :] - b[:, None])
    else:
        scale = exp2(a - b, FAST)
        exponent = a[None, :] - a[:, None]
    M = exp2(tl.where(later, exponent, float("-inf")), FAST)
    both = xdy * kq
    on_self = tl.sum(tl.where(same, both, 0.0), axis=1)
    tl.store(at_grad + 3 * plane, of_tokens(on_self, Q, RANKS))
    both *= M
    dscale = tl.sum(both, axis=1)
    if WIDE:
        # The same numbers with both signs: over a chunk, what they have in common cancels.
        both *= scale[:, None]
        da = tl.sum(both, axis=0) - tl.sum(both, axis=1)
    else:
        da = tl.sum(both * scale[:, None], axis=0) - scale * dscale
    M = tl.where(same, gamma[:, None], M * scale[:, None])
    pairs = (xdy * M).to(dot_type)
    scores = kq * M
    diagonal = i[:, None] == i[None, :]
    if D_ptr is not None:
        scores += tl.where(diagonal, tl.load(D_ptr + head).to(tl.float32), 0.0)
        at_D = dD_ptr + here
        trace = tl.where(diagonal, xdy, 0.0)
        tl.store(at_D, tl.sum(trace) if FLAT else tl.sum(tl.sum(trace, axis=1), axis=0))
    scores = scores.to(dot_type)
    store_tile(at_pairs, ROWS, i, i, in_row, scores, False, False, ROWS)
    store_tile(at_pairs + ROWS * ROWS, ROWS, i, i, in_row, pairs, False, False, ROWS)
    tl.store(at_grad, of_tokens(da, Q, RANKS))
    tl.store(at_grad + 2 * plane, of_tokens(dscale, Q, RANKS))
