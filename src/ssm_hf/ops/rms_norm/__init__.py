"""RMS norm: plain, grouped, gated, in both gate orders."""

from torch import Tensor

from ssm_hf.ops.dispatch import pick
from ssm_hf.ops.packing import in_given_precision
from ssm_hf.ops.rms_norm.reference import rms_norm_torch

__all__ = ["rms_norm"]


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
    run = pick("rms_norm", impl, x.device, reference=rms_norm_torch)
    return run(x, weight, eps, gate, group_size, norm_before_gate)
