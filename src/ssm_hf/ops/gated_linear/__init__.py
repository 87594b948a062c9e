"""The second half of a gated MLP, as one operator for training."""

from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.gated_linear.reference import gated_linear_torch
from ssm_hf.ops.launch import unsupported_dtypes
from ssm_hf.ops.packing import in_given_precision

if HAS_TRITON:
    from ssm_hf.ops.gated_linear.launch import gated_linear_triton
else:
    gated_linear_triton = None

__all__ = ["gated_linear"]


@in_given_precision
def gated_linear(u: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    """y = weight (value * silu(gate)), u = [value | gate].

    The gated product is formed again in the backward pass, beside its gradient, in place of being
    kept; nor is the weight kept in u's dtype.

    Args:
        u: (..., 2 W), any float dtype.
        weight: (D, W); the projection is computed in u's dtype.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (..., D) in u's dtype.

    Raises:
        ValueError: shapes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Shazeer 2020, equation 6.
    """
    if weight.ndim != 2 or u.shape[-1] != 2 * weight.shape[1]:
        raise ValueError(
            "u must have shape (..., 2 W) and weight (D, W), "
            f"got {tuple(u.shape)} and {tuple(weight.shape)}"
        )
    run = pick(
        "gated_linear",
        impl,
        u.device,
        reference=gated_linear_torch,
        triton=gated_linear_triton,
        unsupported=unsupported_dtypes(u, weight),
    )
    return run(u, weight)
