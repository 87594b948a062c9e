"""The one-token kernel as a torch operator."""
# Kernels annotate plain values as constexpr.
# pyright: reportArgumentType=false

import torch
from torch import Tensor

from ssm_hf.ops.launch import check_tensors, on_device, overlapping, tuned
from ssm_hf.ops.selective_scan.kernels_step import mamba1_step_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("ssm_hf::mamba1_step", mutates_args=("state",))
def mamba1_step_triton(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    state: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    overlap: bool,
) -> Tensor:
    """See `ssm_hf.ops.selective_scan.step.mamba1_step`."""
    check_tensors(
        "mamba1_step",
        DTYPES,
        x=x,
        dt=dt,
        B=B,
        C=C,
        z=z,
        state=state,
        A_log=A_log,
        D=D,
        dt_weight=dt_weight,
        dt_bias=dt_bias,
    )
    if not state.is_contiguous():
        raise ValueError("mamba1_step: the state must be contiguous")
    x, dt, z = (v if v.stride(1) == 1 else v.contiguous() for v in (x, dt, z))
    if B.stride(1) != 1 or B.stride() != C.stride():
        B, C = B.contiguous(), C.contiguous()
    batch, inner, states = state.shape
    y = x.new_empty(batch, inner)
    rank = 0 if dt_weight is None else dt_weight.shape[1]
    options = dict(tuned("mamba1_step", "rows1" if batch == 1 else "default", x.device))
    block = options["BLOCK_I"]
    blocks = (inner + block - 1) // block
    with on_device(x):
        mamba1_step_kernel[(batch * blocks,)](
            x,
            dt,
            B,
            C,
            z,
            None if dt_weight is None else dt_weight.contiguous(),
            dt_bias,
            A_log.contiguous(),
            D,
            state,
            y,
            x.stride(0),
            dt.stride(0),
            B.stride(0),
            z.stride(0),
            y.stride(0),
            inner,
            states,
            rank,
            blocks,
            BLOCK_N=1 << (states - 1).bit_length(),
            BLOCK_R=1 << (rank - 1).bit_length() if rank else 0,
            **options,
            **overlapping(overlap, x.device),
        )
    return y


@mamba1_step_triton.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    state: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    overlap: bool,
) -> Tensor:
    return x.new_empty(x.shape)
