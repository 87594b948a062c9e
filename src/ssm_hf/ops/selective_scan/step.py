"""Mamba-1's scan for one token, from the step projection to the gate, in place on the state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.packing import compute_dtype, in_given_precision

if HAS_TRITON:
    from ssm_hf.ops.selective_scan.step_launch import mamba1_step_triton
else:
    mamba1_step_triton = None

__all__ = ["mamba1_step"]

_MOST_STATES = 1024


@in_given_precision
def mamba1_step(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    state: Tensor,
    *,
    A_log: Tensor,
    D: Tensor,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    overlap: bool = False,
    impl: str = "auto",
) -> Tensor:
    """(h C + D x) silu(z) with h <- exp(-Δ exp(A_log)) h + Δ x B and Δ = softplus of the step size.

    Args:
        x: (B, I), any float dtype.
        dt: (B, I) step size before softplus; with `dt_weight` its low-rank form (B, R).
        B: (B, N).
        C: (B, N).
        z: (B, I).
        state: (B, I, N) h, contiguous, any float dtype; updated in place.
        A_log: (I, N).
        D: (I,).
        dt_weight: (I, R) step projection, or None.
        dt_bias: (I,), added to the step size, or None; always given with `dt_weight`.
        overlap: what is read beside dt, B and C was not written by the kernel launched just
            before, nor without `dt_weight` by any since the last one that was launched without
            overlap, so that it may be read while these still run.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (B, I) in x's dtype.

    Raises:
        ValueError: shapes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Gu and Dao 2023, equation 2 and algorithm 2.
    """
    batch, inner, states = state.shape
    if dt_weight is not None and dt_bias is None:
        raise ValueError("dt_weight is given without dt_bias")
    width = inner if dt_weight is None else dt_weight.shape[1]
    for name, value, shape in (
        ("x", x, (batch, inner)),
        ("dt", dt, (batch, width)),
        ("B", B, (batch, states)),
        ("C", C, (batch, states)),
        ("z", z, (batch, inner)),
        ("A_log", A_log, (inner, states)),
        ("D", D, (inner,)),
        ("dt_weight", dt_weight, (inner, width)),
        ("dt_bias", dt_bias, (inner,)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    unsupported = None
    if max(states, width if dt_weight is not None else 0) > _MOST_STATES:
        unsupported = f"the kernel takes at most {_MOST_STATES} states and ranks"
    elif torch.float64 in (x.dtype, dt.dtype, state.dtype):
        unsupported = "the kernel takes fp32, fp16 and bf16, got fp64"
    run = pick(
        "selective_scan",
        impl,
        x.device,
        reference=mamba1_step_torch,
        triton=mamba1_step_triton,
        unsupported=unsupported,
    )
    return run(x, dt, B, C, z, state, A_log, D, dt_weight, dt_bias, overlap)


def mamba1_step_torch(
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
    """The step in plain torch, few passes over the state."""
    del overlap
    wide = compute_dtype(x, state)
    h = state if state.dtype == wide else state.to(wide)
    if dt_weight is not None:
        dt = F.linear(dt.to(wide), dt_weight.to(wide))
    if dt_bias is not None:
        dt = dt.to(wide) + dt_bias.to(wide)
    u, B, C, dt = (v.to(wide) for v in (x, B, C, dt))
    dt = F.softplus(dt)
    h.mul_((dt[..., None] * torch.exp(A_log.to(wide))).neg_().exp_())
    h.addcmul_((dt * u)[..., None], B[:, None])
    if h is not state:
        state.copy_(h)
    y = torch.addcmul(torch.linalg.vecdot(h, C[:, None]), D.to(wide), u)
    return (y * F.silu(z.to(wide))).to(x.dtype)
