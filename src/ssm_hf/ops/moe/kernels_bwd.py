"""Triton kernels of the experts' backward pass; see kernels.py for order, totals and sorted."""

import triton
import triton.language as tl

from ssm_hf.ops.moe.kernels import _activated, _share


@triton.jit
def _halves(tile):
    """The left and the right half of a tile."""
    pairs = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def _through_activation(
    dh, pre_ptr, dpre_ptr, h_ptr, weight, row, n, row_inside, inner,
    GATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dpre and weighted h of some columns n; returns the sum of h · dh of each row."""
    stored = row_inside[:, None] & (n < inner)[None, :]
    width = 2 * inner if GATED else inner
    pre_ptrs = pre_ptr + row * width + n[None, :]
    gate = tl.load(pre_ptrs, mask=stored, other=0.0).to(tl.float32)
    value, slope = _activated(gate, SILU)
    dpre_ptrs = dpre_ptr + row * width + n[None, :]
    if GATED:
        tl.store(dpre_ptrs + inner, dh * weight * value, mask=stored)
        up = tl.load(pre_ptrs + inner, mask=stored, other=0.0).to(tl.float32)
        slope *= up
        value *= up
    tl.store(dpre_ptrs, dh * weight * slope, mask=stored)
    tl.store(h_ptr + row * inner + n[None, :], value * weight, mask=stored)
    return tl.sum(dh * value, axis=1)


@triton.jit
def moe_hidden_bwd_kernel(
    dy_ptr, w_ptr, weights_ptr, pre_ptr, order_ptr, totals_ptr,
    dpre_ptr, h_ptr, dweights_ptr, stride_dy, inner, tiles_n, slots,
    SIZE: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    GATED: tl.constexpr, SILU: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """From dy (N, D') of the slots' tokens and w (E, D', I) to what stands before the activation.

    dpre (S, 2 I) sorted; h (S, I) sorted, formed again from pre and times the slot's weight, for
    the gradient of w; dweights (tiles_n, S), the tile's part of h · dh for each slot. DESCRIBED: w
    is a descriptor of (E D', I), with blocks (BLOCK_K, BLOCK_N).
    """
    expert, first, rows, m_start, n_tile = _share(
        totals_ptr, tiles_n, EXPERTS, BLOCK_E, BLOCK_M, GROUP
    )
    if expert < EXPERTS:
        m = m_start + tl.arange(0, BLOCK_M)
        n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        slot = tl.load(order_ptr + first + m, mask=m < rows, other=0)
        dy_ptrs = dy_ptr + (slot // TOP_K).to(tl.int64)[:, None] * stride_dy + k[None, :]
        if not DESCRIBED:
            w_ptr += expert.to(tl.int64) * inner * SIZE
            w_ptrs = w_ptr + k[:, None] * inner + n[None, :]
        dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, SIZE, BLOCK_K, num_stages=STAGES):
            if EVEN_K:
                dy = tl.load(dy_ptrs + start)
            else:
                dy = tl.load(dy_ptrs + start, mask=(k < SIZE - start)[None, :], other=0.0)
            if DESCRIBED:
                w = w_ptr.load([expert * SIZE + start, n_tile * BLOCK_N])
            elif EVEN_K and EVEN_N:
                w = tl.load(w_ptrs + start * inner)
            else:
                inside = (k < SIZE - start)[:, None] & (n < inner)[None, :]
                w = tl.load(w_ptrs + start * inner, mask=inside, other=0.0)
            dh = tl.dot(dy, w, dh, input_precision=PRECISION)
        row = (first + m).to(tl.int64)[:, None]
        row_inside = m < rows
        weight = tl.load(weights_ptr + slot, mask=row_inside, other=0.0).to(tl.float32)[:, None]
        # A whole tile of everything would not fit into registers.
        if PARTS == 1:
            tiles = (dh,)
        elif PARTS == 2:
            tiles = _halves(dh)
        else:
            left, right = _halves(dh)
            tiles = _halves(left) + _halves(right)
        part = tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.static_range(PARTS):
            some = n_tile * BLOCK_N + i * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
            part += _through_activation(tiles[i], pre_ptr, dpre_ptr, h_ptr, weight, row, some,
                                        row_inside, inner, GATED, SILU)  # fmt: skip
        tl.store(dweights_ptr + n_tile.to(tl.int64) * slots + slot, part, mask=row_inside)


@triton.jit
def moe_weights_bwd_kernel(
    a_ptr, b_ptr, order_ptr, totals_ptr, dw_ptr, stride_a, stride_b, size_m, size_n,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, A_GATHERED: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dw (E, size_m, size_n) = a^T b over the expert's rows, of which there may be none.

    One of a and b is sorted, the other one, a where A_GATHERED, has a row for each token.
    """
    tiles_m = tl.cdiv(size_m, BLOCK_M)
    tiles_n = tl.cdiv(size_n, BLOCK_N)
    pid = tl.program_id(0)
    expert = pid // (tiles_m * tiles_n)
    local = pid - expert * (tiles_m * tiles_n)
    group = local // (GROUP * tiles_n)
    local -= group * GROUP * tiles_n
    width = tl.minimum(tiles_m - group * GROUP, GROUP)
    m = (group * GROUP + local % width) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (local // width) * BLOCK_N + tl.arange(0, BLOCK_N)

    e = tl.arange(0, BLOCK_E)
    totals = tl.load(totals_ptr + e, mask=e < EXPERTS, other=0)
    rows = tl.sum(tl.where(e == expert, totals, 0), axis=0)
    first = tl.sum(tl.where(e < expert, totals, 0), axis=0)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Loaded a step ahead: a load whose address is loaded beside it would halve the pipeline.
    slot = tl.load(order_ptr + first + k, mask=k < rows, other=0)
    for start in tl.range(0, rows, BLOCK_K, num_stages=STAGES):
        inside = k < rows - start
        place = (first + start + k).to(tl.int64)
        token = (slot // TOP_K).to(tl.int64)
        slot = tl.load(order_ptr + place + BLOCK_K, mask=k < rows - start - BLOCK_K, other=0)
        if A_GATHERED:
            a_row, b_row = token, place
        else:
            a_row, b_row = place, token
        a_inside = inside[:, None] if EVEN_M else inside[:, None] & (m < size_m)[None, :]
        b_inside = inside[:, None] if EVEN_N else inside[:, None] & (n < size_n)[None, :]
        a = tl.load(a_ptr + a_row[:, None] * stride_a + m[None, :], mask=a_inside, other=0.0)
        b = tl.load(b_ptr + b_row[:, None] * stride_b + n[None, :], mask=b_inside, other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    dw_ptr += expert.to(tl.int64) * size_m * size_n
    stored = (m < size_m)[:, None] & (n < size_n)[None, :]
    tl.store(dw_ptr + m[:, None] * size_n + n[None, :], total, mask=stored)
