"""Mamba-2's scan (state-space duality)."""

from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.packing import check_packing, in_given_precision
from ssm_hf.ops.ssd.reference import ssd_recurrent, ssd_step, ssd_torch
from ssm_hf.ops.step_size import check_dt_limit

if HAS_TRITON:
    from ssm_hf.ops.ssd.launch import ssd_triton, why_unsupported
else:
    ssd_triton = None

    def why_unsupported(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Tensor | None
    ) -> str | None:
        """Without kernels there is nothing that they could refuse."""
        return None


__all__ = ["ssd", "ssd_recurrent", "ssd_step"]


@in_given_precision
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
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
    """S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t ⊗ B_t;  y_t = S_t C_t + D x_t, times silu(z_t) if given.

    Δ = clamp(softplus(dt + dt_bias), dt_limit). Head h reads group h // (H / G) of B and C.

    Args:
        x: (B, T, H, P), any float dtype.
        dt: (B, T, H), step size before bias and softplus (or Δ itself without them).
        A: (H,), negative, fp32.
        B: (B, T, G, N), G divides H.
        C: (B, T, G, N).
        chunk_size: longest chunk of the chunked form; an implementation may use shorter ones. The
            result does not depend on it beyond rounding.
        D: (H,) or (H, P) skip weight, or None.
        z: (B, T, H, P) gate or None.
        dt_bias: (H,) or None.
        dt_softplus: apply softplus.
        dt_limit: bounds of Δ.
        initial_state: (B, H, P, N) S before the first token, (n, H, P, N) with `cu_seqlens`;
            None = 0.
        seq_idx: (B, T) integers; S is dropped where the number changes.
        cu_seqlens: (n+1,) document offsets into one row (B = 1); not together with `seq_idx`.
        mask: (B, T) bool, True = real token; pads hold the state and give 0.
        return_final_state: also return S after the last token.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        y (B, T, H, P) in x's dtype; with `return_final_state` also the state, fp32 or wider:
        (B, H, P, N) of each row's last document, or (n, H, P, N) with `cu_seqlens`.

    Raises:
        ValueError: shapes or packing arguments disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Dao and Gu 2024, equation 1 and listing 1.
    """
    if x.ndim != 4:
        raise ValueError(f"x must have shape (B, T, H, P), got {tuple(x.shape)}")
    batch, length, heads, head_dim = x.shape
    if B.ndim != 4 or B.shape[2] < 1 or heads % B.shape[2]:
        raise ValueError(
            f"B must have shape ({batch}, {length}, G, N) with G dividing the {heads} heads, "
            f"got {tuple(B.shape)}"
        )
    groups, states = B.shape[2:]
    for name, value, shape in (
        ("dt", dt, (batch, length, heads)),
        ("A", A, (heads,)),
        ("B", B, (batch, length, groups, states)),
        ("C", C, (batch, length, groups, states)),
        ("z", z, (batch, length, heads, head_dim)),
        ("dt_bias", dt_bias, (heads,)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if D is not None and D.shape not in ((heads,), (heads, head_dim)):
        raise ValueError(
            f"D must have shape ({heads},) or ({heads}, {head_dim}), got {tuple(D.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    check_dt_limit(dt_limit)
    check_packing(
        batch, length, initial_state, (heads, head_dim, states), seq_idx, cu_seqlens, mask
    )
    run = pick(
        "ssd",
        impl,
        x.device,
        reference=ssd_torch,
        triton=ssd_triton,
        unsupported=why_unsupported(x, dt, A, B, C, D, z, dt_bias, initial_state),
    )
    y, state = run(
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
        chunk_size,
    )
    return (y, state) if return_final_state else y
