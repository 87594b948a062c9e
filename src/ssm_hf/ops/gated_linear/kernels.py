"""Triton kernels of value * silu(gate) and its gradient: one pass over memory each."""

import triton
import triton.language as tl


@triton.jit
def gated_fwd_kernel(
    u_ptr, h_ptr, stride_u, stride_h, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK channels of a row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    u = u_ptr + row * stride_u + channel
    value = tl.load(u, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(u + width, mask=inside, other=0.0).to(tl.float32)
    h = value * gate * tl.sigmoid(gate)
    tl.store(h_ptr + row * stride_h + channel, h, mask=inside)


@triton.jit
def gated_bwd_kernel(
    u_ptr, dh_ptr, du_ptr, h_ptr, stride_u, stride_dh, stride_du, stride_h, width,
    KEEP: tl.constexpr,  # write h too, for the weight's gradient
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK channels of a row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    u = u_ptr + row * stride_u + channel
    value = tl.load(u, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(u + width, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + row * stride_dh + channel, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    opened = gate * share
    du = du_ptr + row * stride_du + channel
    tl.store(du, dh * opened, mask=inside)
    tl.store(du + width, dh * value * (share + opened * (1 - share)), mask=inside)
    if KEEP:
        tl.store(h_ptr + row * stride_h + channel, value * opened, mask=inside)
