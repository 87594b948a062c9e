"""A linear layer for the few rows of a decoding step, together with its neighbours."""

import torch
from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, pick, runs_kernels
from ssm_hf.ops.norm_linear.reference import norm_linear_torch
from ssm_hf.ops.packing import in_given_precision

if HAS_TRITON:
    from ssm_hf.ops.norm_linear.launch import norm_linear_triton
else:
    norm_linear_triton = None

__all__ = ["MOST_ROWS", "few_rows", "norm_linear"]

# With more rows matrix units win.
MOST_ROWS = 2


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels run for x (..., B, 1, K) and beat a library product and its neighbours.

    Args:
        x: the rows.
        weight: (O, K) of the first product of a step.
    """
    return (
        x.shape[-3] <= MOST_ROWS
        and weight.dtype != torch.float64
        and not torch.is_autocast_enabled(x.device.type)
        and runs_kernels("norm_linear", x.device)
    )


@in_given_precision
def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    group_size: int | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    conv_state: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    conv_first: int = 0,
    out_dtype: torch.dtype | None = None,
    overlap: bool = False,
    impl: str = "auto",
) -> Tensor:
    """residual + conv(weight norm(x) + bias), every part but the product optional.

    Args:
        x: (B, K), any float dtype; (B, 2 K) if it is gated.
        weight: (O, K).
        bias: (O,) or None.
        norm_weight: (K,) of an RMS norm of x, or None.
        eps: of the norm.
        group_size: width of the groups that are normalised on their own; None = K.
        gated: x is [value | gate], and value * silu(gate) stands in its place.
        residual: (B, O), added at the end, or None.
        conv_state: (B, taps-1, C), window of a causal depthwise convolution with silu over the
            outputs `conv_first` to `conv_first + C`; updated in place. None = no convolution.
        conv_weight: (C, taps), given with `conv_state`.
        conv_bias: (C,) or None.
        conv_first: first output that is convolved.
        out_dtype: dtype of the result; default that of the residual, or of x.
        overlap: what is read beside x and the residual was not written by the kernel launched just
            before, so that it may be read while that one still runs.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (B, O); everything is formed in fp32 or wider.

    Raises:
        ValueError: shapes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.
    """
    if x.ndim != 2 or weight.ndim != 2 or (1 + gated) * weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"x must have shape (B, {'2 ' * gated}K) and weight (O, K), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    rows, (outputs, size) = x.shape[0], weight.shape
    for name, value, shape in (
        ("bias", bias, (outputs,)),
        ("norm_weight", norm_weight, (size,)),
        ("residual", residual, (rows, outputs)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if group_size is not None and (group_size < 1 or size % group_size):
        raise ValueError(f"group_size must divide the width {size}, got {group_size}")
    if (conv_state is None) != (conv_weight is None):
        raise ValueError("conv_state and conv_weight are given together or not at all")
    if conv_state is not None and conv_weight is not None:
        channels, taps = conv_weight.shape
        if conv_state.shape != (rows, taps - 1, channels):
            raise ValueError(
                f"conv_state must have shape {(rows, taps - 1, channels)}, "
                f"got {tuple(conv_state.shape)}"
            )
        if conv_first < 0 or conv_first + channels > outputs:
            raise ValueError(
                f"conv_first={conv_first} and {channels} channels exceed the {outputs} outputs"
            )
    if out_dtype is None:
        out_dtype = x.dtype if residual is None else residual.dtype
    unsupported = None
    if rows > MOST_ROWS:
        unsupported = f"the kernel takes at most {MOST_ROWS} rows, got {rows}"
    elif torch.float64 in (x.dtype, weight.dtype):
        unsupported = "the kernel takes fp32, fp16 and bf16, got fp64"
    run = pick(
        "norm_linear",
        impl,
        x.device,
        reference=norm_linear_torch,
        triton=norm_linear_triton,
        unsupported=unsupported,
    )
    return run(
        x,
        weight,
        bias,
        norm_weight,
        eps,
        group_size or size,
        gated,
        residual,
        conv_state,
        conv_weight,
        conv_bias,
        conv_first,
        out_dtype,
        overlap,
    )
