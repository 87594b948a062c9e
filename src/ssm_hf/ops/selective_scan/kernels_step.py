"""Triton kernel of Mamba-1's step from the step projection to the gate, in place on the state."""

import triton
import triton.language as tl

from ssm_hf.ops.causal_conv1d.kernels_step import silu
from ssm_hf.ops.kernels_overlap import begin_next, wait_for_all, wait_for_previous
from ssm_hf.ops.ssd.kernels_step import softplus


@triton.jit
def mamba1_step_kernel(
    x_ptr, low_ptr, B_ptr, C_ptr, z_ptr, dt_weight_ptr, dt_bias_ptr, A_log_ptr, D_ptr, state_ptr,
    y_ptr, stride_x, stride_low, stride_BC, stride_z, stride_y, inner, states, rank, blocks,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # 0: `low` is the projected step size (B, I)
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_I channels of one row."""
    begin_next(OVERLAP and BLOCK_R == 0)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    n = tl.arange(0, BLOCK_N)
    i_inside, n_inside = i < inner, n < states
    at = i[:, None] * states + n[None, :]
    inside = i_inside[:, None] & n_inside[None, :]
    h = tl.load(state_ptr + row * inner * states + at, mask=inside, other=0.0).to(tl.float32)
    A = tl.exp(tl.load(A_log_ptr + at, mask=inside, other=0.0).to(tl.float32))
    if dt_bias_ptr is not None:
        dt_bias = tl.load(dt_bias_ptr + i, mask=i_inside, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + i, mask=i_inside, other=0.0).to(tl.float32)
    if BLOCK_R > 0:
        r = tl.arange(0, BLOCK_R)
        weight = tl.load(
            dt_weight_ptr + i[:, None] * rank + r[None, :],
            mask=i_inside[:, None] & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
    if BLOCK_R == 0:
        wait_for_all(OVERLAP)
    else:
        wait_for_previous(OVERLAP)
    if BLOCK_R > 0:
        low = tl.load(low_ptr + row * stride_low + r, mask=r < rank, other=0.0)
        dt = tl.sum(weight.to(tl.float32) * low.to(tl.float32)[None, :], axis=1)
    else:
        dt = tl.load(low_ptr + row * stride_low + i, mask=i_inside, other=0.0).to(tl.float32)
    if dt_bias_ptr is not None:
        dt += dt_bias
    dt = softplus(dt)
    x = tl.load(x_ptr + row * stride_x + i, mask=i_inside, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + row * stride_BC + n, mask=n_inside, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + row * stride_BC + n, mask=n_inside, other=0.0).to(tl.float32)
    h = h * tl.exp(-dt[:, None] * A) + (dt * x)[:, None] * B[None, :]
    tl.store(state_ptr + row * inner * states + at, h, mask=inside)
    y = tl.sum(h * C[None, :], axis=1)
    y += D * x
    y *= silu(tl.load(z_ptr + row * stride_z + i, mask=i_inside, other=0.0).to(tl.float32))
    tl.store(y_ptr + row * stride_y + i, y, mask=i_inside)
