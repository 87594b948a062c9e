"""What lies between the projections of a Mamba-2 mixer, as one operator for training."""

import functools

import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.causal_conv1d import MAX_TAPS, causal_conv1d
from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.launch import unsupported_dtypes
from ssm_hf.ops.packing import in_given_precision
from ssm_hf.ops.rms_norm import rms_norm
from ssm_hf.ops.ssd import ssd, why_unsupported

if HAS_TRITON:
    from ssm_hf.ops.mamba2_mix.launch import mamba2_mix_triton
else:
    mamba2_mix_triton = None

__all__ = ["mamba2_mix"]


@in_given_precision
def mamba2_mix(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None = None,
    *,
    n_groups: int,
    chunk_size: int = 64,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    norm_eps: float = 1e-5,
    norm_before_gate: bool = False,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    real_first: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> Tensor:
    """[z | x | B | C | dt] = proj; x, B, C through silu(conv); out_proj(norm(scan, gate z)).

    As the operators one after another, but with a backward pass of its own, in which all gradients
    of proj are written into one tensor. Of the tensors as large as proj it keeps proj and the
    scan's output; it forms those of convolution and norm again.

    Args:
        proj: (B, T, H P + C + H), C = H P + 2 G N.
        conv_weight: (C, K).
        conv_bias: (C,) or None.
        A: (H,), negative, fp32.
        D: (H,) or (H, P).
        dt_bias: (H,).
        norm_weight: (H P,), norm over each of the G groups; None = no norm, y silu(z).
        out_weight: (O, H P) output projection, computed in proj's dtype; None = without it.
        out_bias: (O,) or None.
        n_groups: G.
        chunk_size, dt_limit, seq_idx, mask: as in `ssd`. Pads carry the number of the document of
            the real token before them.
        norm_eps, norm_before_gate: as in `rms_norm`.
        real_first: what `causal_conv1d.real_first(mask)` gives, where the caller has it already.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (B, T, O), or (B, T, H P) without out_weight, in proj's dtype.

    Raises:
        ValueError: shapes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Dao and Gu 2024, figure 6.
    """
    heads, conv_size = dt_bias.shape[0], conv_weight.shape[0]
    inner = proj.shape[-1] - conv_size - heads
    grouped = (conv_size - inner) // 2
    if proj.ndim != 3 or inner < 1 or inner % heads or conv_size != inner + 2 * grouped:
        raise ValueError(
            f"proj must have shape (B, T, H P + C + H) with C={conv_size} and H={heads}, "
            f"got {tuple(proj.shape)}"
        )
    if n_groups < 1 or heads % n_groups or grouped % n_groups:
        raise ValueError(f"n_groups must divide {heads} heads and {grouped}, got {n_groups}")
    for name, value, shape in (
        ("norm_weight", norm_weight, (inner,)),
        ("out_weight", out_weight, (None if out_weight is None else out_weight.shape[0], inner)),
        ("conv_bias", conv_bias, (conv_size,)),
        ("A", A, (heads,)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    unsupported = unsupported_dtypes(proj, conv_weight, norm_weight, out_weight)
    if unsupported is None and conv_weight.shape[1] > MAX_TAPS:
        unsupported = f"kernels take 1 to {MAX_TAPS} taps, got K={conv_weight.shape[1]}"
    if unsupported is None:
        z, conv_in, dt = proj.split([inner, conv_size, heads], dim=-1)
        x = z.unflatten(-1, (heads, -1))
        B = conv_in[..., :grouped].unflatten(-1, (n_groups, -1))
        unsupported = why_unsupported(x, dt, A, B, D, dt_bias)
    run = pick(
        "mamba2_mix",
        impl,
        proj.device,
        # The operators inside decide for themselves, where not all kernels can run.
        reference=functools.partial(_one_after_another, impl=impl),
        triton=mamba2_mix_triton,
        unsupported=unsupported,
    )
    return run(
        proj,
        conv_weight,
        conv_bias,
        A,
        D,
        dt_bias,
        norm_weight,
        out_weight,
        out_bias,
        n_groups,
        chunk_size,
        dt_limit,
        norm_eps,
        norm_before_gate,
        seq_idx,
        mask,
        real_first,
    )


def _one_after_another(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    n_groups: int,
    chunk_size: int,
    dt_limit: tuple[float, float],
    norm_eps: float,
    norm_before_gate: bool,
    seq_idx: Tensor | None,
    mask: Tensor | None,
    real_first: tuple[Tensor, Tensor] | None,
    impl: str,
) -> Tensor:
    heads, conv_size = dt_bias.shape[0], conv_weight.shape[0]
    inner = proj.shape[-1] - conv_size - heads
    grouped = (conv_size - inner) // 2
    z, conv_in, dt = proj.split([inner, conv_size, heads], dim=-1)
    conv_out = causal_conv1d(
        conv_in, conv_weight, conv_bias, activation="silu", seq_idx=seq_idx, mask=mask, impl=impl
    )
    assert isinstance(conv_out, Tensor)
    x, B, C = conv_out.split([inner, grouped, grouped], dim=-1)
    x, gate = (v.unflatten(-1, (heads, -1)) for v in (x, z))
    B, C = (v.unflatten(-1, (n_groups, -1)) for v in (B, C))
    y = ssd(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=chunk_size,
        D=D,
        z=gate if norm_weight is None else None,
        dt_bias=dt_bias,
        dt_softplus=True,
        dt_limit=dt_limit,
        seq_idx=seq_idx,
        mask=mask,
        impl=impl,
    )
    assert isinstance(y, Tensor)
    y = y.flatten(2)
    if norm_weight is not None:
        y = rms_norm(
            y,
            norm_weight,
            eps=norm_eps,
            gate=z,
            group_size=inner // n_groups,
            norm_before_gate=norm_before_gate,
            impl=impl,
        )
    if out_weight is None:
        return y
    out_bias = None if out_bias is None else out_bias.to(y.dtype)
    return F.linear(y, out_weight.to(y.dtype), out_bias)
