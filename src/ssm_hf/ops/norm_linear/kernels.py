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
    GATED: tl.constexpr,  # x is [value | gate] and stands for value * silu(gate)
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
                if GATED:
                    gate = tl.load(x_ptr + b * stride_x + SIZE_IN + i, mask=i_inside, other=0.0)
                    x *= silu(gate.to(tl.float32))
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


@triton.jit
def norm_linear_walk_kernel(
    x_ptr, norm_weight_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    window_ptr, conv_weight_ptr, conv_bias_ptr,
    stride_x, stride_weight, stride_residual, stride_out,
    size_out, conv_first, channels, eps,
    SIZE_IN: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,  # x is [value | gate] and stands for value * silu(gate)
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TAPS: tl.constexpr,  # 0: no convolution
    CONV_BIAS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: STEPS times BLOCK_O outputs of all rows, for weights beyond all registers.

    The normed rows stay in registers, the weight passes by, STAGES steps of it at a time.
    """
    first = tl.program_id(0) * (BLOCK_O * STEPS)
    k = tl.arange(0, BLOCK_K)
    step = tl.arange(0, STEPS)[:, None]
    per_group: tl.constexpr = (GROUP_SIZE + BLOCK_K - 1) // BLOCK_K
    parts: tl.constexpr = (SIZE_IN // GROUP_SIZE) * per_group
    wait_for_previous(OVERLAP)
    rows = ()
    totals = ()
    for b in tl.static_range(BATCH):
        for group in tl.static_range(SIZE_IN // GROUP_SIZE):
            xs = ()
            squares = tl.zeros([BLOCK_K], tl.float32)
            for part in tl.static_range(per_group):
                i = group * GROUP_SIZE + part * BLOCK_K + k
                i_inside = part * BLOCK_K + k < GROUP_SIZE
                x = tl.load(x_ptr + b * stride_x + i, mask=i_inside, other=0.0).to(tl.float32)
                if GATED:
                    gate = tl.load(x_ptr + b * stride_x + SIZE_IN + i, mask=i_inside, other=0.0)
                    x *= silu(gate.to(tl.float32))
                if NORM:
                    squares += x * x
                    scale = tl.load(norm_weight_ptr + i, mask=i_inside, other=0.0)
                    x *= scale.to(tl.float32)
                xs = xs + (x,)
            if NORM:
                inverse = tl.rsqrt(tl.sum(squares) / GROUP_SIZE + eps)
                for part in tl.static_range(per_group):
                    rows = rows + (xs[part] * inverse,)
            else:
                rows = rows + xs
        totals = totals + (tl.zeros([STEPS, BLOCK_O], tl.float32),)

    for at in tl.range(0, STEPS, num_stages=STAGES):
        output = (first + at * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
        weight_row = weight_ptr + output.to(tl.int64) * stride_weight
        weights = ()
        for group in tl.static_range(SIZE_IN // GROUP_SIZE):
            for part in tl.static_range(per_group):
                place = (group * GROUP_SIZE + part * BLOCK_K + k)[None, :]
                inside = (output < size_out) & (part * BLOCK_K + k < GROUP_SIZE)[None, :]
                weight = tl.load(weight_row + place, mask=inside, other=0.0)
                weights = weights + (weight,)
        new = ()
        for b in tl.static_range(BATCH):
            products = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
            for part in tl.static_range(parts):
                products += weights[part].to(tl.float32) * rows[b * parts + part][None, :]
            total = tl.sum(products, axis=1)[None, :]
            new = new + (tl.where(step == at, total, totals[b]),)
        totals = new

    o = first + tl.arange(0, STEPS * BLOCK_O)
    o_inside = o < size_out
    for b in tl.static_range(BATCH):
        y = tl.reshape(totals[b], [STEPS * BLOCK_O])
        if HAS_BIAS:
            y += tl.load(bias_ptr + o, mask=o_inside, other=0.0).to(tl.float32)
        if TAPS > 0:
            channel = o - conv_first
            in_conv = o_inside & (channel >= 0) & (channel < channels)
            window = window_ptr + b * (TAPS - 1) * channels
            past = history(window, conv_weight_ptr, conv_bias_ptr, channel, in_conv, channels,
                           TAPS, CONV_BIAS)  # fmt: skip
            newest = tl.load(conv_weight_ptr + channel * TAPS + (TAPS - 1), mask=in_conv, other=0.0)
            new_input = y
            y = tl.where(in_conv, silu(past + y * newest.to(tl.float32)), y)
            tl.debug_barrier()
            shift_window(new_input, window, channel, in_conv, channels, TAPS)
        if RESIDUAL:
            residual = tl.load(residual_ptr + b * stride_residual + o, mask=o_inside, other=0.0)
            y += residual.to(tl.float32)
        tl.store(out_ptr + b * stride_out + o, y, mask=o_inside)
