"""Triton kernels of the convolution for one token, in place on its window."""

import triton
import triton.language as tl

from ssm_hf.ops.kernels_overlap import wait_for_previous


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def history(
    window_ptr, weight_ptr, bias_ptr, channel, inside, channels,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """What some channels' convolution adds to the newest input, from one row's window (K-1, C)."""
    y = tl.zeros(channel.shape, tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(TAPS - 1):
        old = tl.load(window_ptr + k * channels + channel, mask=inside, other=0.0).to(tl.float32)
        y += old * tl.load(weight_ptr + channel * TAPS + k, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def convolved(
    new, window_ptr, weight_ptr, bias_ptr, channel, inside, channels,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """silu(conv) in fp32 for some channels, from one row's window and the new input."""
    weight = tl.load(weight_ptr + channel * TAPS + (TAPS - 1), mask=inside, other=0.0)
    past = history(window_ptr, weight_ptr, bias_ptr, channel, inside, channels, TAPS, HAS_BIAS)
    return silu(past + new.to(tl.float32) * weight.to(tl.float32))


@triton.jit
def shift_window(new, window_ptr, channel, inside, channels, TAPS: tl.constexpr):
    """Drop the oldest input of some channels and append the new one.

    A barrier must stand between the caller's reads and this: threads may share elements.
    """
    for k in tl.static_range(TAPS - 2):
        later = tl.load(window_ptr + (k + 1) * channels + channel, mask=inside, other=0.0)
        tl.store(window_ptr + k * channels + channel, later, mask=inside)
    if TAPS > 1:
        tl.store(window_ptr + (TAPS - 2) * channels + channel, new, mask=inside)


@triton.jit
def causal_conv1d_step_kernel(
    x_ptr, window_ptr, weight_ptr, bias_ptr, y_ptr,
    stride_x, stride_y, channels, blocks,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: some channels of one row."""
    wait_for_previous(OVERLAP)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    new = tl.load(x_ptr + row * stride_x + channel, mask=inside, other=0.0)
    window = window_ptr + row * (TAPS - 1) * channels
    y = convolved(new, window, weight_ptr, bias_ptr, channel, inside, channels, TAPS, HAS_BIAS)
    tl.store(y_ptr + row * stride_y + channel, y, mask=inside)
    tl.debug_barrier()
    shift_window(new, window, channel, inside, channels, TAPS)
