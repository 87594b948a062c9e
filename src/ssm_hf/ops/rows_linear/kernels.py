"""Triton kernels of a decoding step of several rows: linear layers, and the norms before them."""

import triton
import triton.language as tl

from ssm_hf.ops.causal_conv1d.kernels_step import silu
from ssm_hf.ops.kernels_overlap import begin_next, wait_for_all


@triton.jit
def rows_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, squares_ptr, out_ptr, window_ptr, conv_weight_ptr, conv_bias_ptr,
    stride_x, stride_weight, stride_share, stride_out,
    rows, row_blocks, outputs, stored, conv_first, channels, eps,
    SIZE: tl.constexpr,
    SHARE: tl.constexpr,  # of SIZE, that one program sums
    HAS_BIAS: tl.constexpr,
    SQUARES: tl.constexpr,  # numbers of a row whose sum is that of x's squares; 0: no norm
    TAPS: tl.constexpr,  # 0: no convolution
    CONV_BIAS: tl.constexpr,
    WIDE: tl.constexpr,  # products of fp32 numbers, in PRECISION; else of the weight's dtype
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,  # the whole part of the weight is loaded while the kernel before runs
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_O outputs of BLOCK_R rows, a share of the sum, by matrix units."""
    begin_next(OVERLAP)
    block = tl.program_id(0)
    first = tl.program_id(1) * SHARE
    o = (block // row_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = (block % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    r_inside = r < rows
    # What lies outside is the last row or output once more.
    row = tl.minimum(r, rows - 1).to(tl.int64)
    weight_row = weight_ptr + tl.minimum(o, outputs - 1).to(tl.int64) * stride_weight + first
    size = tl.minimum(SIZE - first, SHARE)
    whole: tl.constexpr = SIZE % SHARE == 0 and SHARE % BLOCK_K == 0
    weights = ()
    if EARLY:
        for start in tl.static_range(0, SHARE, BLOCK_K):
            if whole:
                weight = tl.load(weight_row[:, None] + (start + k)[None, :])
            else:
                weight = tl.load(
                    weight_row[:, None] + (start + k)[None, :],
                    mask=(start + k < size)[None, :], other=0.0,
                )  # fmt: skip
            weights = weights + (weight,)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=o < outputs, other=0.0).to(tl.float32)
    if TAPS > 0:
        channel = o - conv_first
        in_conv = (channel >= 0) & (channel < channels)
        moved = r_inside[:, None] & in_conv[None, :]
        window = window_ptr + row[:, None] * ((TAPS - 1) * channels) + channel[None, :]
        past = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
        if CONV_BIAS:
            past += tl.load(conv_bias_ptr + channel, mask=in_conv, other=0.0).to(tl.float32)[None]
        olds = ()
        for tap in tl.static_range(TAPS - 1):
            old = tl.load(window + tap * channels, mask=moved, other=0.0)
            olds = olds + (old,)
            factor = tl.load(conv_weight_ptr + channel * TAPS + tap, mask=in_conv, other=0.0)
            past += old.to(tl.float32) * factor.to(tl.float32)[None, :]
        newest = tl.load(conv_weight_ptr + channel * TAPS + (TAPS - 1), mask=in_conv, other=0.0)
    wait_for_all(OVERLAP)

    x_row = x_ptr + row[:, None] * stride_x + first
    total = tl.zeros([BLOCK_O, BLOCK_R], tl.float32)
    if EARLY:
        xs = ()
        for start in tl.static_range(0, SHARE, BLOCK_K):
            if whole:
                x = tl.load(x_row + (start + k)[None, :])
            else:
                x = tl.load(x_row + (start + k)[None, :], mask=(start + k < size)[None, :],
                            other=0.0)  # fmt: skip
            xs = xs + (x,)
        for part in tl.static_range((SHARE + BLOCK_K - 1) // BLOCK_K):
            weight, x = weights[part], xs[part]
            if WIDE:
                weight, x = weight.to(tl.float32), x.to(tl.float32)
            total = tl.dot(weight, tl.trans(x), total, input_precision=PRECISION)
    else:
        for start in tl.range(0, SHARE, BLOCK_K, num_stages=STAGES):
            if whole:
                weight = tl.load(weight_row[:, None] + (start + k)[None, :])
                x = tl.load(x_row + (start + k)[None, :])
            else:
                k_inside = (start + k < size)[None, :]
                weight = tl.load(weight_row[:, None] + (start + k)[None, :], mask=k_inside,
                                 other=0.0)  # fmt: skip
                x = tl.load(x_row + (start + k)[None, :], mask=k_inside, other=0.0)
            if WIDE:
                weight, x = weight.to(tl.float32), x.to(tl.float32)
            total = tl.dot(weight, tl.trans(x), total, input_precision=PRECISION)
    y = tl.trans(total)
    if SQUARES > 0:
        s = tl.arange(0, BLOCK_S)
        squares = tl.load(squares_ptr + row[:, None] * SQUARES + s[None, :],
                          mask=(s < SQUARES)[None, :], other=0.0)  # fmt: skip
        y *= tl.rsqrt(tl.sum(squares, axis=1) / SIZE + eps)[:, None]
    if HAS_BIAS:
        y += bias[None, :]
    if TAPS > 0:
        # All threads have read the window.
        tl.debug_barrier()
        for tap in tl.static_range(TAPS - 2):
            tl.store(window + tap * channels, olds[tap + 1], mask=moved)
        if TAPS > 1:
            tl.store(window + (TAPS - 2) * channels, y, mask=moved)
        convolved = silu(past + y * newest.to(tl.float32)[None, :])
        y = tl.where(in_conv[None, :], convolved, y)
    out = out_ptr + tl.program_id(1) * stride_share + row[:, None] * stride_out + o[None, :]
    tl.store(out, y, mask=r_inside[:, None] & (o < stored)[None, :])


@triton.jit
def shares_linear_kernel(
    shares_ptr, weight_ptr, out_ptr, rest_ptr, stride_share, rows, outputs, blocks,
    SIZE: tl.constexpr,
    REST: tl.constexpr,
    SHARES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_O outputs of BLOCK_R rows, or what these rows have behind SIZE."""
    begin_next(OVERLAP)
    block = tl.program_id(0) % blocks
    r = (tl.program_id(0) // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_inside = (r < rows)[:, None]
    row = r.to(tl.int64)
    shares = shares_ptr + row[:, None] * (SIZE + REST)
    if block == blocks - 1:
        wait_for_all(OVERLAP)
        j = tl.arange(0, BLOCK_REST)
        j_inside = r_inside & (j < REST)[None, :]
        rest = tl.zeros([BLOCK_R, BLOCK_REST], tl.float32)
        for share in tl.static_range(SHARES):
            rest += tl.load(shares + share * stride_share + (SIZE + j)[None, :], mask=j_inside,
                            other=0.0)  # fmt: skip
        tl.store(rest_ptr + row[:, None] * REST + j[None, :], rest, mask=j_inside)
    else:
        o = block * BLOCK_O + tl.arange(0, BLOCK_O)
        k = tl.arange(0, BLOCK_K)
        weight = tl.load(
            weight_ptr + o.to(tl.int64)[:, None] * SIZE + k[None, :],
            mask=(o < outputs)[:, None] & (k < SIZE)[None, :], other=0.0,
        )  # fmt: skip
        wait_for_all(OVERLAP)
        x = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for share in tl.static_range(SHARES):
            x += tl.load(shares + share * stride_share + k[None, :],
                         mask=r_inside & (k < SIZE)[None, :], other=0.0)  # fmt: skip
        if WIDE:
            weight = weight.to(tl.float32)
        y = tl.dot(x.to(weight.dtype), tl.trans(weight), input_precision=PRECISION)
        o_inside = r_inside & (o < outputs)[None, :]
        tl.store(out_ptr + row[:, None] * outputs + o[None, :], y, mask=o_inside)


@triton.jit
def shares_norm_kernel(
    stream_ptr, shares_ptr, weight_ptr, sum_ptr, out_ptr, stride_share, eps,
    SIZE: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: one row."""
    begin_next(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    weight = tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    wait_for_all(OVERLAP)
    x = tl.load(stream_ptr + row * SIZE + i, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for share in tl.static_range(SHARES):
        at = shares_ptr + share * stride_share + row * SIZE + i
        total += tl.load(at, mask=inside, other=0.0)
    x += total
    tl.store(sum_ptr + row * SIZE + i, x, mask=inside)
    scale = tl.rsqrt(tl.sum(x * x) / SIZE + eps)
    tl.store(out_ptr + row * SIZE + i, x * scale * weight, mask=inside)
