"""Triton kernels of the experts for a few tokens: each slot by itself, bound by reading weights."""

import triton
import triton.language as tl

from ssm_hf.ops.moe.kernels import _activated


@triton.jit
def moe_in_step_kernel(
    x_ptr, experts_ptr, w_ptr, h_ptr, stride_x, inner,
    SIZE: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    GATED: tl.constexpr, SILU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h (S, I) = act(gate) * up of BLOCK_N channels of one slot."""
    slot = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    expert = tl.load(experts_ptr + slot)
    if expert < EXPERTS:
        width = 2 * inner if GATED else inner
        w_ptrs = w_ptr + expert.to(tl.int64) * width * SIZE + n[:, None] * SIZE + k[None, :]
        x_ptr += (slot // TOP_K).to(tl.int64) * stride_x
        gates = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        ups = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.range(0, SIZE, BLOCK_K, num_stages=STAGES):
            inside = (n < inner)[:, None] & (k < SIZE - start)[None, :]
            x = tl.load(x_ptr + start + k, mask=k < SIZE - start, other=0.0).to(tl.float32)[None, :]
            gates += tl.load(w_ptrs + start, mask=inside, other=0.0).to(tl.float32) * x
            if GATED:
                up = tl.load(w_ptrs + inner * SIZE + start, mask=inside, other=0.0)
                ups += up.to(tl.float32) * x
        h, _ = _activated(tl.sum(gates, axis=1), SILU)
        if GATED:
            h *= tl.sum(ups, axis=1)
        tl.store(h_ptr + slot.to(tl.int64) * inner + n, h, mask=n < inner)


@triton.jit
def moe_out_step_kernel(
    h_ptr, experts_ptr, weights_ptr, w_ptr, y_ptr, columns,
    SIZE: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y (N, columns): BLOCK_N columns of one token, its experts one after another."""
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    y = tl.zeros((BLOCK_N,), tl.float32)
    for choice in tl.static_range(TOP_K):
        slot = token * TOP_K + choice
        expert = tl.load(experts_ptr + slot)
        if expert < EXPERTS:
            weight = tl.load(weights_ptr + slot).to(tl.float32)
            w_ptrs = w_ptr + expert.to(tl.int64) * columns * SIZE + n[:, None] * SIZE + k[None, :]
            row_ptr = h_ptr + slot.to(tl.int64) * SIZE
            products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for start in tl.range(0, SIZE, BLOCK_K, num_stages=STAGES):
                inside = (n < columns)[:, None] & (k < SIZE - start)[None, :]
                h = tl.load(row_ptr + start + k, mask=k < SIZE - start, other=0.0).to(tl.float32)
                products += tl.load(w_ptrs + start, mask=inside, other=0.0).to(tl.float32) * h
            y += weight * tl.sum(products, axis=1)
    tl.store(y_ptr + token.to(tl.int64) * columns + n, y, mask=n < columns)
