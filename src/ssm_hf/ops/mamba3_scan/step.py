"""Mamba-3's mixer for one token, from in_proj's output to out_proj's input, in place."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.mamba3_scan.reference import Mamba3State, mamba3_step
from ssm_hf.ops.packing import compute_dtype, in_given_precision

if HAS_TRITON:
    from ssm_hf.ops.mamba3_scan.step_launch import mamba3_mix_step_triton
else:
    mamba3_mix_step_triton = None

__all__ = ["decay_rates", "mamba3_mix_step"]

# One program holds all states of a channel, and at least one channel, in registers.
_MOST_STATES = 1024


def decay_rates(raw: Tensor, activation: str, floor: float) -> Tensor:
    """A = min(-f(raw), -floor), fp32 or wider.

    f is 1 + x above 0 and 1 / (1 - x) below with `"heavy_tail"`, or `"softplus"`.
    """
    x = raw.to(compute_dtype(raw))
    if activation == "heavy_tail":
        rate = torch.where(x >= 0, 1 + x, 1 / (1 - x.clamp(max=0)))
    elif activation == "softplus":
        rate = F.softplus(x)
    else:
        raise ValueError(f'A_activation must be "heavy_tail" or "softplus", got {activation!r}')
    return -rate.clamp(min=floor)


@in_given_precision
def mamba3_mix_step(
    proj: Tensor,
    angle_state: Tensor,
    ssm_state: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    tickets: Tensor,
    *,
    B_norm_weight: Tensor,
    C_norm_weight: Tensor,
    norm_eps: float,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    dt_bias: Tensor,
    D: Tensor,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    norm_weight: Tensor | None = None,
    n_groups: int,
    rope_layout: str = "pairwise",
    A_floor: float = 1e-4,
    A_activation: str = "heavy_tail",
    trapezoid: bool = True,
    overlap: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Norms of B and C, step size, rotation, recurrence, skip, norm and gate of one token.

    The four states change in place. R ranks, S rotated pairs of the N states, see `mamba3_scan`.

    Args:
        proj: (B, 2 H P + 2 R G N + 3 H + S), [z | x | B | C | dt | A | trap | angles], B and C in
            the order (R, G, N); without `trapezoid` 2 H in place of 3 H, without trap.
        angle_state: (B, H, S), contiguous, S = 0 without rotation.
        ssm_state: (B, H, P, N), contiguous, any float dtype, as the two below.
        k_state: (B, R, H, N), contiguous.
        v_state: (B, H, P), contiguous.
        tickets: (B, H) int32, 0 before and after the call; no two calls at a time may share them.
        B_norm_weight: (N,) of B's RMS norm.
        C_norm_weight: (N,).
        norm_eps: of all three norms.
        B_bias: (H, R, N), added before the rotation, or None.
        C_bias: (H, R, N) or None.
        dt_bias: (H,).
        D: (H,).
        mimo_x: (H, R, P); needed with several ranks.
        mimo_z: (H, R, P) or None.
        mimo_o: (H, R, P); needed with several ranks.
        norm_weight: (H P,) of an RMS norm of each head's (and rank's) y before the gate, or None.
        n_groups: G.
        rope_layout: `"pairwise"` or `"half"`.
        A_floor: least decay rate.
        A_activation: `"heavy_tail"` or `"softplus"`.
        trapezoid: False = λ is 1 (Euler's rule).
        overlap: what is read beside proj was not written by the kernel launched just before, so
            that it may be read while that one still runs.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (B, H P) in proj's dtype.

    Raises:
        ValueError: shapes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Lahoti et al. 2026, "Mamba-3", section 3.
    """
    batch, heads, head_dim, states = ssm_state.shape
    ranks, pairs = k_state.shape[1], angle_state.shape[-1]
    if n_groups < 1 or heads % n_groups:
        raise ValueError(f"n_groups must divide the {heads} heads, got {n_groups}")
    if A_activation not in ("heavy_tail", "softplus"):
        raise ValueError(f'A_activation must be "heavy_tail" or "softplus", got {A_activation!r}')
    if rope_layout not in ("pairwise", "half"):
        raise ValueError(f'rope_layout must be "pairwise" or "half", got {rope_layout!r}')
    if ranks > 1 and (mimo_x is None or mimo_o is None):
        raise ValueError(f"mimo_x and mimo_o are needed with {ranks} ranks")
    width = 2 * heads * head_dim + 2 * ranks * n_groups * states + (2 + trapezoid) * heads + pairs
    of_ranks, of_bias = (heads, ranks, head_dim), (heads, ranks, states)
    for name, value, shape in (
        ("proj", proj, (batch, width)),
        ("angle_state", angle_state, (batch, heads, pairs)),
        ("k_state", k_state, (batch, ranks, heads, states)),
        ("v_state", v_state, (batch, heads, head_dim)),
        ("tickets", tickets, (batch, heads)),
        ("B_norm_weight", B_norm_weight, (states,)),
        ("C_norm_weight", C_norm_weight, (states,)),
        ("B_bias", B_bias, of_bias),
        ("C_bias", C_bias, of_bias),
        ("dt_bias", dt_bias, (heads,)),
        ("D", D, (heads,)),
        ("mimo_x", mimo_x, of_ranks),
        ("mimo_z", mimo_z, of_ranks),
        ("mimo_o", mimo_o, of_ranks),
        ("norm_weight", norm_weight, (heads * head_dim,)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    unsupported = None
    if states > _MOST_STATES:
        unsupported = f"the kernel takes at most {_MOST_STATES} states, got {states}"
    elif torch.float64 in (proj.dtype, ssm_state.dtype, dt_bias.dtype):
        unsupported = "the kernel takes fp32, fp16 and bf16, got fp64"
    run = pick(
        "mamba3_scan",
        impl,
        proj.device,
        reference=mamba3_mix_step_torch,
        triton=mamba3_mix_step_triton,
        unsupported=unsupported,
    )
    return run(
        proj, angle_state, ssm_state, k_state, v_state, tickets, B_norm_weight, C_norm_weight,
        norm_eps, B_bias, C_bias, dt_bias, D, mimo_x, mimo_z, mimo_o, norm_weight, n_groups,
        rope_layout == "pairwise", A_floor, A_activation == "heavy_tail", trapezoid, overlap,
    )  # fmt: skip


def mamba3_mix_step_torch(
    proj: Tensor,
    angle_state: Tensor,
    ssm_state: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    tickets: Tensor,
    B_norm_weight: Tensor,
    C_norm_weight: Tensor,
    norm_eps: float,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    dt_bias: Tensor,
    D: Tensor,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    norm_weight: Tensor | None,
    n_groups: int,
    pairwise: bool,
    A_floor: float,
    heavy_tail: bool,
    trapezoid: bool,
    overlap: bool,
) -> Tensor:
    """The step in plain torch."""
    del tickets, overlap
    heads, head_dim, states = ssm_state.shape[1:]
    ranks, pairs = k_state.shape[1], angle_state.shape[-1]
    inner, grouped = heads * head_dim, ranks * n_groups * states
    sizes = [inner, inner, grouped, grouped, heads, heads, heads * trapezoid, pairs]
    z, x, B, C, dt, rate, trap, angles = proj.split(sizes, dim=-1)
    z, x = (v.unflatten(-1, (heads, head_dim)) for v in (z, x))
    wide = compute_dtype(proj, ssm_state)
    B, C = (
        F.rms_norm(
            v.unflatten(-1, (ranks, n_groups, states)).to(wide), (states,), w.to(wide), norm_eps
        )
        for v, w in ((B, B_norm_weight), (C, C_norm_weight))
    )
    A = decay_rates(rate, "heavy_tail" if heavy_tail else "softplus", A_floor)
    state = Mamba3State(angle_state, ssm_state, k_state, v_state)
    gated = norm_weight is None
    y, after = mamba3_step(
        x.to(wide), dt, A, trap if trapezoid else None, B, C, angles if pairs else None, D,
        z.to(wide) if gated else None, B_bias=B_bias, C_bias=C_bias, mimo_x=mimo_x,
        mimo_z=mimo_z if gated else None, mimo_o=mimo_o if gated else None, dt_bias=dt_bias,
        dt_softplus=True, rope_layout="pairwise" if pairwise else "half", state=state,
    )  # fmt: skip
    if norm_weight is not None:
        y = F.rms_norm(y.view(-1, ranks, heads, head_dim), (head_dim,), eps=norm_eps)
        y = y * norm_weight.to(wide).view(heads, head_dim)
        gate = z.to(wide)[:, None]
        y = y * F.silu(gate if mimo_z is None else gate * mimo_z.to(wide).transpose(0, 1))
        if mimo_o is not None:
            y = y * mimo_o.to(wide).transpose(0, 1)
        y = y.sum(dim=1)
    for old, new in zip(state, after, strict=True):
        old.copy_(new)
    return y.flatten(1).to(proj.dtype)
