"""Mamba-1's selective scan."""

from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.packing import check_packing, in_given_precision
from ssm_hf.ops.selective_scan.reference import (
    selective_scan_recurrent,
    selective_scan_step,
    selective_scan_torch,
)
from ssm_hf.ops.step_size import check_dt_limit

if HAS_TRITON:
    from ssm_hf.ops.selective_scan.launch import selective_scan_triton, why_unsupported
else:
    selective_scan_triton = why_unsupported = None

__all__ = ["selective_scan", "selective_scan_recurrent", "selective_scan_step"]


@in_given_precision
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_t;  y_t = h_t C_t + D x_t, times silu(z_t) if given.

    Δ = clamp(softplus(dt + dt_bias), dt_limit).

    Args:
        x: (B, T, I), any float dtype.
        dt: (B, T, I), step size before bias and softplus (or Δ itself without them).
        A: (I, N), negative, fp32.
        B: (B, T, N).
        C: (B, T, N).
        D: (I,) skip weight or None.
        z: (B, T, I) gate or None.
        dt_bias: (I,) or None.
        dt_softplus: apply softplus.
        dt_limit: bounds of Δ.
        initial_state: (B, I, N) h before the first token, (n, I, N) with `cu_seqlens`; None = 0.
        seq_idx: (B, T) integers; h is dropped where the number changes.
        cu_seqlens: (n+1,) document offsets into one row (B = 1); not together with `seq_idx`.
        mask: (B, T) bool, True = real token; pads hold the state and give 0.
        return_final_state: also return h after the last token.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        y (B, T, I) in x's dtype; with `return_final_state` also the state, fp32 or wider: (B, I, N)
        of each row's last document, or (n, I, N) with `cu_seqlens`.

    Raises:
        ValueError: shapes or packing arguments disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Gu and Dao 2023, equation 2 and algorithm 2.
    """
    if x.ndim != 3:
        raise ValueError(f"x must have shape (B, T, I), got {tuple(x.shape)}")
    batch, length, inner = x.shape
    if A.ndim != 2 or A.shape[0] != inner:
        raise ValueError(f"A must have shape ({inner}, N), got {tuple(A.shape)}")
    states = A.shape[1]
    for name, value, shape in (
        ("dt", dt, (batch, length, inner)),
        ("B", B, (batch, length, states)),
        ("C", C, (batch, length, states)),
        ("D", D, (inner,)),
        ("z", z, (batch, length, inner)),
        ("dt_bias", dt_bias, (inner,)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    check_dt_limit(dt_limit)
    check_packing(batch, length, initial_state, (inner, states), seq_idx, cu_seqlens, mask)
    unsupported = None
    if why_unsupported is not None:
        unsupported = why_unsupported(A, x, dt, B, C, D, z, dt_bias, initial_state)
    scan = pick(
        "selective_scan",
        impl,
        x.device,
        reference=selective_scan_torch,
        triton=selective_scan_triton,
        unsupported=unsupported,
    )
    y, state = scan(
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
        dt_limit,
        initial_state,
        seq_idx,
        cu_seqlens,
        mask,
    )
    return (y, state) if return_final_state else y
