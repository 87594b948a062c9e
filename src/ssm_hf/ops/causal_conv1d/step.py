"""The convolution for one token, in place on its window."""

from torch import Tensor

from ssm_hf.ops.causal_conv1d.reference import causal_conv1d_step
from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.packing import in_given_precision

if HAS_TRITON:
    from ssm_hf.ops.causal_conv1d.step_launch import causal_conv1d_step_triton
else:
    causal_conv1d_step_triton = None

__all__ = ["causal_conv1d_step_"]


@in_given_precision
def causal_conv1d_step_(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, *, impl: str = "auto"
) -> Tensor:
    """silu(bias + sum_k weight[:, k] window_k), and the window moves on in place.

    Args:
        x: (B, C), the new input, any float dtype.
        window: (B, K-1, C), the inputs before it, contiguous; updated in place.
        weight: (C, K).
        bias: (C,) or None.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (B, C) in x's dtype.

    Raises:
        ValueError: shapes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Gu and Dao 2023, section 3.4.
    """
    batch, channels = x.shape
    for name, value, shape in (
        ("window", window, (batch, weight.shape[1] - 1, channels)),
        ("weight", weight, (channels, weight.shape[1])),
        ("bias", bias, (channels,)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    unsupported = None
    if 8 in (x.dtype.itemsize, window.dtype.itemsize, weight.dtype.itemsize):
        unsupported = "the kernel takes fp32, fp16 and bf16, got fp64"
    run = pick(
        "causal_conv1d",
        impl,
        x.device,
        reference=_step_torch,
        triton=causal_conv1d_step_triton,
        unsupported=unsupported,
    )
    return run(x, window, weight, bias)


def _step_torch(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y, moved = causal_conv1d_step(x, weight, bias, "silu", window)
    window.copy_(moved)
    return y
