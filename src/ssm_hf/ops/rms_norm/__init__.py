"""RMS norm: plain, grouped, gated in both orders, and fused with the residual's addition."""

import torch
from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.launch import unsupported_dtypes
from ssm_hf.ops.packing import in_given_precision
from ssm_hf.ops.rms_norm.reference import add_rms_norm_torch, rms_norm_torch

if HAS_TRITON:
    from ssm_hf.ops.rms_norm.launch import add_rms_norm_triton, rms_norm_triton
else:
    rms_norm_triton = add_rms_norm_triton = None

__all__ = ["add_rms_norm", "rms_norm"]


@in_given_precision
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    gate: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    impl: str = "auto",
) -> Tensor:
    """weight * x / rms(x) over groups of the last dimension, with an optional silu gate.

    Args:
        x: (..., D), any float dtype.
        weight: (D,).
        eps: added to the mean square.
        gate: (..., D) or None. By default the gate comes first, norm(x silu(gate)); with
            `norm_before_gate` it is norm(x) silu(gate).
        group_size: width of the groups that are normalised on their own; None = the whole of D.
        norm_before_gate: order of norm and gate.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (..., D) in x's dtype; statistics and products are formed in fp32 or wider.

    Raises:
        ValueError: shapes disagree, or `group_size` does not divide D.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Zhang and Sennrich 2019, equation 4; gated as in Dao and Gu 2024, figure 6.
    """
    width = x.shape[-1]
    if weight.shape != (width,):
        raise ValueError(f"weight must have shape ({width},), got {tuple(weight.shape)}")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gate must have x's shape {tuple(x.shape)}, got {tuple(gate.shape)}")
    if group_size is not None and (group_size < 1 or width % group_size):
        raise ValueError(f"group_size must divide the width {width}, got {group_size}")
    run = pick(
        "rms_norm",
        impl,
        x.device,
        reference=rms_norm_torch,
        triton=rms_norm_triton,
        unsupported=unsupported_dtypes(x, weight, gate),
    )
    return run(x, weight, eps, gate, group_size, norm_before_gate)


@in_given_precision
def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual stream after a sublayer, and its norm for the next: one pass over memory.

    Gradients flow through both outputs. The stream may be wider than the sublayers, fp32 beside
    bf16.

    Args:
        x: (..., D), output of a sublayer, any float dtype.
        residual: (..., D), the stream before it, any float dtype; None = x alone is the stream.
        weight: (D,).
        eps: added to the mean square.
        dtype: of the normalised output; default x's.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        `(y, total)`: total = x + residual (..., D) in residual's dtype, y = weight * total /
        rms(total) (..., D) in `dtype`; statistics and products are formed in fp32 or wider.

    Raises:
        ValueError: shapes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Zhang and Sennrich 2019, equation 4.
    """
    width = x.shape[-1]
    if weight.shape != (width,):
        raise ValueError(f"weight must have shape ({width},), got {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    run = pick(
        "add_rms_norm",
        impl,
        x.device,
        reference=add_rms_norm_torch,
        triton=add_rms_norm_triton,
        unsupported=unsupported_dtypes(x, weight, residual),
    )
    return run(x, residual, weight, eps, x.dtype if dtype is None else dtype)
