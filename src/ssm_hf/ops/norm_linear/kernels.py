"""Triton kernel of a linear layer for a few rows, with what comes before and after it."""

import triton
import triton.language as tl

from ssm_hf.ops.causal_conv1d.kernels_step import history, shift_window, silu
from ssm_hf.ops.kernels_overlap import wait_for_previous


@triton.jit
def norm_linear_kernel(
    x_ptr, norm_weight_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    window_ptr, conv_weight_ptr, conv_bias_ptr,
    stride_x, stride_weight, stride_residual, stride_out,
    size_out, conv_first, channels, eps,
    SIZE_IN: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TAPS: tl.constexpr,  # 0: no convolution
    CONV_BIAS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_O outputs of all rows. Bound by reading the weight once.

    The program's whole part of the weight is loaded while the previous kernel still runs, and stays
    in registers. The norm's scale is a factor of the sum and is applied to it, so x is read once.
    """
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    o_inside = o < size_out
    weight_row = weight_ptr + o.to(tl.int64) * stride_weight
    weights = ()
    for first in tl.static_range(0, SIZE_IN, GROUP_SIZE):
        for start in tl.static_range(0, GROUP_SIZE, BLOCK_K):
            weight = tl.load(
                weight_row[:, None] + (first + start + k)[None, :],
                mask=o_inside[:, None] & (start + k < GROUP_SIZE)[None, :], other=0.0,
            )  # fmt: skip
            weights = weights + (weight,)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=o_inside, other=0.0).to(tl.float32)
    if TAPS > 0:
        channel = o - conv_first
        in_conv = o_inside & (channel >= 0) & (channel < channels)
        newest = tl.load(conv_weight_ptr + channel * TAPS + (TAPS - 1), mask=in_conv, other=0.0)
        newest = newest.to(tl.float32)
        pasts = ()
        for b in tl.static_range(BATCH):
            past = history(window_ptr + b * (TAPS - 1) * channels, conv_weight_ptr, conv_bias_ptr,
                           channel, in_conv, channels, TAPS, CONV_BIAS)  # fmt: skip
            pasts = pasts + (past,)
    wait_for_previous(OVERLAP)

    per_group: tl.constexpr = (GROUP_SIZE + BLOCK_K - 1) // BLOCK_K
    for b in tl.static_range(BATCH):
        if RESIDUAL:
            residual = tl.load(residual_ptr + b * stride_residual + o, mask=o_inside, other=0.0)
        y = tl.zeros([BLOCK_O], tl.float32)
        for group in tl.static_range(SIZE_IN // GROUP_SIZE):
            products = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
            squares = tl.zeros([BLOCK_K], tl.float32)
            for part in tl.static_range(per_group):
                i = group * GROUP_SIZE + part * BLOCK_K + k
                i_inside = part * BLOCK_K + k < GROUP_SIZE
                x = tl.load(x_ptr + b * stride_x + i, mask=i_inside, other=0.0).to(tl.float32)
                if NORM:
                    squares += x * x
                    scale = tl.load(norm_weight_ptr + i, mask=i_inside, other=0.0)
                    x *= scale.to(tl.float32)
                products += weights[group * per_group + part].to(tl.float32) * x[None, :]
            partial = tl.sum(products, axis=1)
            if NORM:
                partial *= tl.rsqrt(tl.sum(squares) / GROUP_SIZE + eps)
            y += partial
        if HAS_BIAS:
            y += bias
        if TAPS > 0:
            new = y
            y = tl.where(in_conv, silu(pasts[b] + new * newest), y)
            tl.debug_barrier()
            shift_window(new, window_ptr + b * (TAPS - 1) * channels, channel, in_conv, channels,
                         TAPS)  # fmt: skip
        if RESIDUAL:
            y += residual.to(tl.float32)
        tl.store(out_ptr + b * stride_out + o, y, mask=o_inside)
