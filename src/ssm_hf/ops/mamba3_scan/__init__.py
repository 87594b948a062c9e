"""Mamba-3's scan: exponential-trapezoidal rule, rotating states, one or several ranks."""

import functools

from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.mamba3_scan.reference import (
    Mamba3State,
    mamba3_scan_recurrent,
    mamba3_scan_torch,
    mamba3_step,
    rope_permutation,
)
from ssm_hf.ops.packing import check_packing, in_given_precision

if HAS_TRITON:
    from ssm_hf.ops.mamba3_scan.launch import mamba3_scan_triton, why_unsupported
else:
    mamba3_scan_triton = None

    def why_unsupported(x: Tensor, B: Tensor, *others: Tensor | None) -> str | None:
        """Without kernels there is nothing that they could refuse."""
        return None


__all__ = [
    "Mamba3State",
    "mamba3_scan",
    "mamba3_scan_recurrent",
    "mamba3_step",
    "rope_permutation",
]


@in_given_precision
def mamba3_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor | None,
    B: Tensor,
    C: Tensor,
    angles: Tensor | None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    rope_layout: str = "pairwise",
    initial_state: Mamba3State | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int = 64,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Mamba3State]:
    """S_t = α_t S_{t-1} + β_t x_{t-1} ⊗ k_{t-1} + γ_t x_t ⊗ k_t;  y_t = S_t q_t + D x_t, gated.

    Δ = softplus(dt + dt_bias), λ = sigmoid(trap), α = exp(Δ A), β = (1 - λ) Δ α, γ = λ Δ. The
    angle θ_t = θ_{t-1} + π tanh(angles_t) Δ_t turns the first S pairs of states: k_t = Rot_θ(B_t +
    B_bias), q_t = Rot_θ(C_t + C_bias). Before the first token all is zero. Head h reads group
    h // (H / G). With R ranks, x_t ⊗ k_t stands for the sum over ranks of (x_t * mimo_x) ⊗ k_t, and
    y_t = sum over ranks of (S_t q_t + D (x_t * mimo_x)) * silu(z_t * mimo_z) * mimo_o.

    Args:
        x: (B, T, H, P), any float dtype.
        dt: (B, T, H), step size before bias and softplus (or Δ itself without them).
        A: (B, T, H), negative, fp32.
        trap: (B, T, H) logits of λ; None = λ is 1 (Euler's rule).
        B: (B, T, R, G, N), G divides H.
        C: (B, T, R, G, N).
        angles: (B, T, S), 1 <= S <= N / 2; None = no rotation.
        D: (H,) skip weight or None.
        z: (B, T, H, P) gate or None.
        B_bias: (H, R, N) or None.
        C_bias: (H, R, N) or None.
        mimo_x: (H, R, P), needed where R > 1; None = 1.
        mimo_z: (H, R, P); None = 1.
        mimo_o: (H, R, P); None with R > 1 = y per rank, then without z.
        dt_bias: (H,) or None.
        dt_softplus: apply softplus.
        rope_layout: the pairs of states are (2i, 2i+1) in `"pairwise"`, (i, i + N/2) in `"half"`.
        initial_state: state before the first token, one a row, or one a document with
            `cu_seqlens`; None = 0. angle (B, H, S), ssm (B, H, P, N), k (B, R, H, N),
            v (B, H, P), see `Mamba3State`.
        seq_idx: (B, T) integers; the state is dropped where the number changes.
        cu_seqlens: (n+1,) document offsets into one row (B = 1); not together with `seq_idx`.
        mask: (B, T) bool, True = real token; pads hold the state and give 0. The token after a pad
            has the last real token for its neighbour.
        return_final_state: also return the state after the last token.
        chunk_size: longest chunk of the chunked form; an implementation may use shorter ones. The
            result does not depend on it beyond rounding.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        y (B, T, H, P) in x's dtype, or (B, T, R, H, P) where R > 1 without mimo_o. With
        `return_final_state` also the state of each row's last document, or of each document with
        `cu_seqlens`: angle and ssm in fp32 or wider, k and v in x's dtype.

    Raises:
        ValueError: shapes or packing arguments disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Lahoti et al. 2026, "Mamba-3" (arXiv 2603.15569).
    """
    _check(
        x, dt, A, trap, B, C, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o, dt_bias,
        rope_layout, chunk_size,
    )  # fmt: skip
    check_packing(x.shape[0], x.shape[1], None, (), seq_idx, cu_seqlens, mask)
    if initial_state is not None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        _check_state(initial_state, rows, x, B, angles)
    triton = mamba3_scan_triton
    if triton is not None:
        triton = functools.partial(triton, keep_state=return_final_state)
    unsupported = why_unsupported(
        x, B, C, dt, A, trap, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o, dt_bias,
        *(initial_state or ()),
    )  # fmt: skip
    run = pick("mamba3_scan", impl, x.device, reference=mamba3_scan_torch, triton=triton,
               unsupported=unsupported)  # fmt: skip
    y, state = run(
        x, dt, A, trap, B, C, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o, dt_bias,
        dt_softplus, rope_layout, initial_state, seq_idx, cu_seqlens, mask, chunk_size,
    )  # fmt: skip
    if not return_final_state:
        return y
    assert state is not None
    return y, state


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor | None,
    B: Tensor,
    C: Tensor,
    angles: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    dt_bias: Tensor | None,
    rope_layout: str,
    chunk_size: int,
) -> None:
    """Raise `ValueError` where an argument does not fit the others."""
    if x.ndim != 4:
        raise ValueError(f"x must have shape (B, T, H, P), got {tuple(x.shape)}")
    batch, length, heads, head_dim = x.shape
    if B.ndim != 5 or B.shape[2] < 1 or B.shape[3] < 1 or heads % B.shape[3]:
        raise ValueError(
            f"B must have shape ({batch}, {length}, R, G, N) with R at least 1 and G dividing the "
            f"{heads} heads, got {tuple(B.shape)}"
        )
    ranks, groups, states = B.shape[2:]
    of_ranks = (heads, ranks, head_dim)
    for name, value, shape in (
        ("dt", dt, (batch, length, heads)),
        ("A", A, (batch, length, heads)),
        ("trap", trap, (batch, length, heads)),
        ("B", B, (batch, length, ranks, groups, states)),
        ("C", C, (batch, length, ranks, groups, states)),
        ("D", D, (heads,)),
        ("z", z, (batch, length, heads, head_dim)),
        ("B_bias", B_bias, (heads, ranks, states)),
        ("C_bias", C_bias, (heads, ranks, states)),
        ("mimo_x", mimo_x, of_ranks),
        ("mimo_z", mimo_z, of_ranks),
        ("mimo_o", mimo_o, of_ranks),
        ("dt_bias", dt_bias, (heads,)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if ranks > 1 and mimo_x is None:
        raise ValueError(f"mimo_x of shape {of_ranks} is needed where B has {ranks} ranks")
    if ranks > 1 and mimo_o is None and z is not None:
        raise ValueError("without mimo_o y is returned per rank, before the gate: z must be None")
    if mimo_z is not None and z is None:
        raise ValueError("mimo_z scales the gate z, and z is None")
    if rope_layout not in ("pairwise", "half"):
        raise ValueError(f'rope_layout must be "pairwise" or "half", got {rope_layout!r}')
    if angles is not None:
        if rope_layout == "half" and states % 2:
            raise ValueError(f'rope_layout="half" needs an even number of states, got {states}')
        pairs = angles.shape[-1] if angles.ndim == 3 else 0
        if angles.shape != (batch, length, pairs) or not 1 <= pairs <= states // 2:
            raise ValueError(
                f"angles must have shape ({batch}, {length}, S) with S from 1 to half the "
                f"{states} states, got {tuple(angles.shape)}; without rotation pass None"
            )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _check_state(state: object, rows: int, x: Tensor, B: Tensor, angles: Tensor | None) -> None:
    """Raise `ValueError` where a part of the state does not fit the inputs."""
    if not isinstance(state, Mamba3State):
        raise ValueError(f"initial_state must be a Mamba3State, got {type(state).__name__}")
    heads, head_dim = x.shape[2:]
    ranks, _, states = B.shape[2:]
    pairs = 0 if angles is None else angles.shape[2]
    for name, value, shape in (
        ("angle", state.angle, (rows, heads, pairs)),
        ("ssm", state.ssm, (rows, heads, head_dim, states)),
        ("k", state.k, (rows, ranks, heads, states)),
        ("v", state.v, (rows, heads, head_dim)),
    ):
        if value.shape != shape:
            raise ValueError(
                f"initial_state.{name} must have shape {shape}, got {tuple(value.shape)}"
            )
