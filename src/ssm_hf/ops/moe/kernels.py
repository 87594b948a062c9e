"""Triton kernels of the experts' products: rows sorted by expert, each with its expert's weights.

order (S,) lists slots (token * TOP_K + choice) by expert, totals (E,) counts each expert's. Tensors
called sorted have one row for each place in that order. Nothing is known to the host but an upper
bound of the number of tiles: programs find their expert themselves, and what is too many leaves.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def described(matrices: Tensor, block: list[int]) -> Any:
    """A descriptor of (..., rows, columns), stacked on one another, by which a program copies a
    whole block at a time (Hopper's tensor memory accelerator)."""
    return TensorDescriptor.from_tensor(matrices.view(-1, matrices.shape[-1]), block)


@triton.jit
def _share(
    totals_ptr, tiles_n,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The program's expert (EXPERTS or more: none), its first place and number of rows, the first
    row of the tile and its column of tiles.

    Neighbouring programs share GROUP tiles of rows and walk over all columns, so that rows and
    weights are found in the L2 cache.
    """
    pid = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    totals = tl.load(totals_ptr + e, mask=e < EXPERTS, other=0)
    tiles = (totals + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles, axis=0) * tiles_n <= pid).to(tl.int32), axis=0)
    rows = tl.sum(tl.where(e == expert, totals, 0), axis=0)
    first = tl.sum(tl.where(e < expert, totals, 0), axis=0)
    local = pid - tl.sum(tl.where(e < expert, tiles, 0), axis=0) * tiles_n
    group = local // (GROUP * tiles_n)
    local -= group * GROUP * tiles_n
    width = tl.minimum((rows + BLOCK_M - 1) // BLOCK_M - group * GROUP, GROUP)
    width = tl.maximum(width, 1)
    return expert, first, rows, (group * GROUP + local % width) * BLOCK_M, local // width


@triton.jit
def _activated(pre, SILU: tl.constexpr):
    """silu(pre) or relu(pre)², and its slope."""
    if SILU:
        sigmoid = tl.sigmoid(pre)
        value = pre * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    else:
        positive = tl.maximum(pre, 0.0)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@triton.jit
def moe_in_kernel(
    x_ptr, w_ptr, order_ptr, totals_ptr, h_ptr, pre_ptr, stride_x, inner, tiles_n,
    SIZE: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    GATED: tl.constexpr, SILU: tl.constexpr, KEEP: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """h (S, I) sorted = act(gate) * up, [gate | up] = w (E, 2 I, D) x of the slots' tokens.

    KEEP also writes pre (S, 2 I) sorted, what stands before the activation. Without GATED there is
    no up. DESCRIBED: w is a descriptor of (E 2 I, D), with blocks (BLOCK_N, BLOCK_K).
    """
    expert, first, rows, m_start, n_tile = _share(
        totals_ptr, tiles_n, EXPERTS, BLOCK_E, BLOCK_M, GROUP
    )
    if expert < EXPERTS:
        m = m_start + tl.arange(0, BLOCK_M)
        n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        slot = tl.load(order_ptr + first + m, mask=m < rows, other=0)
        x_ptrs = x_ptr + (slot // TOP_K).to(tl.int64)[:, None] * stride_x + k[None, :]
        width = 2 * inner if GATED else inner
        w_row = expert * width + n_tile * BLOCK_N
        to_up = inner * SIZE
        if not DESCRIBED:
            w_ptr += expert.to(tl.int64) * width * SIZE
            w_ptrs = w_ptr + n[None, :] * SIZE + k[:, None]
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, SIZE, BLOCK_K, num_stages=STAGES):
            if EVEN_K:
                x = tl.load(x_ptrs + start)
            else:
                x = tl.load(x_ptrs + start, mask=(k < SIZE - start)[None, :], other=0.0)
            if DESCRIBED:
                w = tl.trans(w_ptr.load([w_row, start]))
            elif EVEN_K and EVEN_N:
                w = tl.load(w_ptrs + start)
            else:
                inside = (k < SIZE - start)[:, None] & (n < inner)[None, :]
                w = tl.load(w_ptrs + start, mask=inside, other=0.0)
            gate = tl.dot(x, w, gate, input_precision=PRECISION)
            if GATED:
                if DESCRIBED:
                    v = tl.trans(w_ptr.load([w_row + inner, start]))
                elif EVEN_K and EVEN_N:
                    v = tl.load(w_ptrs + to_up + start)
                else:
                    v = tl.load(w_ptrs + to_up + start, mask=inside, other=0.0)
                up = tl.dot(x, v, up, input_precision=PRECISION)
        stored = (m < rows)[:, None] & (n < inner)[None, :]
        row = (first + m).to(tl.int64)[:, None]
        h, _ = _activated(gate, SILU)
        if GATED:
            h *= up
        tl.store(h_ptr + row * inner + n[None, :], h, mask=stored)
        if KEEP:
            pre_ptrs = pre_ptr + row * width + n[None, :]
            tl.store(pre_ptrs, gate, mask=stored)
            if GATED:
                tl.store(pre_ptrs + inner, up, mask=stored)


@triton.jit
def moe_rows_kernel(
    a_ptr, w_ptr, weights_ptr, order_ptr, totals_ptr, out_ptr, columns, tiles_n,
    SIZE: tl.constexpr, EXPERTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, WEIGHTED: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """out[slot] (S, columns) = weights[slot] * (a (S, SIZE) sorted times the expert's weights).

    Those are w (E, columns, SIZE) where TRANSPOSED, else (E, SIZE, columns). DESCRIBED: a and w are
    descriptors, of w as (E columns, SIZE) or (E SIZE, columns).
    """
    expert, first, rows, m_start, n_tile = _share(
        totals_ptr, tiles_n, EXPERTS, BLOCK_E, BLOCK_M, GROUP
    )
    if expert < EXPERTS:
        m = m_start + tl.arange(0, BLOCK_M)
        n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        if not DESCRIBED:
            # Instead of rows behind the last, the last again.
            row = first + tl.minimum(m, rows - 1)
            a_ptrs = a_ptr + row.to(tl.int64)[:, None] * SIZE + k[None, :]
            w_ptr += expert.to(tl.int64) * columns * SIZE
            if TRANSPOSED:
                w_ptrs = w_ptr + n[None, :] * SIZE + k[:, None]
                step = 1
            else:
                w_ptrs = w_ptr + k[:, None] * columns + n[None, :]
                step = columns
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, SIZE, BLOCK_K, num_stages=STAGES):
            if DESCRIBED:
                a = a_ptr.load([first + m_start, start])
            elif EVEN_K:
                a = tl.load(a_ptrs + start)
            else:
                a = tl.load(a_ptrs + start, mask=(k < SIZE - start)[None, :], other=0.0)
            if DESCRIBED:
                if TRANSPOSED:
                    w = tl.trans(w_ptr.load([expert * columns + n_tile * BLOCK_N, start]))
                else:
                    w = w_ptr.load([expert * SIZE + start, n_tile * BLOCK_N])
            elif EVEN_K and EVEN_N:
                w = tl.load(w_ptrs + start * step)
            else:
                inside = (k < SIZE - start)[:, None] & (n < columns)[None, :]
                w = tl.load(w_ptrs + start * step, mask=inside, other=0.0)
            total = tl.dot(a, w, total, input_precision=PRECISION)
        slot = tl.load(order_ptr + first + m, mask=m < rows, other=0)
        if WEIGHTED:
            total *= tl.load(weights_ptr + slot, mask=m < rows, other=0.0).to(tl.float32)[:, None]
        stored = (m < rows)[:, None] & (n < columns)[None, :]
        tl.store(out_ptr + slot.to(tl.int64)[:, None] * columns + n[None, :], total, mask=stored)


@triton.jit
def moe_sum_kernel(
    rows_ptr, experts_ptr, y_ptr, tokens, columns,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (N, columns) = the sum of each token's TOP_K rows of (N TOP_K, columns), in their order."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (n < columns)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for choice in tl.static_range(TOP_K):
        slot = token.to(tl.int64) * TOP_K + choice
        expert = tl.load(experts_ptr + slot, mask=token < tokens, other=EXPERTS)
        at = slot[:, None] * columns + n[None, :]
        row = tl.load(rows_ptr + at, mask=inside & (expert < EXPERTS)[:, None], other=0.0)
        total += row.to(tl.float32)
    tl.store(y_ptr + token.to(tl.int64)[:, None] * columns + n[None, :], total, mask=inside)
