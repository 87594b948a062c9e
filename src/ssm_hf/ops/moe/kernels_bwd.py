"""Triton kernels of the experts' backward pass; see kernels.py for order, totals and sorted."""

import triton
import triton.language as tl

from ssm_hf.ops.moe.kernels import _activated, _share


@triton.jit
def moe_hidden_bwd_kernel(
    dy_ptr, w_ptr, weights_ptr, pre_ptr, order_ptr, totals_ptr,
    dpre_ptr, h_ptr, dweights_ptr, stride_dy, inner, tiles_n, slots,
    SIZE: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    GATED: tl.constexpr, SILU: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From dy (N, D') of the slots' tokens and w (E, D', I) to what stands before the activation.

    dpre (S, 2 I) sorted; h (S, I) sorted, formed again from pre and times the slot's weight, for
    the gradient of w; dweights (tiles_n, S), the tile's part of h · dh for each slot.
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
        w_ptr += expert.to(tl.int64) * inner * SIZE
        w_ptrs = w_ptr + k[:, None] * inner + n[None, :]
        dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, SIZE, BLOCK_K, num_stages=STAGES):
            if EVEN_K:
                dy = tl.load(dy_ptrs + start)
            else:
                dy = tl.load(dy_ptrs + start, mask=(k < SIZE - start)[None, :], other=0.0)
            if EVEN_K and EVEN_N:
                w = tl.load(w_ptrs + start * inner)
            else:
                inside = (k < SIZE - start)[:, None] & (n < inner)[None, :]
                w = tl.load(w_ptrs + start * inner, mask=inside, other=0.0)
            dh = tl.dot(dy, w, dh, input_precision=PRECISION)
        stored = (m < rows)[:, None] & (n < inner)[None, :]
        row = (first + m).to(tl.int64)[:, None]
        width = 2 * inner if GATED else inner
        gate = tl.load(pre_ptr + row * width + n[None, :], mask=stored, other=0.0).to(tl.float32)
        weight = tl.load(weights_ptr + slot, mask=m < rows, other=0.0).to(tl.float32)[:, None]
        value, slope = _activated(gate, SILU)
        dpre_ptrs = dpre_ptr + row * width + n[None, :]
        if GATED:
            up = tl.load(pre_ptr + row * width + inner + n[None, :], mask=stored, other=0.0)
            up = up.to(tl.float32)
            tl.store(dpre_ptrs + inner, dh * weight * value, mask=stored)
            slope *= up
            value *= up
        tl.store(dpre_ptrs, dh * weight * slope, mask=stored)
        tl.store(h_ptr + row * inner + n[None, :], value * weight, mask=stored)
        part = tl.sum(dh * value, axis=1)
        tl.store(dweights_ptr + n_tile.to(tl.int64) * slots + slot, part, mask=m < rows)


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
    for start in tl.range(0, rows, BLOCK_K, num_stages=STAGES):
        inside = k < rows - start
        place = first + start + k
        token = (tl.load(order_ptr + place, mask=inside, other=0) // TOP_K).to(tl.int64)
        if A_GATHERED:
            a_row, b_row = token, place.to(tl.int64)
        else:
            a_row, b_row = place.to(tl.int64), token
        a_inside = inside[:, None] if EVEN_M else inside[:, None] & (m < size_m)[None, :]
        b_inside = inside[:, None] if EVEN_N else inside[:, None] & (n < size_n)[None, :]
        a = tl.load(a_ptr + a_row[:, None] * stride_a + m[None, :], mask=a_inside, other=0.0)
        b = tl.load(b_ptr + b_row[:, None] * stride_b + n[None, :], mask=b_inside, other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    dw_ptr += expert.to(tl.int64) * size_m * size_n
    stored = (m < size_m)[:, None] & (n < size_n)[None, :]
    tl.store(dw_ptr + m[:, None] * size_n + n[None, :], total, mask=stored)
