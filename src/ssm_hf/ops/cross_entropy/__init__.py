"""Linear layer and cross-entropy in one, without the logits."""

from typing import Literal

import torch
from torch import Tensor

from ssm_hf.ops.cross_entropy.reference import (
    linear_cross_entropy_definition,
    linear_cross_entropy_torch,
)
from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.launch import unsupported_dtypes

if HAS_TRITON:
    from ssm_hf.ops.cross_entropy.launch import linear_cross_entropy_triton
else:
    linear_cross_entropy_triton = None

__all__ = ["linear_cross_entropy", "linear_cross_entropy_definition"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    num_items: Tensor | int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of softmax(hidden weight^T + bias) without the logits of all tokens.

    They are formed for a part of the tokens at a time. Gradients are formed along with the loss,
    where inputs require them, and scaled in the backward pass; there are no second derivatives.

    The logits are rounded as a linear layer would round them: to autocast's dtype, else to
    weight's, to which hidden is brought. The loss is formed from them in fp32 or wider, and the
    weight's gradient is accumulated there.

    Args:
        hidden: (..., D), any float dtype.
        weight: (V, D), any float dtype.
        targets: (...) integers in [0, V), or `ignore_index`; not checked.
        bias: (V,) or None.
        ignore_index: targets of this value count nothing.
        num_items: number or tensor () by which the summed loss is divided in place of the number
            of targets, e.g. that of a whole accumulated batch; with `reduction="mean"` only.
        reduction: `"mean"` or `"sum"`.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        loss (), in fp32 (fp64 for fp64 weights); NaN for a mean over nothing.

    Raises:
        ValueError: shapes disagree, targets are no integers, or `reduction` is neither word.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: gradients in the forward pass, chunk by chunk, as in Hsu et al. 2024, "Liger Kernel".
    """
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:-1] or targets.is_floating_point():
        raise ValueError(
            f"targets must be integers of shape {tuple(hidden.shape[:-1])}, "
            f"got {targets.dtype} of shape {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    if num_items is not None and reduction == "sum":
        raise ValueError('num_items divides the sum: it needs reduction="mean"')
    dtype = weight.dtype
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    run = pick(
        "linear_cross_entropy",
        impl,
        hidden.device,
        reference=linear_cross_entropy_torch,
        triton=linear_cross_entropy_triton,
        unsupported=unsupported_dtypes(hidden, weight, bias),
    )
    # The products' dtype is chosen: autocast must not choose again.
    with torch.autocast(device, enabled=False):
        total, count = run(hidden, weight, bias, targets, ignore_index, dtype)
        if reduction == "sum":
            return total
        return total / (count if num_items is None else num_items)
