"""Mamba-1's selective scan."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.dispatch import pick
from ssm_hf.ops.packing import (
    check_packing,
    compute_dtype,
    document_numbers,
    in_given_precision,
    run_per_document,
)
from ssm_hf.ops.selective_scan.reference import (
    selective_scan_blocked,
    selective_scan_recurrent,
    selective_scan_step,
)
from ssm_hf.ops.step_size import check_dt_limit, step_size

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
    scan = pick("selective_scan", impl, x.device, reference=selective_scan_blocked)

    dtype = compute_dtype(x, dt, A, initial_state)
    u, A_wide, B_wide, C_wide = (v.to(dtype) for v in (x, A, B, C))
    delta = step_size(dt, dt_bias, dt_softplus, dt_limit, mask).to(dtype)

    def run(
        x: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Pads of the packed batch hold the state as masked tokens do.
        state = _state(x, initial_state)
        return scan(x, dt * mask[..., None], A_wide, B, C, state, None)

    def _state(x: Tensor, initial_state: Tensor | None) -> Tensor:
        if initial_state is None:
            return x.new_zeros(x.shape[0], inner, states)
        return initial_state.to(dtype)

    if cu_seqlens is not None:
        sequences = {"x": u, "dt": delta, "B": B_wide, "C": C_wide}
        y, state = run_per_document(run, sequences, cu_seqlens, initial_state, mask)
    elif length == 1:
        y, state = selective_scan_step(
            u[:, 0], delta[:, 0], A_wide, B_wide[:, 0], C_wide[:, 0], _state(u, initial_state)
        )
        y = y[:, None]
    else:
        doc = None if seq_idx is None else document_numbers(seq_idx, mask)
        y, state = scan(u, delta, A_wide, B_wide, C_wide, _state(u, initial_state), doc)
    if D is not None:
        y = torch.addcmul(y, D.to(dtype), u)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    if mask is not None:
        y = y * mask[..., None]
    y = y.to(x.dtype)
    return (y, state) if return_final_state else y
