"""Triton kernel of a linear layer for a few rows, with what comes before and after it."""

import triton
import triton.language as tl

from ssm_hf.ops.causal_conv1d.kernels_step import convolved, shift_window


@triton.jit
def norm_linear_kernel(
    x_ptr, norm_weight_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    window_ptr, conv_weight_ptr, conv_bias_ptr,
    stride_x, stride_weight, stride_residual, stride_out,
    batch, size_out, size_in, group_size, conv_first, channels, eps,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TAPS: tl.constexpr,  # 0: no convolution
    CONV_BIAS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_O outputs of all rows. Bound by reading the weight once.

    The norm's scale is a factor of the sum and is applied to it, so x is read once too.
    """
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    b = tl.arange(0, BATCH)
    k = tl.arange(0, BLOCK_K)
    o_inside, b_inside = o < size_out, b < batch
    weight_row = weight_ptr + o.to(tl.int64)[:, None] * stride_weight
    y = tl.zeros([BATCH, BLOCK_O], tl.float32)
    for first in range(0, size_in, group_size):
        products = tl.zeros([BATCH, BLOCK_O, BLOCK_K], tl.float32)
        squares = tl.zeros([BATCH, BLOCK_K], tl.float32)
        for start in range(0, group_size, BLOCK_K):
            i = first + start + k
            i_inside = start + k < group_size
            weight = tl.load(
                weight_row + i[None, :], mask=o_inside[:, None] & i_inside[None, :], other=0.0
            ).to(tl.float32)
            x = tl.load(
                x_ptr + b[:, None] * stride_x + i[None, :],
                mask=b_inside[:, None] & i_inside[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            if NORM:
                squares += x * x
                x *= tl.load(norm_weight_ptr + i, mask=i_inside, other=0.0).to(tl.float32)[None, :]
            products += weight[None, :, :] * x[:, None, :]
        partial = tl.sum(products, axis=2)
        if NORM:
            partial *= tl.rsqrt(tl.sum(squares, axis=1) / group_size + eps)[:, None]
        y += partial

    if HAS_BIAS:
        y += tl.load(bias_ptr + o, mask=o_inside, other=0.0).to(tl.float32)[None, :]
    inside = b_inside[:, None] & o_inside[None, :]
    if TAPS > 0:
        channel = tl.broadcast_to((o - conv_first)[None, :], [BATCH, BLOCK_O])
        in_conv = inside & (channel >= 0) & (channel < channels)
        window = window_ptr + (b.to(tl.int64) * (TAPS - 1) * channels)[:, None]
        new = y
        y = tl.where(
            in_conv,
            convolved(
                new, window, conv_weight_ptr, conv_bias_ptr, channel, in_conv, channels,
                TAPS, CONV_BIAS,
            ),
            y,
        )  # fmt: skip
        tl.debug_barrier()
        shift_window(new, window, channel, in_conv, channels, TAPS)
    if RESIDUAL:
        at = residual_ptr + b[:, None] * stride_residual + o[None, :]
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + b[:, None] * stride_out + o[None, :], y, mask=inside)
