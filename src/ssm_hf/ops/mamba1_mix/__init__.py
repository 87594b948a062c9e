"""What lies between the outer projections of a Mamba-1 mixer, as one operator for training."""

import functools

from torch import Tensor

from ssm_hf.ops.causal_conv1d import MAX_TAPS
from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.launch import unsupported_dtypes
from ssm_hf.ops.mamba1_mix.reference import mamba1_mix_torch
from ssm_hf.ops.packing import check_packing, in_given_precision
from ssm_hf.ops.selective_scan import why_unsupported

if HAS_TRITON:
    from ssm_hf.ops.mamba1_mix.launch import mamba1_mix_triton
else:
    mamba1_mix_triton = None

__all__ = ["mamba1_mix"]


@in_given_precision
def mamba1_mix(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    real_first: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> Tensor:
    """[x | z] = proj; x = silu(conv(x)); [δ | B | C] = x_proj(x); out_proj(scan(x) silu(z)).

    As the operators one after another, but with a backward pass of its own, in which both gradients
    of proj are written into one tensor. The outputs of the convolution and of the step projection
    are formed again in place of being kept (not within `keep_activations`).

    Args:
        proj: (B, T, 2 I).
        conv_weight: (I, K).
        conv_bias: (I,) or None.
        x_weight: (R + 2 N, I).
        dt_weight: (I, R); the bias is added in fp32.
        dt_bias: (I,).
        A: (I, N), negative, fp32.
        D: (I,).
        out_weight: (O, I) output projection; None = without it.
        out_bias: (O,) or None.
        seq_idx: (B, T) integers; as in `selective_scan`. Pads carry the number of the document of
            the real token before them.
        mask: (B, T) bool, True = real token.
        real_first: what `causal_conv1d.real_first(mask)` gives, where the caller has it already.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (B, T, O), or (B, T, I) without out_weight, in proj's dtype, in which all projections are
        computed.

    Raises:
        ValueError: shapes disagree, or T = 0.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Gu and Dao 2023, figure 3 and algorithm 2.
    """
    (inner, states), rank = A.shape, dt_weight.shape[1]
    if proj.ndim != 3 or proj.shape[2] != 2 * inner:
        raise ValueError(f"proj must have shape (B, T, {2 * inner}), got {tuple(proj.shape)}")
    for name, value, shape in (
        ("conv_weight", conv_weight, (inner, conv_weight.shape[-1])),
        ("conv_bias", conv_bias, (inner,)),
        ("x_weight", x_weight, (rank + 2 * states, inner)),
        ("dt_weight", dt_weight, (inner, rank)),
        ("dt_bias", dt_bias, (inner,)),
        ("D", D, (inner,)),
        ("out_weight", out_weight, (None if out_weight is None else out_weight.shape[0], inner)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    check_packing(proj.shape[0], proj.shape[1], None, (), seq_idx, None, mask)
    weights = (conv_weight, x_weight, dt_weight, dt_bias, D, out_weight)
    unsupported = unsupported_dtypes(proj, *weights)
    if unsupported is None and conv_weight.shape[1] > MAX_TAPS:
        unsupported = f"kernels take 1 to {MAX_TAPS} taps, got K={conv_weight.shape[1]}"
    if unsupported is None and why_unsupported is not None:
        unsupported = why_unsupported(A, proj, D)
    run = pick(
        "mamba1_mix",
        impl,
        proj.device,
        # The operators inside decide for themselves, where not all kernels can run.
        reference=functools.partial(mamba1_mix_torch, impl=impl),
        triton=mamba1_mix_triton,
        unsupported=unsupported,
    )
    return run(
        proj,
        conv_weight,
        conv_bias,
        x_weight,
        dt_weight,
        dt_bias,
        A,
        D,
        out_weight,
        out_bias,
        seq_idx,
        mask,
        real_first,
    )
