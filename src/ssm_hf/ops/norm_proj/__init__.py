"""Residual norm and the projection behind it, as one operator for training."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.launch import unsupported_dtypes
from ssm_hf.ops.packing import in_given_precision
from ssm_hf.ops.rms_norm import add_rms_norm

if HAS_TRITON:
    from ssm_hf.ops.norm_proj.launch import norm_proj_triton
else:
    norm_proj_triton = None

__all__ = ["norm_proj"]


@in_given_precision
def norm_proj(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual stream after a sublayer, and the next one's projection of its norm.

    As `add_rms_norm` and a linear layer, but the norm is formed again in the backward pass, beside
    its gradient, in place of being kept; nor is the weight kept in `dtype` (within
    `keep_activations` both are). Rows of y may lie further apart than they are wide, so that each
    begins on a cache line.

    Args:
        x: (..., D), output of a sublayer, any float dtype.
        residual: (..., D), the stream before it, any float dtype; None = x alone is the stream.
        norm_weight: (D,).
        weight: (O, D).
        bias: (O,) or None.
        eps: added to the mean square.
        dtype: what the projection is computed in, and its output's.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        `(y, total)`: y (..., O) in `dtype`, total = x + residual (..., D) in residual's dtype.

    Raises:
        ValueError: shapes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Zhang and Sennrich 2019, equation 4.
    """
    width = x.shape[-1]
    for name, value, shape in (
        ("residual", residual, x.shape),
        ("norm_weight", norm_weight, (width,)),
        ("weight", weight, (weight.shape[0], width)),
        ("bias", bias, (weight.shape[0],)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    run = pick(
        "norm_proj",
        impl,
        x.device,
        # The operators inside decide for themselves, where not all kernels can run.
        reference=functools.partial(_one_after_another, impl=impl),
        triton=norm_proj_triton,
        unsupported=unsupported_dtypes(x, residual, norm_weight, weight, bias),
    )
    return run(x, residual, norm_weight, weight, bias, eps, dtype)


def _one_after_another(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor]:
    y, total = add_rms_norm(x, residual, norm_weight, eps=eps, dtype=dtype, impl=impl)
    return F.linear(y, weight.to(dtype), None if bias is None else bias.to(dtype)), total
