"""What lies between the projections of a Mamba-2 mixer, as one operator for training."""

import functools

from torch import Tensor

from ssm_hf.ops.causal_conv1d import MAX_TAPS
from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.launch import unsupported_dtypes
from ssm_hf.ops.mamba2_mix.reference import mamba2_mix_torch
from ssm_hf.ops.packing import check_packing, in_given_precision
from ssm_hf.ops.ssd import why_unsupported

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
    scan's output; it forms those of convolution and norm again (not within `keep_activations`).

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
        ValueError: shapes disagree, or T = 0.
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
        ("D", D, (heads,) if D.ndim == 1 else (heads, inner // heads)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    check_packing(proj.shape[0], proj.shape[1], None, (), seq_idx, None, mask)
    unsupported = unsupported_dtypes(proj, conv_weight, norm_weight, out_weight)
    if unsupported is None and conv_weight.shape[1] > MAX_TAPS:
        unsupported = f"kernels take 1 to {MAX_TAPS} taps, got K={conv_weight.shape[1]}"
    if unsupported is None:
        x = proj.new_empty(0, 0, heads, inner // heads)
        B = proj.new_empty(0, 0, n_groups, grouped // n_groups)
        unsupported = why_unsupported(x, proj, A, B, D, dt_bias)
    run = pick(
        "mamba2_mix",
        impl,
        proj.device,
        # The operators inside decide for themselves, where not all kernels can run.
        reference=functools.partial(mamba2_mix_torch, impl=impl),
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
