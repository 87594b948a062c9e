"""Mamba-2's mixer for one token, from in_proj's output to out_proj's input, in place."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.causal_conv1d.reference import causal_conv1d_step
from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.packing import compute_dtype, in_given_precision
from ssm_hf.ops.rms_norm.reference import rms_norm_torch
from ssm_hf.ops.ssd.reference import ssd_step
from ssm_hf.ops.step_size import step_size

if HAS_TRITON:
    from ssm_hf.ops.ssd.step_launch import mamba2_step_triton, squares_of_rows
else:
    mamba2_step_triton = squares_of_rows = None

__all__ = ["mamba2_step", "squares_of_rows"]

# One program holds all states of a channel, and at least one channel, in registers.
_MOST_STATES = 1024


@in_given_precision
def mamba2_step(
    proj: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    tickets: Tensor,
    *,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    n_groups: int,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_before_gate: bool = False,
    convolved: bool = False,
    overlap: bool = False,
    squares: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Convolution, step size, recurrence, skip, gate and norm of one token; states change in place.

    Args:
        proj: (B, 2 M + H P + C + H), [gate | value | z | x B C | dt]: M channels of a gated MLP
            (M = 0 if all are scanned), and C = H P + 2 G N convolved channels.
        conv_state: (B, K-1, C), contiguous.
        ssm_state: (B, H, P, N), contiguous, any float dtype.
        tickets: (B, G) int32, 0 before and after the call; no two calls at a time may share them.
        conv_weight: (C, K).
        conv_bias: (C,) or None.
        dt_bias: (H,).
        A_log: (H,).
        D: (H,) or (H P,).
        n_groups: G.
        dt_limit: bounds of Δ = softplus(dt + dt_bias).
        norm_weight: (H P,) of an RMS norm over groups of H P / G channels; None = gate alone.
        norm_eps: of the norm.
        norm_before_gate: norm(y) silu(z) in place of norm(y silu(z)).
        convolved: x, B and C come through the convolution already; its state is not touched.
        overlap: what is read beside proj was written before the last kernel that was launched
            without overlap, so that it may be read while the kernels in between still run.
        squares: (B, Q) fp32 with Q = `squares_of_rows(ssm_state, n_groups)`, which is then not 0,
            or None. It is given the sums of the squares of y silu(z), and the norm, after the gate
            and over all channels, is left at its weight: the factor is for whoever reads the
            result. For `convolved` input without an MLP.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (B, M + H P) in proj's dtype.

    Raises:
        ValueError: shapes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Dao and Gu 2024, equation 1 and figure 6.
    """
    batch, heads, head_dim, states = ssm_state.shape
    width, channels = heads * head_dim, conv_weight.shape[0]
    rest = proj.shape[1] - width - channels - heads
    if n_groups < 1 or heads % n_groups or channels != width + 2 * n_groups * states:
        raise ValueError(
            f"conv_weight must cover H P + 2 G N = {width + 2 * n_groups * states} channels, with "
            f"n_groups={n_groups} dividing the {heads} heads, got {tuple(conv_weight.shape)}"
        )
    if proj.ndim != 2 or proj.shape[0] != batch or rest < 0 or rest % 2:
        raise ValueError(
            f"proj must have shape ({batch}, 2 M + {width + channels + heads}), "
            f"got {tuple(proj.shape)}"
        )
    for name, value, shapes in (
        ("conv_state", conv_state, [(batch, conv_weight.shape[1] - 1, channels)]),
        ("tickets", tickets, [(batch, n_groups)]),
        ("conv_bias", conv_bias, [(channels,)]),
        ("dt_bias", dt_bias, [(heads,)]),
        ("A_log", A_log, [(heads,)]),
        ("D", D, [(heads,), (width,)]),
        ("norm_weight", norm_weight, [(width,)]),
        ("squares", squares, [(batch, 0 if squares is None else squares.numel() // batch)]),
    ):
        if value is not None and value.shape not in shapes:
            raise ValueError(
                f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}"
            )
    if squares is not None and (
        norm_weight is None or norm_before_gate or not convolved or rest or n_groups > 1
    ):
        raise ValueError(
            "squares are of convolved input without an MLP, of one norm over all channels after "
            "the gate"
        )
    unsupported = None
    if states > _MOST_STATES:
        unsupported = f"the kernel takes at most {_MOST_STATES} states, got {states}"
    elif torch.float64 in (proj.dtype, ssm_state.dtype, conv_weight.dtype):
        unsupported = "the kernel takes fp32, fp16 and bf16, got fp64"
    run = pick(
        "ssd",
        impl,
        proj.device,
        reference=mamba2_step_torch,
        triton=mamba2_step_triton,
        unsupported=unsupported,
    )
    return run(
        proj,
        conv_state,
        ssm_state,
        tickets,
        conv_weight,
        conv_bias,
        dt_bias,
        A_log,
        D,
        n_groups,
        dt_limit[0],
        dt_limit[1],
        norm_weight,
        norm_eps,
        norm_before_gate,
        convolved,
        overlap,
        squares,
    )


def mamba2_step_torch(
    proj: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    tickets: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    n_groups: int,
    dt_low: float,
    dt_high: float,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_before_gate: bool,
    convolved: bool,
    overlap: bool,
    squares: Tensor | None,
) -> Tensor:
    """The step in plain torch."""
    del tickets, overlap
    heads, head_dim, states = ssm_state.shape[1:]
    width, channels = heads * head_dim, conv_weight.shape[0]
    mlp = (proj.shape[1] - width - channels - heads) // 2
    gate, value, z, mixed, dt = proj.split([mlp, mlp, width, channels, heads], dim=-1)
    if not convolved:
        mixed, window = causal_conv1d_step(mixed, conv_weight, conv_bias, "silu", conv_state)
        conv_state.copy_(window)
    wide = compute_dtype(proj, ssm_state)
    x, B, C = mixed.to(wide).split([width, n_groups * states, n_groups * states], dim=-1)
    x = x.unflatten(-1, (heads, head_dim))
    B, C = (v.unflatten(-1, (n_groups, states)) for v in (B, C))
    delta = step_size(dt, dt_bias, True, (dt_low, dt_high), None).to(wide)
    y, state = ssd_step(x, delta, -torch.exp(A_log.to(wide)), B, C, ssm_state.to(wide))
    ssm_state.copy_(state)
    D = D.to(wide)
    y = torch.addcmul(y, D.view(heads, -1) if D.shape[0] == width else D[:, None], x)
    y = y.flatten(1)
    if norm_weight is None:
        y = y * F.silu(z.to(wide))
    elif squares is not None:
        y = y * F.silu(z.to(wide))
        squares.zero_()[:, 0] = y.square().sum(1)
        y = y * norm_weight.to(wide)
    else:
        y = rms_norm_torch(y, norm_weight, norm_eps, z, width // n_groups, norm_before_gate)
    if mlp:
        y = torch.cat([F.silu(gate.to(wide)) * value.to(wide), y], dim=-1)
    return y.to(proj.dtype)
